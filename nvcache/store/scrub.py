"""Re-verification of a file, chunk by chunk, against recorded digests, or to take them. It repairs nothing and leaves the page cache as it was.

The disk is read, past the page cache (O_DIRECT). Where the file system cannot do that, pages in memory are taken as they are, for dropping them would
cost whoever has them mapped; the others are read from the disk and let go of again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from nvcache.core.manifest import CHUNK, DIGEST_BYTES
from nvcache.errors import SPENT
from nvcache.store.files import aligned_buffer, disk_errors, read_at, round_up, set_direct
from nvcache.store.pagecache import drop_others, in_memory, resident

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of chunks: the indices of the bad ones, and how many bytes of them were in the page cache just before and just after each was
    read; None where that cannot be told.
    """

    bad: list[int]
    cached: tuple[int, int] | None


def check_chunks(  # noqa: PLR0913 - it is handed all it needs: it keeps nothing and knows no store
    path: Path,
    size: int,
    digests: bytes,
    *,
    first: int = 0,
    chunk_size: int = CHUNK,
    buffer: memoryview,
    stop: Callable[[], bool],
    direct: bool = True,
    on_chunk: Callable[[int, OSError | None], None],
) -> Checked:
    """Compare chunks of `path`, from chunk `first` on, with the XXH3-64 in `digests` (8 bytes each, little endian); what cannot be read is bad.

    `buffer` is page-aligned and holds a chunk rounded up to a block. `on_chunk` is told the index of each chunk looked at, and why it could not be
    read if so; `stop` is asked before each, and a true answer ends the check with what was found so far. A missing file is bad as a whole. Raises
    `DiskError` when the file is there and cannot be opened, and when the machine is short of what it takes to read.
    """
    indices = range(first, first + len(digests) // DIGEST_BYTES)
    bad: list[int] = []
    with disk_errors(f"verify {path.name}"):
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return Checked(list(indices), None)
        with _reading(opened, direct) as reading:
            for index, at in zip(indices, range(0, len(digests), DIGEST_BYTES), strict=True):
                if stop():
                    break
                length = min(chunk_size, size - index * chunk_size)
                digest, failure = None, None
                try:
                    reading.read(index * chunk_size, buffer, length)
                    with buffer[:length] as piece:
                        digest = xxhash.xxh3_64_intdigest(piece)
                except OSError as error:
                    if errno.errorcode.get(error.errno or 0) in SPENT:
                        raise
                    log.warning("cannot read chunk %d of %s: %s", index, path, error.strerror)
                    failure = error
                if digest != int.from_bytes(digests[at : at + DIGEST_BYTES], "little"):
                    bad.append(index)
                on_chunk(index, failure)
            return Checked(bad, reading.cached)


def digest_blob(
    path: Path, size: int, *, chunk_size: int = CHUNK, stop: Callable[[], bool], direct: bool = True, on_chunk: Callable[[int], None]
) -> tuple[str, bytes] | None:
    """The SHA-256 in hex and the packed chunk digests of `path`; None when `stop`, asked before each chunk, said so.

    `on_chunk` is told the bytes read so far. Raises `DiskError`, also when the file is missing or shorter than `size`.
    """
    whole = hashlib.sha256()
    chunks: list[bytes] = []
    with (
        disk_errors(f"read {path.name}"),
        _reading(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), direct) as reading,
        aligned_buffer(round_up(min(chunk_size, max(size, 1)))) as memory,
        memoryview(memory) as buffer,
    ):
        for offset in range(0, size, chunk_size):
            if stop():
                return None
            length = min(chunk_size, size - offset)
            reading.read(offset, buffer, length)
            with buffer[:length] as piece:
                whole.update(piece)
                chunks.append(xxhash.xxh3_64_intdigest(piece).to_bytes(DIGEST_BYTES, "little"))
            on_chunk(offset + length)
    return whole.hexdigest(), b"".join(chunks)


class _Reading:
    """An open file that is read without a trace in the page cache. `cached` counts what was there before and after."""

    def __init__(self, fd: int, direct: bool) -> None:
        self._fd = fd
        self._direct = direct and set_direct(fd, True)
        self._counts: tuple[int, int] | None = (0, 0)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing beyond what is asked for

    @property
    def cached(self) -> tuple[int, int] | None:
        """Bytes in the page cache just before and just after each read, added up; None where that cannot be told."""
        return self._counts

    def read(self, offset: int, buffer: memoryview, length: int) -> None:
        """Fill `buffer` with `length` bytes from `offset`. Raises OSError."""
        before = self._resident(offset, length)
        try:
            read_at(self._fd, offset, buffer, length)
        finally:
            if before is not None and not self._direct:
                with suppress(OSError):
                    drop_others(self._fd, offset, before)
            after = self._resident(offset, length)
            if before is None or after is None or self._counts is None:
                self._counts = None
            else:
                self._counts = self._counts[0] + in_memory(before), self._counts[1] + in_memory(after)

    def _resident(self, offset: int, length: int) -> bytes | None:
        """What `resident` says. That it cannot (no memory for a mapping, a file system without any) says nothing about the bytes."""
        try:
            return resident(self._fd, offset, length)
        except (OSError, ValueError):  # ValueError: the file was cut short meanwhile
            return None


@contextmanager
def _reading(fd: int, direct: bool) -> Iterator[_Reading]:
    """The file for reading; `fd` is closed at the end."""
    try:
        yield _Reading(fd, direct)
    finally:
        os.close(fd)
