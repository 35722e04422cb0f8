"""The record format of an ingest's journal: which chunks are on the disk and their digests. Pure: bytes in, facts out; `store.ingest` does the I/O.

`store.journal`, version 1. Records of 24 bytes, little endian, appended and never changed in place::

    offset  size  header    chunk present    chunk withdrawn
    0       4     "nvJ1"    "good", "lent"   "gone"
    4       4     chunk     chunk index      chunk index
                  size
    8       8     file      XXH3-64 of       0
                  size      the chunk
    16      8     check: XXH3-64 of bytes 0-15, seeded with the XXH3-64 of the ingest's key (UTF-8)

"lent" is a chunk that came from somebody whom nobody vouches for: the first to be doubted when the whole file is not what it should be. Versions that
do not know it stop reading there, and fetch the rest again.

The first record is the header. A later record about a chunk replaces an earlier one. Reading stops at the first record that is short, of an unknown
kind, out of range or fails its check: it and everything after it count as never written. The seed ties a journal to its ingest: a record copied from
another one is refused. A record is a claim, not a proof: whoever resumes reads the chunk back and compares its XXH3-64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import xxhash

from nvcache.core.manifest import chunk_count

RECORD_BYTES = 24
_BODY = struct.Struct("<4sIQ")
_CHECK = struct.Struct("<Q")
_HEADER, _GOOD, _LENT, _GONE = b"nvJ1", b"good", b"lent", b"gone"


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says: the file's size and chunk size in bytes, chunk index → XXH3-64, and how many of its bytes are sound.

    `lent` are those of the chunks that nobody vouches for.
    """

    size: int
    chunk_size: int
    chunks: dict[int, int] = field(default_factory=dict)
    length: int = RECORD_BYTES
    lent: set[int] = field(default_factory=set)

    @property
    def kept(self) -> int:
        """The bytes of the file in the recorded chunks."""
        return sum(min(self.chunk_size, self.size - index * self.chunk_size) for index in self.chunks)


def header(key: str, size: int, chunk_size: int) -> bytes:
    """The first record of the journal of `key`: sizes in bytes."""
    return _record(key, _HEADER, chunk_size, size)


def good(key: str, index: int, digest: int, *, lent: bool = False) -> bytes:
    """Chunk `index` is written; `digest` is its XXH3-64. `lent`: nobody vouches for who brought it."""
    return _record(key, _LENT if lent else _GOOD, index, digest)


def gone(key: str, index: int) -> bytes:
    """Chunk `index` is not to be believed any more."""
    return _record(key, _GONE, index, 0)


def decode(key: str, data: bytes) -> Journal | None:
    """Read a journal up to its first unsound record; None when not even the header is sound."""
    seed = _seed(key)
    first = _read(seed, data, 0)
    if first is None or first[0] != _HEADER or first[1] == 0:
        return None
    _, chunk_size, size = first
    count = chunk_count(size, chunk_size)
    chunks: dict[int, int] = {}
    lent: set[int] = set()
    at = RECORD_BYTES
    while (record := _read(seed, data, at)) is not None:
        kind, index, digest = record
        if index >= count or kind not in (_GOOD, _LENT, _GONE):
            break
        lent.discard(index)
        if kind == _GONE:
            chunks.pop(index, None)
        else:
            chunks[index] = digest
        if kind == _LENT:
            lent.add(index)
        at += RECORD_BYTES
    return Journal(size, chunk_size, chunks, at, lent)


def _seed(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode())


def _record(key: str, kind: bytes, number: int, value: int) -> bytes:
    body = _BODY.pack(kind, number, value)
    return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body, _seed(key)))


def _read(seed: int, data: bytes, at: int) -> tuple[bytes, int, int] | None:
    body, check = data[at : at + _BODY.size], data[at + _BODY.size : at + RECORD_BYTES]
    if len(check) != _CHECK.size or _CHECK.unpack(check)[0] != xxhash.xxh3_64_intdigest(body, seed):
        return None
    kind, number, value = _BODY.unpack(body)
    return kind, number, value
