"""Which pages of a file are in memory, and letting go of those that were not before. It reads no bytes and fills nothing.

mincore(2) tells the truth only to who owns a file or may write it: since Linux 5.2 it calls every page of anybody else's resident.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re

_libc = ctypes.CDLL(None, use_errno=True)
_GONE = re.compile(rb"[^\x01]+")  # a row of pages that are not in memory


def resident(fd: int, offset: int, length: int) -> bytes | None:
    """One byte a page of `length` bytes from `offset` (on a page), as far as the file goes: 1 if it is in the page cache, else 0.

    None where that cannot be told: the file is somebody else's. Raises OSError.
    """
    about = os.fstat(fd)
    length = min(length, about.st_size - offset)
    if os.geteuid() not in (0, about.st_uid):
        return None
    if length <= 0:
        return b""
    states = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    # A private mapping, because ctypes takes the address of writable memory only; nothing is written to it, and no page of it is touched.
    with mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=offset) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), states)
        del start  # else the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    ones = int.from_bytes(b"\x01" * len(states), "little")  # the other bits mean nothing
    return (int.from_bytes(bytes(states), "little") & ones).to_bytes(len(states), "little")


def in_memory(states: bytes) -> int:
    """The bytes that `resident` found in the page cache, by whole pages."""
    return states.count(1) * mmap.PAGESIZE


def drop_others(fd: int, offset: int, before: bytes) -> None:
    """Let go of the pages from `offset` on that were not in memory `before`. One that a process has mapped meanwhile stays. Raises OSError."""
    for row in _GONE.finditer(before):
        os.posix_fadvise(fd, offset + row.start() * mmap.PAGESIZE, len(row[0]) * mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
