"""Reads files into the page cache on threads of its own, while its owner does something else or waits. It keeps no bytes, and chooses no files.

Threads take pieces of the files in turn, and have the kernel populate a mapping of each, in large pages. Where that does not work out, a thread asks
for the rest of its piece by `posix_fadvise(WILLNEED)`, which queues all of it at once, and sends it to /dev/null, which waits for every page, copies
none and tells of a failing disk. WILLNEED goes in steps that the device takes whole, because Linux silently cuts a longer request down to the
device's read-ahead (mm/readahead.c, force_page_cache_ra).
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import NoReturn, TypeVar

from nvcache.client.mapping import LARGE_PAGES, populate
from nvcache.client.memory import room
from nvcache.client.place import Place, place
from nvcache.client.residency import SAMPLES, Look, make_way, resident

T = TypeVar("T")
PIECE = 16 * 2**20
GRAIN = 4 * 2**20  # of a piece; as much as must have come before who waits for a tensor hears of it
LOOK_EVERY = 2**30  # bytes between two looks at whether memory got short
STALL_SECONDS = 300.0
TICK = 1.0  # of waits for a disk
NO_THREAD = "no thread can be started: the process is at its limit"
SILENT = "the disk has given nothing for {:.0f} s"
LEAST_SAMPLES = 64  # of a model

Progress = Callable[[int, int], None]
"""Is told how many bytes are done (read, left out, or there before), and of how many."""


@dataclass(frozen=True)
class Prefetched:
    """What was done. Bytes; `already_cached` and `cached` (afterwards) are estimates from samples, None where the file system cannot tell.

    `left_out` was not read, because of `limit_bytes` or for want of memory; `limit` is what both allowed to read. `notes` say in words what a
    person should know: why it stopped, or that these files lie on no local disk.
    """

    files: int
    bytes: int
    already_cached: int | None
    read: int
    left_out: int
    cached: int | None
    limit: int
    threads: int
    filesystem: str
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Bytes per second that came from the disk."""
        return self.read / self.seconds if self.seconds else 0.0


@dataclass(eq=False)
class _File:
    path: Path
    place: Place
    size: int
    pieces: list[_Piece]
    reached: int = 0  # of its pieces, how many from the first on are done

    @property
    def done(self) -> int:
        """Everything below this offset has been read or left out."""
        return self.pieces[self.reached].reached if self.reached < len(self.pieces) else self.size


@dataclass(eq=False)
class _Piece:
    file: _File
    offset: int
    length: int
    reached: int  # everything of it below this offset of the file has been read
    missing: int = 0
    absent: tuple[int, ...] = ()  # points that the first look found missing
    done: bool = False

    @property
    def end(self) -> int:
        """The offset of the file behind it."""
        return self.offset + self.length


