"""Takes files block by block through lanes: read, hashed in order, handed on. It knows neither where bytes come from nor where they go.

Each lane is a thread with a buffer of one block and a reader of one file, and takes the next block of the first file that has one left: a large file
is shared by all lanes, and many small ones go side by side. Memory is lanes x block, whatever is copied. A lane waits with its block until those
before it are hashed; they are in the hands of other lanes, each of which ends within the time limits of its source, so the wait does as well.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from nvcache.core.digest import Algorithm, Digest, git_blob_header
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.base import Reader, ReaderFactory

LOOK_S = 0.25  # between two reports
END_S = 12.0  # longest wait for lanes to end that were stopped; what hangs in a call of the SDK is cut off by its silence
TRIES = 3  # of a credential that the source refuses
LEAST_S, WINDOW_S = 2.0, 15.0  # the rate is that of the last while, once there is enough to judge by
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Errand(Protocol[T_contra]):
    """What is to be done with one file. `tool` is the lane's own."""

    path: str
    size: int
    block: int  # bytes
    algorithms: frozenset[Algorithm]

    def readers(self) -> ReaderFactory:
        """Where the bytes are; asked again when the source refuses the credential."""

    def take(self, tool: T_contra, index: int, view: memoryview) -> None:
        """A block that is right as far as is known; in any order, from any lane."""

    def finish(self, tool: T_contra, digests: dict[Algorithm, Digest]) -> None:
        """All blocks were taken, and these are the digests of the whole."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far all errands are. `rate` in bytes a second, `eta_s` in seconds; None while there is nothing to judge by."""

    bytes_done: int
    bytes_total: int
    files_done: int
    files_total: int
    rate: float | None
    eta_s: float | None


