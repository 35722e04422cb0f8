"""What lies under a file is read from the mount table and sysfs as the kernel writes them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from nvcache.client.place import LARGEST_STEP, STEP, Place, place

MOUNTS = b"""\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:5 / /with\\040space rw - xfs /dev/md127 rw
24 22 0:6 / /net rw,relatime shared:3 - nfs4 server:/models rw
25 22 0:7 / /user rw - fuse.blobfuse2 blobfuse2 rw
26 22 0:8 / /layer rw - overlay overlay rw,lowerdir=/x
27 22 0:9 / /odd\xff\x0c\xe2\x80\xa8name rw - ext4 /dev/nvme0n1 rw
28 27 0:10 / /layer/volume rw - tmpfs tmpfs rw
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    path = tmp_path / "proc"
    (path / "self" / "fdinfo").mkdir(parents=True)
    (path / "self" / "mountinfo").write_bytes(MOUNTS)
    return path


def placed(proc: Path, mount: int, sys: Path = Path("/sys")) -> Place:
    """Where the kernel says that a file of this mount lies."""
    with tempfile.TemporaryFile() as file:
        (proc / "self" / "fdinfo" / str(file.fileno())).write_text(f"pos:\t0\nflags:\t0100000\nmnt_id:\t{mount}\nino:\t7\n")
        return place(file.fileno(), proc, sys)


@pytest.mark.parametrize(
    ("mount", "kind", "point", "doubt"),
    [
        (22, "ext4", "/", None),
        (23, "xfs", "/with space", None),
        (24, "nfs4", "/net", "nfs4 (server:/models at /net), not on a local disk"),
        (25, "fuse.blobfuse2", "/user", "not on a local disk"),
        (26, "overlay", "/layer", "a container's own file system"),
        (27, "ext4", "/odd\\xff\x0c\u2028name", None),
        (28, "tmpfs", "/layer/volume", "memory already"),
    ],
)
def test_the_mount_of_an_open_file(proc: Path, mount: int, kind: str, point: str, doubt: str | None) -> None:
    found = placed(proc, mount)
    assert (found.kind, found.point) == (kind, point)
    assert (found.doubt is None) if doubt is None else (doubt in str(found.doubt))


def test_where_proc_does_not_say(tmp_path: Path, proc: Path) -> None:
    assert placed(proc, 99).kind == ""
    with tempfile.TemporaryFile() as file:
        assert place(file.fileno(), tmp_path / "none").doubt is None


def test_this_process_s_own_files() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        assert (place(file.fileno()).kind, place(file.fileno()).point) == ("tmpfs", "/dev/shm")


@pytest.mark.parametrize(
    ("figures", "step"),
    [
        ({}, STEP),
        ({"read_ahead_kb": 128}, STEP),
        ({"read_ahead_kb": 0, "max_sectors_kb": 512}, 512 * 1024),
        ({"read_ahead_kb": 1024, "max_sectors_kb": 512}, 1024 * 1024),
        ({"read_ahead_kb": 8192}, LARGEST_STEP),
    ],
)
@pytest.mark.parametrize("partition", [False, True])
def test_a_step_is_what_the_queue_takes(tmp_path: Path, proc: Path, figures: dict[str, int], step: int, partition: bool) -> None:
    disk = tmp_path / "devices" / "nvme0n1"
    (disk / "queue").mkdir(parents=True)
    (disk / "nvme0n1p1").mkdir()
    for name, figure in figures.items():
        (disk / "queue" / name).write_text(f"{figure}\n")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    number = os.stat(tempfile.gettempdir()).st_dev
    (tmp_path / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk / "nvme0n1p1" if partition else disk)
    assert placed(proc, 22, tmp_path).step == step
