"""When which model is to be read back, so that each is once in a while, and how a model is read in pieces. It reads nothing and keeps no time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from nvcache.core.manifest import DIGEST_BYTES, Manifest
from nvcache.core.ref import EntryId

LEAD = 2  # times as early as reading everything takes: half the time is left for what comes in between
AHEAD = 86400.0  # seconds by which a clock may have been ahead for its times to mean something
PIECE = 4  # chunks that are read in one go


@dataclass(frozen=True, slots=True)
class Reading:
    """A model as the clock sees it: when all of it was last known to be right (unix seconds), and its bytes."""

    entry: EntryId
    last: float
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks of one blob that are read in one go. `at` is how many bytes of the model come before it; `length` its own."""

    sha256: str
    first: int
    chunks: bytes  # their digests, packed
    at: int
    length: int


def next_due(readings: Iterable[Reading], now: float, period: float, bandwidth: int) -> tuple[EntryId, float] | None:
    """The model that was read longest ago, and when to begin with it (unix seconds); None where there is none.

    All are begun so early that each is read within `period` seconds at `bandwidth` bytes a second, also when a day with many of them comes.
    """
    known = sorted(readings, key=lambda each: (each.last, str(each.entry)))
    if not known:
        return None
    lead = min(period, LEAD * sum(each.size for each in known) / bandwidth)
    return known[0].entry, min(known[0].last, now) + period - lead  # a clock that was set back must not put it off for years


def known_right(*stamps: str | None, now: float) -> float:
    """The latest of some RFC 3339 times in unix seconds; what is none counts as long ago, and so does one that a clock far ahead of `now` wrote."""
    found = [0.0]
    for stamp in stamps:
        with suppress(ValueError):
            found.append(datetime.fromisoformat(stamp or "").timestamp())
    return max(at for at in found if at <= now + AHEAD)


def pieces(manifest: Manifest) -> list[Piece]:
    """Every blob of a model in pieces, always in the same order."""
    found: list[Piece] = []
    at = 0
    for sha256, file in sorted({file.sha256: file for file in manifest.files}.items()):
        for first in range(0, len(file.chunks) // DIGEST_BYTES, PIECE):
            begin = first * manifest.chunk_size
            length = min(PIECE * manifest.chunk_size, file.size - begin)
            found.append(Piece(sha256, first, file.chunks[first * DIGEST_BYTES : (first + PIECE) * DIGEST_BYTES], at + begin, length))
        at += file.size
    return found
