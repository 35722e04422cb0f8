"""Prefetching where pods do it: as another user on a read-only mount, in a cgroup that is too small, on a container's own file system."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.cold import cached, drop
from nvcache.client import prefetch, reading
from nvcache.client.mapping import large_pages
from tests.support import blocks
from tests.support.disks import mounted

MIB = 2**20
SIZE = 96 * MIB
CHECKOUT = Path(__file__).parents[2]
PREFETCH = """
import dataclasses, json, sys
from nvcache.client import prefetch
print(json.dumps(dataclasses.asdict(prefetch(sys.argv[1]))))
"""
MINCORE = """
import ctypes, mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
states = (ctypes.c_ubyte * (len(mapped) // 4096))()
assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped))), ctypes.c_size_t(len(mapped)), states) == 0
print(sum(state & 1 for state in states) * 4096)
"""


@pytest.fixture
def model() -> Iterator[Path]:
    """A model of three files on a disk, none of it in the page cache, that anybody may read."""
    folder = Path(tempfile.mkdtemp(prefix="nv-pages-", dir="/var/tmp"))
    folder.chmod(0o755)
    for number in range(3):
        (folder / f"{number}.safetensors").write_bytes(os.urandom(SIZE // 3))
    drop(folder)
    yield folder
    shutil.rmtree(folder)


def python(script: str, *arguments: Path | str, inside: str = "", uid: int | None = None) -> str:
    """Run a script with the standard library and the client alone; `inside` is shell run before it, in a mount namespace of its own."""
    root = "" if uid is None else f"setpriv --reuid {uid} --regid {uid} --clear-groups --no-new-privs "
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", f'{inside}\nexec {root}"$@"', "sh", sys.executable, "-SEc", script, *map(str, arguments)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_user_on_a_read_only_mount_learns_what_is_cached(model: Path) -> None:
    readonly = f"mount --bind {model} {model} && mount -o remount,bind,ro {model}"
    first = model / "0.safetensors"
    assert int(python(MINCORE, first, inside=readonly, uid=65534)) == SIZE // 3  # why mincore is not asked: nothing of it is
    drop(model)
    report = json.loads(python(PREFETCH, model, inside=readonly, uid=65534))
    assert (report["bytes"], report["left_out"], report["notes"]) == (SIZE, 0, [])
    assert report["cached"] == pytest.approx(SIZE, rel=0.05)
    assert report["read"] + report["already_cached"] == SIZE
    assert report["read"] > 0.9 * SIZE
    assert cached(model) > 0.95
    again = json.loads(python(PREFETCH, model, inside=readonly, uid=65534))
    assert again["already_cached"] == pytest.approx(SIZE, rel=0.05)
    assert again["read"] < 0.05 * SIZE


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of 64 MiB, of whichever version this machine has."""
    tops = [path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if (path / "cgroup.procs").exists()]
    if not tops:
        pytest.skip("no memory cgroups are mounted here")
    own = next(line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.split(":")[1] in ("", "memory"))
    top = tops[0] / own.strip("/") if (tops[0] / own.strip("/")).is_dir() else tops[0]
    folder = Path(tempfile.mkdtemp(prefix="nvcache-", dir=top))
    limit = folder / ("memory.limit_in_bytes" if tops[0].name == "memory" else "memory.max")
    try:
        if not limit.exists():
            pytest.skip("no memory cgroup can be made below this process's own")
        limit.write_text(str(64 * MIB))
        yield folder
    finally:
        folder.rmdir()


def test_a_cgroup_that_is_too_small_ends_it_and_kills_nobody(model: Path, group: Path) -> None:
    report = json.loads(python(PREFETCH, model, inside=f"echo $$ > {group}/cgroup.procs"))
    assert 16 * MIB <= report["read"] <= 58 * MIB
    assert report["left_out"] + report["read"] + report["already_cached"] == SIZE
    assert "more would not fit into this process's memory" in report["notes"][0]
    assert report["cached"] == pytest.approx(report["read"], abs=reading.PIECE / 2)  # what was read has not pushed itself out


def test_a_container_s_own_file_system_is_named(model: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        for part in ("upper", "work", "merged"):
            Path(name, part).mkdir()
        overlay = f"mount -t overlay overlay -o lowerdir={model},upperdir={name}/upper,workdir={name}/work {name}/merged"
        report: dict[str, Any] = json.loads(python(PREFETCH, f"{name}/merged", inside=overlay))
    assert (report["filesystem"], report["read"] + (report["already_cached"] or 0)) == ("overlay", SIZE)
    assert "a container's own file system" in report["notes"][0]
    assert cached(model) > 0.95


def faults(path: Path) -> int:
    """How many it takes to touch every page of a file that is in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert len(data[::4096]) == data.size() // 4096
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_is_prefetched_is_in_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever maps it takes a fault for each of them, and not for every 64 KiB; the pages that the first look fetched are not in the way."""
    if not large_pages(os.uname().release, mmap.PAGESIZE):
        pytest.skip(f"Linux {os.uname().release} is not asked for them")
    Path("/proc/sys/vm/compact_memory").write_text("1")  # a machine that has run for long may have no large page left
    with mounted("xfs", tmp_path, megabytes=320) as point:
        path = point / "model.safetensors"
        path.write_bytes(os.urandom(SIZE))
        count = {}
        for size in ("large", "small"):
            drop(point)
            prefetch(path)
            assert cached(point) > 0.95
            count[size] = faults(path)
            monkeypatch.setattr(reading, "LARGE_PAGES", False)
        assert count["large"] < count["small"] / 2, count


def test_a_second_model_may_take_the_memory_of_one_that_nobody_has_mapped(model: Path, group: Path) -> None:
    """What was read in large pages, or looked at twice, is active page cache to the kernel; of 64 MiB some 58 may be used."""
    for number in (0, 1):
        script = f"echo $$ > {group}/cgroup.procs"
        report = json.loads(python(PREFETCH, model / f"{number}.safetensors", inside=script))
        assert (report["left_out"], report["notes"]) == (0, []), number


@pytest.mark.parametrize("large", [True, False])
def test_a_disk_that_cannot_be_read_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, large: bool) -> None:
    """The end of the disk is gone: whoever touched a mapping of it would die of SIGBUS."""
    if not large:
        monkeypatch.setattr(reading, "LARGE_PAGES", False)
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    blocks.run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(image))
    with blocks.loop(image) as node, blocks.mount(node, tmp_path / "disk") as point:
        path = point / "model.safetensors"
        content = os.urandom(SIZE)
        path.write_bytes(content)
        drop(point)
        os.sync()  # what is written to the image from now on would make it longer again
        with image.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            last = data.find(content[-100:])
        os.truncate(image, last - 4 * MIB)
        with pytest.raises(OSError, match="Input/output error") as caught:
            prefetch(path)
        assert caught.value.filename == str(path)
        for thread in threading.enumerate():
            if thread.name.startswith("nvcache-prefetch"):
                thread.join(60)  # it has the file open
