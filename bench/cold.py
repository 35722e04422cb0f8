"""Puts the files of a directory out of the page cache, or all of them into it, and proves page by page that they are. It measures nothing.

The proof is `mincore`, which tells the truth only to who owns a file or may write it: for anyone else it calls every page resident (mincore(2), since
Linux 5.2). So files of others are refused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from bench.measure import MeasureError

TRACE = 0.001  # of the pages, which may be otherwise: the kernel keeps back what it is just working on
TRIES = 5
_libc = ctypes.CDLL(None, use_errno=True)


def drop(directory: Path) -> None:
    """Leave no more than a trace of the files below `directory` in the page cache. Raises `MeasureError` when more stays."""
    left = 1.0
    for _ in range(TRIES):
        for path in _files(directory):
            with path.open("rb") as file:
                os.fsync(file)  # a page that is not on the disk yet is not dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = cached(directory)
        if left <= TRACE:
            return
    raise MeasureError(
        f"cannot measure {directory} cold: {left:.1%} of it stays in the page cache; "
        "end the processes that map its files, and use a file system on a disk (tmpfs is all page cache)"
    )


def warm(directory: Path) -> None:
    """Have the files below `directory` in the page cache, but for a trace. Raises `MeasureError` when they do not stay there."""
    found = 0.0
    buffer = bytearray(4 * 2**20)
    for _ in range(TRIES):
        for path in _files(directory):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        found = cached(directory)
        if found >= 1 - TRACE:
            return
    raise MeasureError(f"cannot measure {directory} warm: only {found:.1%} of it stays in the page cache; use a smaller model or more memory")


def cached(directory: Path) -> float:
    """The share of the pages of all files below `directory` that is in the page cache. Raises `MeasureError` for files of others."""
    pages = resident = 0
    for path in _files(directory):
        states = _states(path)
        pages += len(states)
        resident += sum(state & 1 for state in states)  # the other bits mean nothing
    return resident / pages if pages else 0.0


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _states(path: Path) -> bytes:
    """A byte for each page of the file, as mincore(2) gives them. Raises `MeasureError`."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        if os.geteuid() not in (0, about.st_uid) and not os.access(path, os.W_OK, effective_ids=True):
            raise MeasureError(f"cannot tell whether {path} is cached: it belongs to another user and is not writable; run this as root or its owner")
        if not about.st_size:
            return b""
        # A private mapping, because ctypes takes the address of writable memory only; nothing is written to it.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
            states = (ctypes.c_ubyte * -(-about.st_size // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapping)
            failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(about.st_size), states)
            del start  # else the mapping could not be closed
        if failed:
            raise MeasureError(f"cannot tell whether {path} is cached: {os.strerror(ctypes.get_errno())}")
    return bytes(states)
