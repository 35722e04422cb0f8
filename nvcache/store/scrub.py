"""Re-verification of a file, chunk by chunk, against recorded digests, or to take them. It repairs nothing and leaves the page cache alone.

The disk is read, not the page cache: directly, else each chunk is dropped from the cache before and after it is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from nvcache.core.manifest import CHUNK, DIGEST_BYTES, chunk_count
from nvcache.store.files import aligned_buffer, disk_errors, read_at, round_up, set_direct

log = logging.getLogger(__name__)


def check_chunks(
    path: Path,
    size: int,
    digests: bytes,
    *,
    chunk_size: int = CHUNK,
    buffer: memoryview,
    stop: Callable[[], bool],
    direct: bool = True,
    on_chunk: Callable[[int], None],
) -> list[int]:
    """The indices of the chunks of `path` that cannot be read or have not the XXH3-64 in `digests` (8 bytes each, little endian).

    `buffer` is page-aligned and holds a chunk rounded up to a block. `on_chunk` is told the index of each chunk looked at; `stop` is asked before
    each, and a true answer ends the check with what was found so far. A missing file is bad as a whole. Raises `DiskError` when the file is there
    and cannot be opened.
    """
    count = chunk_count(size, chunk_size)
    bad: list[int] = []
    with disk_errors(f"verify {path.name}"):
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return list(range(count))
        with _reading(opened, direct) as read:
            for index in range(count):
                if stop():
                    break
                length = min(chunk_size, size - index * chunk_size)
                digest = None
                try:
                    read(index * chunk_size, buffer, length)
                    with buffer[:length] as piece:
                        digest = xxhash.xxh3_64_intdigest(piece)
                except OSError as error:
                    log.warning("cannot read chunk %d of %s: %s", index, path, error.strerror)
                if digest != int.from_bytes(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES], "little"):
                    bad.append(index)
                on_chunk(index)
    return bad


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
        _reading(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), direct) as read,
        aligned_buffer(round_up(min(chunk_size, max(size, 1)))) as memory,
        memoryview(memory) as buffer,
    ):
        for offset in range(0, size, chunk_size):
            if stop():
                return None
            length = min(chunk_size, size - offset)
            read(offset, buffer, length)
            with buffer[:length] as piece:
                whole.update(piece)
                chunks.append(xxhash.xxh3_64_intdigest(piece).to_bytes(DIGEST_BYTES, "little"))
            on_chunk(offset + length)
    return whole.hexdigest(), b"".join(chunks)


@contextmanager
def _reading(fd: int, direct: bool) -> Iterator[Callable[[int, memoryview, int], None]]:
    """A function that reads from the disk at an offset into a buffer; `fd` is closed at the end."""

    def read(offset: int, buffer: memoryview, length: int) -> None:
        if around_cache:
            read_at(fd, offset, buffer, length)
            return
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        try:
            read_at(fd, offset, buffer, length)
        finally:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    try:
        around_cache = direct and set_direct(fd, True)
        yield read
    finally:
        os.close(fd)
