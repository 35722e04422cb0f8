"""Brings a model into the page cache with all disks at work, so that mapping it afterwards finds the bytes there. It keeps no bytes itself.

Each piece is asked for by `posix_fadvise(WILLNEED)` in steps, all at once, and then one byte of every step is read: that waits for its pages and
tells of a failing disk. A step is no larger than the kernel's default read-ahead, because Linux silently cuts a longer WILLNEED down to the
device's read-ahead (mm/readahead.c, force_page_cache_ra): of one call for 64 MiB a fraction would arrive. The page cache is charged to the cgroup
that first touches it, so this belongs into the process or pod that loads the model.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic

from nvcache.client.memory import available

PIECE = 64 * 2**20
STEP = 128 * 2**10  # the kernel's default read-ahead
SAMPLES = 16  # points of a piece that are looked at to tell whether it is cached


@dataclass(frozen=True)
class Prefetched:
    """What was done. Bytes; `already_cached` is a sample's estimate, `left_out` did not fit `limit_bytes` or the memory."""

    files: int
    bytes: int
    already_cached: int
    read: int
    left_out: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second that came from the disk."""
        return self.read / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Piece:
    handle: int
    offset: int
    length: int


class _Work:
    """The pieces, in order, shared by the threads, and what became of them."""

    def __init__(self, budget: int) -> None:
        self.pieces: SimpleQueue[_Piece] = SimpleQueue()
        self.cached = 0
        self.read = 0
        self.left_out = 0
        self.error: OSError | None = None
        self._budget = budget
        self._lock = threading.Lock()

    def run(self) -> None:
        """One thread's share: take pieces until there are none, or a disk failed."""
        with suppress(Empty):
            while self.error is None:
                piece = self.pieces.get_nowait()
                try:
                    self._bring(piece)
                except OSError as error:
                    self.error = error

    def _bring(self, piece: _Piece) -> None:
        missing = round(piece.length * (1 - resident(piece.handle, piece.offset, piece.length)))
        with self._lock:
            taken = missing <= self._budget
            self.cached += piece.length - missing
            self._budget -= missing if taken else 0
            self.read += missing if taken else 0
            self.left_out += 0 if taken else missing
        if taken and missing:
            steps = range(piece.offset, piece.offset + piece.length, STEP)
            for offset in steps:
                os.posix_fadvise(piece.handle, offset, STEP, os.POSIX_FADV_WILLNEED)
            for offset in steps:
                os.pread(piece.handle, 1, min(offset + STEP, piece.offset + piece.length) - 1)


def prefetch(path: str | Path, *, threads: int = 4, limit_bytes: int | None = None) -> Prefetched:
    """Bring a file, or every file of a model's directory, into the page cache; returns when the bytes are there.

    Shards come in the order of the index file, everything else by name. Reads at most `limit_bytes`, and never more than the memory that this process
    may still use (cgroup limit and free memory, less a margin). Raises OSError when a file cannot be read, ValueError for fewer than one thread.
    """
    if threads < 1:
        raise ValueError(f"cannot prefetch with {threads} threads")
    began = monotonic()
    room = available()
    work = _Work(room if limit_bytes is None else min(room, limit_bytes))
    files = _in_order(Path(path))
    total = 0
    with ExitStack() as stack:
        for file in files:
            handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            size = os.fstat(handle).st_size
            total += size
            for offset in range(0, size, PIECE):
                work.pieces.put(_Piece(handle, offset, min(PIECE, size - offset)))
        helpers = [threading.Thread(target=work.run, name=f"nvcache-prefetch-{n}", daemon=True) for n in range(threads)]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()
    if work.error is not None:
        raise work.error
    return Prefetched(len(files), total, work.cached, work.read, work.left_out, monotonic() - began)


def resident(handle: int, offset: int, length: int) -> float:
    """The share of a range that is in the page cache, from `SAMPLES` points; 0.0 where the file system cannot tell.

    RWF_NOWAIT fails with EAGAIN for a page that is not there. `mincore` would not do: for a file this user neither owns nor may write it calls every
    page resident (mincore(2), since Linux 5.2), and that is how pods see their models. The look itself makes the kernel fetch what is missing:
    the handle is set to random access first, so that it is one page and not a whole read-ahead, and the points are drawn anew each time, so that no
    look finds what the one before left behind.
    """
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    stride = max(1, length // SAMPLES)
    starts = range(offset, offset + length, stride)
    byte = bytearray(1)
    found = 0
    for start in starts:
        try:
            point = random.randrange(start, min(start + stride, offset + length))  # noqa: S311 - a sample, not a secret
            point = random.randrange(start, min(start + stride, offset + length))  # noqa: S311 - a sample, not a secret
            found += os.preadv(handle, [byte], point, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:
            return 0.0
    return found / len(starts)


def _in_order(path: Path) -> list[Path]:
    """The files below `path`: indexed shards in the order in which a loader meets them, then the others by name."""
    if not path.is_dir():
        return [path]
    every = {file for file in path.rglob("*") if file.is_file()}
    shards = [file for file in _indexed(path) if file in every]
    return [*shards, *sorted(every - set(shards), key=_natural)]


def _indexed(path: Path) -> Iterator[Path]:
    for index in sorted(path.glob("*.index.json")):
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # a broken index only loses the order
            yield from dict.fromkeys(path / shard for shard in json.loads(index.read_bytes())["weight_map"].values())


def _natural(path: Path) -> list[tuple[int, str]]:
    """`layer-2` before `layer-10`."""
    return [(int(part or 0), text) for part, text in re.findall(r"(\d*)(\D*)", str(path))]
