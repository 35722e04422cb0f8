"""Tells what of a file is in the page cache, by a look at some points. It asks for no more than one page at each, and can take that back.

RWF_NOWAIT fails with EAGAIN for a page that is not there. `mincore` would not do: for a file this user neither owns nor may write it calls every page
resident (mincore(2), since Linux 5.2), and that is how pods see their models.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from mmap import PAGESIZE

SAMPLES = 4  # points of a range that are looked at
_points = random.SystemRandom()  # the program's own random numbers stay as they are, and no seed makes two looks alike


@dataclass(frozen=True)
class Look:
    """What a look at some points of a range found: `absent` are the offsets whose page was not in the page cache."""

    points: int
    absent: tuple[int, ...]

    @property
    def share(self) -> float:
        """Of the range that is in the page cache, by these points."""
        return 1.0 - len(self.absent) / self.points if self.points else 1.0


def resident(handle: int, offset: int, length: int, samples: int = SAMPLES) -> Look | None:
    """Whether some points of a range are in the page cache; None where the file system cannot tell.

    The look makes the kernel fetch the page that is missing: the handle should be set to random access, so that it is one page and not a whole
    read-ahead, and the points are drawn anew each time, so that no look finds what the one before left behind.
    """
    stride = max(1, -(-length // samples))
    starts = range(offset, offset + length, stride)
    byte = bytearray(1)
    absent = []
    for start in starts:
        point = _points.randrange(start, min(start + stride, offset + length))
        try:
            there = os.preadv(handle, [byte], point, os.RWF_NOWAIT) > 0  # and not beyond the end of a file that was cut short
        except BlockingIOError:
            there = False
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM):
                raise
            return None
        if not there:
            absent.append(point)
    return Look(len(starts), tuple(absent))


def make_way(handle: int, points: Sequence[int]) -> None:
    """Drop the small pages that a look at these points had the kernel fetch: where one lies, the kernel puts no large page.

    A page that is part of a larger one stays (mm/filemap.c, find_lock_entries), as does one that is mapped.
    """
    byte = bytearray(1)
    for point in points:
        with suppress(OSError):  # whoever reads the range is told
            os.preadv(handle, [byte], point)  # a page that is still on its way stays
        os.posix_fadvise(handle, point - point % PAGESIZE, PAGESIZE, os.POSIX_FADV_DONTNEED)