class _Passage(Generic[T]):
    """One file on its way through the lanes; the hash states belong to whoever has the block at `frontier`."""

    def __init__(self, errand: Errand[T]) -> None:
        self.errand = errand
        self.count = max(1, -(-errand.size // errand.block))  # an empty file is one block of nothing
        self.claimed = self.frontier = self.taken = 0
        self._states = {algorithm: _state(algorithm, errand.size) for algorithm in errand.algorithms}

    def span(self, index: int) -> tuple[int, int]:
        """Offset and length of a block."""
        at = index * self.errand.block
        return at, min(self.errand.block, self.errand.size - at)

    def hash(self, view: memoryview) -> None:
        for state in self._states.values():
            state.update(view)

    def digests(self) -> dict[Algorithm, Digest]:
        return {algorithm: Digest(algorithm, state.hexdigest()) for algorithm, state in self._states.items()}


@dataclass(slots=True)
class _Held:
    """The reader that a lane has open."""

    reader: Reader | None = None


class Lanes(Generic[T]):
    """Does `errands` with `count` threads, each with a tool from `tools`. To be run once."""

    def __init__(self, errands: Iterable[Errand[T]], count: int, tools: Callable[[], AbstractContextManager[T]], stop: threading.Event) -> None:
        passages = [_Passage(errand) for errand in errands]
        self._queue = deque(passages)
        self._count = max(1, min(count, sum(passage.count for passage in passages)))
        self._buffer = max((min(passage.errand.block, passage.errand.size) for passage in passages), default=0)
        self._tools = tools
        self._stop = stop
        self._changed = threading.Condition()
        self._open: dict[Reader, int] = {}  # reader → its bytes that are accounted for as blocks
        self._bytes, self._total = 0, sum(passage.errand.size for passage in passages)
        self._files, self._left = len(passages), len(passages)
        self._seen: deque[tuple[float, int]] = deque([(clock.monotonic(), 0)])

    def run(self, watch: Callable[[Progress], None]) -> None:
        """Block until all is done, and tell `watch` now and then. Raises the first lane's error, after the others have stopped.

        What is raised in the caller's thread meanwhile (Ctrl-C) stops the lanes as well.
        """
        threads = DaemonExecutor("lane", self._count)
        lanes = [threads.submit(self._lane) for _ in range(self._count)] if self._queue else []
        pending = set(lanes)
        try:
            while pending:
                done, pending = wait(pending, LOOK_S, FIRST_EXCEPTION)
                watch(self.progress())
                if any(lane.exception() for lane in done):
                    break
        finally:
            if pending:
                self.stop()
                wait(pending, END_S)
            threads.close(lambda: Interrupted(Code.STOPPING, "cannot take a file: the lanes are closed"))
        failed = [error for lane in lanes if lane.done() and (error := lane.exception()) is not None]
        if failed:  # the one that failed by itself is the cause, also where a lane that it stopped was quicker to say so
            raise next((error for error in failed if not isinstance(error, Interrupted)), failed[0])

    def stop(self) -> None:
        """Make every lane stop promptly."""
        self._stop.set()
        with self._changed:
            readers = list(self._open)
            self._changed.notify_all()
        for reader in readers:
            reader.abort()

    def progress(self) -> Progress:
        """Where it is."""
        now = clock.monotonic()
        with self._changed:
            under_way = sum(max(0, reader.received - counted) for reader, counted in self._open.items())
            done, files = min(self._total, self._bytes + under_way), self._files - self._left
        self._seen.append((now, done))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        began, before = self._seen[0]
        rate = (done - before) / (now - began) if done > before and now - began >= LEAST_S else None
        return Progress(done, self._total, files, self._files, rate, (self._total - done) / rate if rate and done < self._total else None)

    def _lane(self) -> None:
        passage: _Passage[T] | None = None
        held = _Held()
        try:
            with self._tools() as tool, memoryview(bytearray(self._buffer)) as buffer:
                while (claim := self._claim()) is not None:
                    if claim[0] is not passage:
                        self._let_go(held)
                        passage = claim[0]
                    offset, length = passage.span(claim[1])
                    with buffer[:length] as view:
                        self._read(passage.errand, held, offset, view)
                        self._carry(passage, claim[1], view, tool)
                        self._account(held.reader, length)
        finally:
            self._let_go(held)

    def _claim(self) -> tuple[_Passage[T], int] | None:
        """The next block of the first file that has one."""
        with self._changed:
            if self._stop.is_set() or not self._queue:
                return None
            passage = self._queue[0]
            index, passage.claimed = passage.claimed, passage.claimed + 1
            if passage.claimed == passage.count:
                self._queue.popleft()
            return passage, index

    def _read(self, errand: Errand[T], held: _Held, offset: int, view: memoryview) -> None:
        """Fill `view`, by another reader where the credential has to be renewed."""
        for tries in range(1, TRIES + 1):
            try:
                if len(view):
                    held.reader = held.reader or self._admit(errand.readers()())
                    held.reader.read(offset, view)
                break
            except SourceError as error:
                self._let_go(held)
                if error.code is not Code.BAD_TOKEN or tries == TRIES:
                    raise

    def _carry(self, passage: _Passage[T], index: int, view: memoryview, tool: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or passage.frontier == index)
            self._check_stopped(passage)
        passage.hash(view)
        with self._changed:
            passage.frontier += 1
            self._changed.notify_all()
        passage.errand.take(tool, index, view)
        with self._changed:
            self._check_stopped(passage)
            passage.taken += 1
            last = passage.taken == passage.count
        if last:
            passage.errand.finish(tool, passage.digests())
            with self._changed:
                self._left -= 1

    def _account(self, reader: Reader | None, length: int) -> None:
        with self._changed:
            self._bytes += length
            if reader is not None:
                self._open[reader] = reader.received

    def _check_stopped(self, passage: _Passage[T]) -> None:
        if self._stop.is_set():
            raise Interrupted(Code.CANCELLED, f"cannot finish {passage.errand.path}: cancelled")

    def _admit(self, reader: Reader) -> Reader:
        with self._changed:
            self._open[reader] = 0
            stopped = self._stop.is_set()
        if stopped:
            reader.abort()
        return reader

    def _let_go(self, held: _Held) -> None:
        reader, held.reader = held.reader, None
        if reader is not None:
            with self._changed:
                self._open.pop(reader, None)
            reader.close()


def _state(algorithm: Algorithm, size: int) -> hashlib._Hash:
    match algorithm:
        case Algorithm.SHA256:
            return hashlib.sha256()
        case Algorithm.GIT_SHA1:
            return hashlib.sha1(git_blob_header(size), usedforsecurity=False)
        case Algorithm.MD5:
            return hashlib.md5(usedforsecurity=False)
