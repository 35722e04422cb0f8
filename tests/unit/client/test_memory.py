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
    (path / "meminfo").write_text(f"MemTotal:       {100 * GIB // 1024} kB\nMemFree:  {30 * GIB // 1024} kB\nMemAvailable:   {60 * GIB // 1024} kB\n")
    (path / "self" / "cgroup").write_text("0::/pod/container\n")
    return path


def group(path: Path, limit: str, used: int, inactive: int, active: int = 0, mapped: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nactive_file {active}\nfile_mapped {mapped}\n")


def test_without_cgroups_the_machine_counts(tmp_path: Path, proc: Path) -> None:
    assert memory.room(tmp_path / "none", proc).available == 50 * GIB  # a tenth of the machine stays free


def test_the_tightest_group_above_counts(tmp_path: Path, proc: Path) -> None:
    cgroups = tmp_path / "cgroup"
    group(cgroups / "pod" / "container", "max", 0, 0)
    group(cgroups / "pod", str(20 * GIB), 12 * GIB, 2 * GIB)
    assert memory.room(cgroups, proc) == memory.Room(8 * GIB, 6 * GIB)


def test_active_page_cache_counts_as_far_as_nobody_has_it_mapped(tmp_path: Path, proc: Path) -> None:
    group(tmp_path / "cgroup" / "pod", str(20 * GIB), 12 * GIB, 2 * GIB, active=5 * GIB, mapped=4 * GIB)
    assert memory.room(tmp_path / "cgroup", proc) == memory.Room(9 * GIB, 6 * GIB)
    group(tmp_path / "cgroup" / "pod", str(20 * GIB), 12 * GIB, 2 * GIB, active=5 * GIB, mapped=6 * GIB)
    assert memory.room(tmp_path / "cgroup", proc) == memory.Room(8 * GIB, 6 * GIB)


def test_version_1(tmp_path: Path, proc: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:memory:/kubepods/pod\n0::/\n")
    old = tmp_path / "cgroup" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(10 * GIB))
    (old / "memory.usage_in_bytes").write_text(str(6 * GIB))
    (old / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {1 * GIB}\ntotal_active_file {3 * GIB}\ntotal_mapped_file {3 * GIB}\n")
    assert memory.room(tmp_path / "cgroup", proc) == memory.Room(4 * GIB, 3 * GIB)
    (old / "memory.limit_in_bytes").write_text("9223372036854771712")  # how version 1 says: no limit
    assert memory.room(tmp_path / "cgroup", proc).available == 50 * GIB


def test_a_full_group_leaves_nothing(tmp_path: Path, proc: Path) -> None:
    group(tmp_path / "cgroup" / "pod", str(GIB), GIB, 0)
    assert memory.room(tmp_path / "cgroup", proc) == memory.Room(0, 0)


def test_beyond_memory_high_the_kernel_only_slows_down(tmp_path: Path, proc: Path) -> None:
    group(tmp_path / "cgroup" / "pod", str(20 * GIB), 0, 0)
    (tmp_path / "cgroup" / "pod" / "memory.high").write_text(str(10 * GIB))
    assert memory.room(tmp_path / "cgroup", proc).available == 9 * GIB


def test_a_process_in_a_nested_group_of_version_1(tmp_path: Path, proc: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:memory:/kubepods/pod\n0::/\n")
    old = tmp_path / "cgroup" / "memory" / "kubepods"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(10 * GIB))
    (old / "memory.usage_in_bytes").write_text(str(6 * GIB))
    assert memory.room(tmp_path / "cgroup", proc).available == 3 * GIB


def test_a_container_of_version_1_does_not_see_the_group_above(tmp_path: Path, proc: Path) -> None:
    (proc / "self" / "cgroup").write_text("9:memory:/kubepods/pod\n0::/\n")
    own = tmp_path / "cgroup" / "memory"
    own.mkdir(parents=True)
    (own / "memory.limit_in_bytes").write_text("9223372036854771712")
    (own / "memory.stat").write_text(f"cache 1\nhierarchical_memory_limit {10 * GIB}\n")
    assert memory.room(tmp_path / "cgroup", proc).available == 9 * GIB


def test_what_cannot_be_read_sets_no_limit(tmp_path: Path) -> None:
    assert memory.room(tmp_path, tmp_path).available == memory.NO_LIMIT


def test_what_a_model_has_in_the_cache_is_not_room_for_its_rest() -> None:
    assert memory.Room(available=10, free=2).beside(0) == 10
    assert memory.Room(available=10, free=2).beside(7) == 3
    assert memory.Room(available=10, free=2).beside(9) == 2
    assert memory.Room(available=0, free=0).beside(9) == 0


def test_this_machine_has_some() -> None:
    assert memory.room().available > 0
