"""Moves one file from a source into an ingest: lanes fetch chunks, write them, and hash them in order. It commits nothing and retries nothing.

Each lane is a thread with one reader and one page-aligned buffer of a chunk. A lane claims the lowest missing chunk, receives it into its buffer,
takes the XXH3-64, writes it (O_DIRECT), records it, and then lingers for about as long as the chunk took until the SHA-256 frontier reaches it, so
that the frontier is fed from memory. A chunk whose lane left before that is read back from the disk and compared with its XXH3-64. Nothing piles up:
memory is lanes x chunk whatever the size of the file. The same read-back rebuilds the SHA-256 state when an ingest is resumed.
"""

from __future__ import annotations

import hashlib
import heapq
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass

import xxhash

from nvcache.core.digest import Algorithm, Digest, git_blob_header
from nvcache.errors import Code, Interrupted, NvcacheError
from nvcache.sources.base import Reader, ReaderFactory
from nvcache.store.files import aligned_buffer
from nvcache.store.ingest import Ingest

LINGER_MIN, LINGER_MAX = 0.05, 2.0  # seconds a lane waits for the frontier before it lets go of its buffer
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Pumped:
    """What came out: the SHA-256 in hex, one XXH3-64 per chunk packed little endian, and the bytes that crossed the network."""

    sha256: str
    also: Digest | None  # the second one, if one was asked for
    chunks: bytes
    fetched: int