class Reading:
    """Brings files into the page cache on threads of its own, while its owner does something else or waits.

    Every file is opened for each piece and closed after it, so that neither many files nor an owner who leaves early cost descriptors.
    Raises OSError when a file cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], *, threads: int, limit_bytes: int | None) -> None:
        self._began = monotonic()
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._stopped = False
        self._error: OSError | None = None
        self._read = self._left_out = self._looked = 0
        self._files = _cut(paths)
        files = list({id(file): file for file in self._files.values()}.values())  # a file under two names is one
        self._notes = list(dict.fromkeys(file.place.doubt for file in files if file.place.doubt))
        self._kinds = ", ".join(dict.fromkeys(file.place.kind for file in files))
        self._every = [piece for file in files for piece in file.pieces]
        looks = self._look()
        for piece, look in zip(self._every, looks, strict=True):
            piece.missing = piece.length - (round(piece.length * look.share) if look else 0)
            piece.absent = look.absent if look else ()
        self._already = self._cached(looks)
        self.bytes = sum(file.size for file in files)
        free = room().beside(self._already or 0)
        self._limit = free if limit_bytes is None else min(free, limit_bytes)
        # what the kernel reads beyond a piece is of the next one, but where a limit ends it somewhere
        self._large = LARGE_PAGES and sum(piece.missing for piece in self._every) <= self._limit
        self._bound_by = "memory" if limit_bytes is None or free < limit_bytes else "limit_bytes"
        self._left = len(self._every)  # pieces that are not done
        self._next = iter(self._every)
        self.threads = 0 if self._already == self.bytes else min(threads, len(self._every))

    def start(self) -> None:
        """Begin; when all of it is in the page cache already there is nothing to do. Raises OSError when not one thread can be had."""
        with self._changed:
            for piece in self._every:
                if not piece.missing:
                    self._finish(piece)
        for n in range(self.threads):
            try:
                threading.Thread(target=self._run, name=f"nvcache-prefetch-{n}", daemon=True).start()
            except RuntimeError:  # the process may have no more
                self.threads = n
                if not n:
                    raise OSError(errno.EAGAIN, NO_THREAD) from None
                break

    def wait(self, path: Path | None = None, upto: int = 0, *, on_progress: Progress | None = None) -> None:
        """Until the first `upto` bytes of one of the files, or all of them, have been read or left out.

        Raises OSError when a file could not be read, TimeoutError when the disk has given nothing for `STALL_SECONDS`, RuntimeError in a process
        that was forked meanwhile, which has none of the threads.
        """
        if os.getpid() != self._process:
            raise RuntimeError("cannot go on reading in a forked process: begin anew there")
        idle, ready = 0.0, False
        while not ready:
            with self._changed:
                if self._error is not None:
                    raise self._error
                ready = self._left == 0 if path is None else self._files[path].done >= min(upto, self._files[path].size)
                if not ready:
                    idle = 0.0 if self._changed.wait(TICK) else idle + TICK  # ticks, for a process may be stopped for longer than that
                    if idle >= STALL_SECONDS:
                        self._error = TimeoutError(errno.ETIMEDOUT, SILENT.format(STALL_SECONDS))
                done = sum(piece.length for piece in self._every if piece.done) if on_progress else 0
            if on_progress:
                on_progress(done, self.bytes)

    def report(self) -> Prefetched:
        """What was done, with another look at what is in the page cache now; after `wait`."""
        seconds = monotonic() - self._began
        cached = self._cached(within(self._look))
        notes = list(self._notes)
        if cached is None or self._already is None:
            cached = None
            notes.append(f"{self._kinds} does not tell what is in the page cache")
        elif self._already + self._read - cached > max(0.05 * (self._already + self._read), PIECE):  # less comes and goes on any machine
            notes.append("some of it has left the page cache again: memory is short")
        return Prefetched(
            files=len(self._files),
            bytes=self.bytes,
            already_cached=self._already,
            read=self._read,
            left_out=self._left_out,
            cached=cached,
            limit=self._limit,
            threads=self.threads,
            filesystem=self._kinds,
            seconds=seconds,
            notes=tuple(notes),
        )

    def close(self) -> None:
        """Let the threads end after the pieces they are at; waits for none of them."""
        self._stopped = True

    def _look(self) -> list[Look | None]:
        """How much of each piece is in the page cache, by samples."""
        samples = max(SAMPLES, LEAST_SAMPLES // max(1, len(self._every)))
        return [look for file in {id(piece.file): piece.file for piece in self._every}.values() for look in _looks(file, samples)]

    def _cached(self, looks: Sequence[Look | None]) -> int | None:
        """Bytes, from looks at all pieces; None where one could not tell."""
        known = [look for look in looks if look is not None]
        return sum(round(piece.length * look.share) for piece, look in zip(self._every, known, strict=True)) if len(known) == len(looks) else None

    def _run(self) -> None:
        """One thread's share: pieces in their order, until there are none, a disk failed or the owner has gone."""
        try:
            with Path(os.devnull).open("wb", buffering=0) as null:
                while (piece := self._take()) is not None:
                    with suppress(FileNotFoundError):  # it was removed meanwhile: who has it mapped reads it by touching it
                        self._bring(piece, null.fileno())
                    with self._changed:
                        self._finish(piece)
        except OSError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> _Piece | None:
        """The next piece to bring. Once one does not fit, it and all after it are left out, so that what is there is the beginning of the model."""
        with self._changed:
            for piece in self._next:
                if self._stopped or self._error is not None:
                    return None
                if not self._left_out and self._fits(piece):
                    self._read += piece.missing
                    return piece
                self._left_out += piece.missing
                self._finish(piece)
            return None

    def _fits(self, piece: _Piece) -> bool:
        """Whether the limit allows it, and the memory still does; looked at again every `LOOK_EVERY` bytes."""
        if not piece.missing:
            return True
        if self._read + piece.missing > self._limit:
            why = "more would not fit into this process's memory" if self._bound_by == "memory" else "the next piece would pass limit_bytes"
            self._notes.append(f"stopped after reading {self._read / 1e6:.0f} MB: {why}")
            return False
        if self._read - self._looked > LOOK_EVERY:
            self._looked = self._read
            if not room().available:
                self._notes.append(f"stopped after reading {self._read / 1e6:.0f} MB: memory got short meanwhile")
                return False
        return True

    def _bring(self, piece: _Piece, null: int) -> None:
        with _opened(piece.file.path) as handle:
            if piece.missing and self._large:
                make_way(handle, piece.absent)
                while piece.reached < piece.end and not self._stopped:
                    size = min(GRAIN, piece.end - piece.reached)
                    if not populate(handle, piece.reached, size):
                        break
                    self._advance(piece, size)
            if self._stopped:
                return
            step = piece.file.place.step
            for offset in range(piece.reached, piece.end, step):
                os.posix_fadvise(handle, offset, min(step, piece.end - offset), os.POSIX_FADV_WILLNEED)
            # where samples saw all of it they may have missed a hole, which has been asked for now; nobody waits for it
            while piece.missing and piece.reached < piece.end and not self._stopped:
                try:
                    sent = os.sendfile(null, handle, piece.reached, min(GRAIN, piece.end - piece.reached))
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(piece.file.path)) from error
                if not sent:  # who touches a mapping beyond the end gets SIGBUS
                    raise OSError(errno.EIO, "it was cut short while it was read", str(piece.file.path))
                self._advance(piece, sent)

    def _advance(self, piece: _Piece, size: int) -> None:
        with self._changed:
            piece.reached += size
            self._changed.notify_all()

    def _finish(self, piece: _Piece) -> None:
        if piece.done:
            return
        piece.done = True
        file = piece.file
        while file.reached < len(file.pieces) and file.pieces[file.reached].done:
            file.reached += 1
        self._left -= 1
        self._changed.notify_all()


