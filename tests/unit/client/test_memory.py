"""The free memory is the least of machine and cgroups, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvcache.client import memory

GIB = 2**30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    path = tmp_path / "proc"
    (path / "self").mkdir(parents=True)
    (path / "meminfo").write_text(f"MemTotal:       {100 * GIB // 1024} kB\nMemFree:  1 kB\nMemAvailable:   {60 * GIB // 1024} kB\n")
    (path / "self" / "cgroup").write_text("0::/pod/container\n")
    return path


def group(path: Path, limit: str, used: int, inactive: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file 5\n")


def test_without_cgroups_the_machine_counts(tmp_path: Path, proc: Path) -> None:
    assert memory.available(tmp_path / "none", proc) == 50 * GIB  # a tenth of the machine stays free


def test_the_tightest_group_above_counts(tmp_path: Path, proc: Path) -> None:
    cgroups = tmp_path / "cgroup"
    group(cgroups / "pod" / "container", "max", 0, 0)
    group(cgroups / "pod", str(20 * GIB), 12 * GIB, 2 * GIB)
    assert memory.available(cgroups, proc) == 8 * GIB


def test_version_1(tmp_path: Path, proc: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:memory:/kubepods/pod\n0::/\n")
    old = tmp_path / "cgroup" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(10 * GIB))
    (old / "memory.usage_in_bytes").write_text(str(6 * GIB))
    (old / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {1 * GIB}\n")
    assert memory.available(tmp_path / "cgroup", proc) == 4 * GIB
    (old / "memory.limit_in_bytes").write_text("9223372036854771712")  # how version 1 says: no limit
    assert memory.available(tmp_path / "cgroup", proc) == 50 * GIB


def test_a_full_group_leaves_nothing(tmp_path: Path, proc: Path) -> None:
    group(tmp_path / "cgroup" / "pod", str(GIB), GIB, 0)
    assert memory.available(tmp_path / "cgroup", proc) == 0


def test_this_machine_has_some() -> None:
    assert memory.available() > 0