class Pump:
    """Fills `ingest` from `readers` with `lanes` threads.

    `also` asks for a second digest, which costs about as much as the SHA-256. `fetched` is what was fetched of the file before, to be counted in.
    """

    def __init__(self, ingest: Ingest, readers: ReaderFactory, lanes: int, *, also: Algorithm | None = None, fetched: int = 0) -> None:
        self._ingest = ingest
        self._readers = readers
        self._lanes = max(1, min(lanes, ingest.count))
        self._changed = threading.Condition()
        self._stored = ingest.recorded()
        self._missing = [index for index in range(ingest.count) if index not in self._stored]
        self._lingering: set[int] = set()
        self._frontier = 0
        self._hashing = False
        self._stopped = False
        self._open: dict[Reader, int] = {}  # reader → its bytes that are accounted for as chunks
        self._fetched = fetched
        self._stored_bytes = sum(self._length(index) for index in self._stored)
        self._sha256 = hashlib.sha256()
        self._algorithm, self._also = also, _hasher(also, ingest.size)

    def run(self) -> Pumped:
        """Fetch what is missing and hash everything. Blocks; raises the first lane's error after the others have stopped."""
        with ThreadPoolExecutor(self._lanes, thread_name_prefix="lane") as threads:
            lanes = [threads.submit(copy_context().run, self._lane) for _ in range(self._lanes)]  # what they log names the job as well
            done, _ = wait(lanes, return_when=FIRST_EXCEPTION)
            if any(lane.exception() for lane in done):
                self.stop()
        # All have ended: the one that failed by itself is the cause, also where a lane that it stopped was quicker to say so.
        failed = [error for lane in lanes if (error := lane.exception()) is not None]
        if failed:
            raise next((error for error in failed if not isinstance(error, Interrupted)), failed[0])
        if self._frontier < self._ingest.count:
            raise Interrupted(Code.CANCELLED, "cannot finish the file: the fetch was cancelled")
        chunks = b"".join(self._stored[index].to_bytes(8, "little") for index in range(self._ingest.count))
        return Pumped(self._sha256.hexdigest(), self._second(), chunks, self._fetched)

    def _second(self) -> Digest | None:
        return Digest(self._algorithm, self._also.hexdigest()) if self._algorithm and self._also else None

    def progress(self) -> tuple[int, int]:
        """Bytes of the file that are here, chunks under way included, and bytes fetched by this pump. Any thread may ask."""
        with self._changed:
            under_way = sum(max(0, reader.received - counted) for reader, counted in self._open.items())
            return min(self._ingest.size, self._stored_bytes + under_way), self._fetched + under_way

    def stop(self) -> None:
        """Make every lane stop promptly, also one whose source is stalled. Any thread may call it."""
        with self._changed:
            self._stopped = True
            readers = list(self._open)
            self._changed.notify_all()
        for reader in readers:
            reader.abort()

    def _lane(self) -> None:
        size = min(self._ingest.chunk_size, max(self._ingest.size, 1))
        with aligned_buffer(-(-size // BLOCK) * BLOCK) as memory, memoryview(memory) as buffer:
            reader: Reader | None = None
            try:
                while (claim := self._claim()) is not None:
                    index, stored = claim
                    if stored:
                        self._hash_from_disk(index, buffer)
                        continue
                    if reader is None:
                        reader = self._admit(self._readers())
                    self._fetch(reader, index, buffer)
            except NvcacheError:
                self.stop()
                raise
            finally:
                if reader is not None:
                    with self._changed:
                        del self._open[reader]
                    reader.close()

    def _admit(self, reader: Reader) -> Reader:
        with self._changed:
            self._open[reader] = 0
            stopped = self._stopped
        if stopped:
            reader.abort()
        return reader

    def _claim(self) -> tuple[int, bool] | None:
        """The next piece of work: (chunk, whether it is on the disk and only wants hashing). None when there is nothing left to do."""
        with self._changed:
            while not self._stopped and self._frontier < self._ingest.count:
                if self._frontier in self._stored and self._frontier not in self._lingering and not self._hashing:
                    self._hashing = True
                    return self._frontier, True
                if self._missing:
                    return heapq.heappop(self._missing), False
                self._changed.wait()  # bounded: every other lane's work is, and each ends in notify_all
            return None

    def _fetch(self, reader: Reader, index: int, buffer: memoryview) -> None:
        length = self._length(index)
        began = time.monotonic()
        with buffer[:length] as view:
            reader.read(index * self._ingest.chunk_size, view)
            digest = xxhash.xxh3_64_intdigest(view)
            took = time.monotonic() - began
            self._ingest.write(index, buffer, length, digest)
            self._open[reader] = reader.received
            if self._ingest.sync_due(time.monotonic()):
                self._ingest.sync()
            if self._reaches_frontier(index, digest, length, min(LINGER_MAX, max(LINGER_MIN, took))):
                self._hash(view)

    def _reaches_frontier(self, index: int, digest: int, length: int, linger: float) -> bool:
        """Mark `index` stored and wait up to `linger` seconds for the frontier; True makes this lane the one that hashes."""
        with self._changed:
            self._stored[index] = digest
            self._fetched += length
            self._stored_bytes += length
            self._lingering.add(index)
            self._changed.wait_for(lambda: self._stopped or (self._frontier == index and not self._hashing), linger)
            self._lingering.discard(index)
            mine = self._frontier == index and not self._hashing and not self._stopped
            self._hashing = self._hashing or mine
            self._changed.notify_all()
            return mine

    def _hash_from_disk(self, index: int, buffer: memoryview) -> None:
        with self._ingest.read(index, buffer) as view:
            if xxhash.xxh3_64_intdigest(view) == self._stored[index]:
                self._hash(view)
                return
        self._ingest.forget(index)
        with self._changed:
            del self._stored[index]
            self._stored_bytes -= self._length(index)
            heapq.heappush(self._missing, index)
            self._hashing = False
            self._changed.notify_all()

    def _hash(self, view: memoryview) -> None:
        """Feed the frontier. Only the lane that set `_hashing` is here, so the hash states need no lock; both updates release the GIL."""
        self._sha256.update(view)
        if self._also:
            self._also.update(view)
        with self._changed:
            self._frontier += 1
            self._hashing = False
            self._changed.notify_all()

    def _length(self, index: int) -> int:
        return min(self._ingest.chunk_size, self._ingest.size - index * self._ingest.chunk_size)


def _hasher(algorithm: Algorithm | None, size: int) -> hashlib._Hash | None:
    match algorithm:
        case Algorithm.GIT_SHA1:
            return hashlib.sha1(git_blob_header(size), usedforsecurity=False)
        case Algorithm.MD5:
            return hashlib.md5(usedforsecurity=False)
        case _:
            return None