@contextmanager
def reading(files: Sequence[Path], *, threads: int | None = None, limit_bytes: int | None = None) -> Iterator[Reading]:
    """A `Reading` that has begun, and that ends with the context. `threads`: by default as many as this process has cores, from 8 to 16.

    Raises as `Reading` and `within`, ValueError for fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"cannot prefetch with {threads} threads")
    if limit_bytes is not None and limit_bytes < 0:
        raise ValueError(f"cannot prefetch at most {limit_bytes} bytes")
    count = threads or min(16, max(8, len(os.sched_getaffinity(0))))
    found = within(lambda: Reading(files, threads=count, limit_bytes=limit_bytes))
    try:
        found.start()
        yield found
    finally:
        found.close()


def within(work: Callable[[], T]) -> T:
    """What `work` returns, or raises. Raises TimeoutError when it takes `STALL_SECONDS`: no other way leads out of a system call whose disk is
    silent. Its thread is then left behind."""
    ended: SimpleQueue[Callable[[], T]] = SimpleQueue()

    def run() -> None:
        try:
            found = work()
            ended.put(lambda: found)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            ended.put(partial(_raise, error))

    try:
        threading.Thread(target=run, name="nvcache-look", daemon=True).start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, NO_THREAD) from None
    idle = 0.0
    while idle < STALL_SECONDS:
        try:
            return ended.get(timeout=TICK)()
        except Empty:
            idle += TICK
    raise TimeoutError(errno.ETIMEDOUT, SILENT.format(STALL_SECONDS))


def _raise(error: BaseException) -> NoReturn:
    raise error


def _cut(paths: Sequence[Path]) -> dict[Path, _File]:
    """The files, in pieces; two names of one file have the same. Raises OSError."""
    found: dict[tuple[int, int], _File] = {}
    places: dict[int, Place] = {}
    files = {}
    for path in paths:
        with _opened(path) as handle:
            about = os.fstat(handle)
            key = (about.st_dev, about.st_ino)
            if key not in found:
                where = places.get(about.st_dev) or places.setdefault(about.st_dev, place(handle))
                file = found[key] = _File(path, where, about.st_size, [])
                file.pieces = [_Piece(file, offset, min(PIECE, file.size - offset), offset) for offset in range(0, file.size, PIECE)]
            files[path] = found[key]
    return files


def _looks(file: _File, samples: int) -> list[Look | None]:
    """How much of each piece is in the page cache."""
    if file.place.in_memory:
        return [Look(0, ())] * len(file.pieces)
    with _opened(file.path) as handle:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_NOREUSE)  # a look makes no page seem to be in use, to be kept (since Linux 6.3)
        return [resident(handle, piece.offset, piece.length, samples) for piece in file.pieces]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read but what is asked for: neither by a look nor beyond a piece's end
        yield handle
    finally:
        os.close(handle)
