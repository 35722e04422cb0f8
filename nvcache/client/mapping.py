"""Maps files by the C library: for good, privately and writable, or for as long as it takes the kernel to read a range. It keeps no descriptor.

Python's own `mmap` keeps one for as long as the mapping lives (until 3.13), so that a few models of hundreds of shards would use up what a process
may open; and its `madvise` holds the interpreter lock while the kernel reads.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import stat
import sys
import weakref
from pathlib import Path

_MAP_NORESERVE = 0x4000  # linux/mman.h; without it a file larger than the memory cannot be mapped so (vm.overcommit_memory)
_MADV_POPULATE_READ = 22  # asm-generic/mman-common.h, since Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path) -> memoryview:
    """All bytes of the file, mapped until nothing refers to them. Writing to them changes this process's own copy of a page.

    Raises OSError when the file cannot be opened or mapped, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if not about.st_size:
            return memoryview(b"")
        start = _libc.mmap(None, about.st_size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE, handle, 0)
        if start == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(handle)
    data = (ctypes.c_char * about.st_size).from_address(start)
    weakref.finalize(data, _libc.munmap, start, about.st_size).atexit = False  # tensors may be used until the very end
    return memoryview(data).cast("B")


def populate(handle: int, offset: int, length: int) -> bool:
    """Read a range of a file into the page cache, in pages as large as the file system has; returns when all of it is there. Whether it is.

    `offset` is a multiple of the page size. A mapping that is advised for huge pages is read 4 MiB at a time in folios of 2 MiB, whatever the
    device's read-ahead is (mm/filemap.c, do_sync_mmap_readahead), where any other way of asking ahead takes pages of 4 KiB: less work to fill, and
    one fault instead of dozens for whoever maps the file afterwards. Some MiB that follow the range may be read as well. Call it where `LARGE_PAGES`.
    False says only that it did not work out: a kernel or file system that cannot, a limit of address space, a failing disk or the end of the file
    (madvise(2)); an ordinary read tells which.
    """
    start = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_NORESERVE, handle, offset)
    if start == _FAILED:
        return False
    try:
        return all(_libc.madvise(start, length, advice) == 0 for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_READ))
    finally:
        _libc.munmap(start, length)


def large_pages(release: str, page_size: int) -> bool:
    """Whether a kernel reads a mapping ahead in huge pages (since Linux 5.18), and can be trusted with them: Linux 6.12 and later.

    Before, a large page of XFS could hold another place's bytes after memory had run short (found in September 2024, in kernels from 6.1 on).
    Only with pages of 4 KiB, for with others a huge page is 32 or 512 MiB, and far more would be read than was asked for.
    """
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= (6, 12) and page_size == 4096


LARGE_PAGES = large_pages(os.uname().release, mmap.PAGESIZE) and sys.maxsize > 2**32  # an offset is a C long
