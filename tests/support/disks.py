"""Mounts small file systems for tests that need a disk of a certain kind or size. It needs root; where it cannot mount, the test fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted(kind: str, folder: Path, *, megabytes: int = 64) -> Iterator[Path]:
    """A fresh file system of `kind` (ext4, xfs, tmpfs, overlay) and about that size, mounted below `folder` and gone afterwards.

    XFS is never smaller than 300 MB.
    """
    point = folder / kind
    point.mkdir(parents=True)
    match kind:
        case "ext4" | "xfs":
            image = folder / "disk.img"
            with image.open("wb") as file:
                file.truncate(megabytes * 2**20)
            options = ("-m", "0", "-E", "lazy_itable_init=0") if kind == "ext4" else ("-f",)
            _run(f"mkfs.{kind}", "-q", *options, str(image))
            _run("mount", "-o", "loop", str(image), str(point))
        case "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(point))
        case "overlay":
            parts = [folder / name for name in ("lower", "upper", "work")]
            for part in parts:
                part.mkdir()
            _run("mount", "-t", "overlay", "-o", "lowerdir={},upperdir={},workdir={}".format(*parts), "overlay", str(point))
        case _:
            raise ValueError(kind)
    try:
        yield point
    finally:
        unmount(point)


def unmount(point: Path) -> None:
    """Take away what is mounted there. What is still in use goes as soon as it is not, and is an error: a test that leaves something open.

    It never stays, for it would be in the way of whoever removes the directory, such as pytest at the end of a later run.
    """
    done = subprocess.run(["umount", str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        _run("umount", "--lazy", str(point))
        raise AssertionError(done.stderr)


@contextmanager
def full(point: Path) -> Iterator[None]:
    """The file system at `point` without a free block; with the space back afterwards."""
    ballast = point / ".ballast"
    fd = os.open(ballast, os.O_CREAT | os.O_WRONLY)
    try:
        for size in (2**20, 2**12):
            end = os.fstat(fd).st_size
            try:
                while True:
                    os.posix_fallocate(fd, end, size)
                    end += size
            except OSError:
                os.ftruncate(fd, end)
        yield
    finally:
        os.close(fd)
        ballast.unlink()


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
