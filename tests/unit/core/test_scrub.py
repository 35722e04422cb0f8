"""Which model is read back next, and in which pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.manifest import DIGEST_BYTES, Check, File, Manifest
from nvcache.core.ref import EntryId, parse_ref
from nvcache.core.scrub import LEAD, PIECE, Reading, known_right, next_due, pieces

PERIOD, BANDWIDTH = 1000.0, 10
READINGS = st.lists(
    st.builds(Reading, st.integers(0, 20).map(lambda n: EntryId(f"m{n}", "c" * 40)), st.floats(0, 5000), st.integers(0, 400)), max_size=12
)


def test_without_models_nothing_is_due() -> None:
    assert next_due([], 0.0, PERIOD, BANDWIDTH) is None


@given(READINGS, st.floats(0, 5000))
def test_the_one_read_longest_ago_is_next_and_never_later_than_it_is_due(readings: list[Reading], now: float) -> None:
    due = next_due(readings, now, PERIOD, BANDWIDTH)
    if due is None:
        assert not readings
        return
    oldest = min(reading.last for reading in readings)
    assert min(reading.last for reading in readings if reading.entry == due[0]) == oldest
    assert due[1] <= min(oldest, now) + PERIOD


@given(READINGS)
def test_each_is_read_in_time_also_when_all_are_due_at_once(readings: list[Reading]) -> None:
    """One after the other at the bandwidth, as long as reading everything takes no more than half the period."""
    readings = list({reading.entry: replace(reading, last=0.0) for reading in readings}.values())
    if LEAD * sum(reading.size for reading in readings) / BANDWIDTH > PERIOD:
        return
    now, left = 0.0, readings
    while left:
        due = next_due(left + [replace(done, last=now) for done in readings if done not in left], now, PERIOD, BANDWIDTH)
        assert due is not None
        now = max(now, due[1]) + next(reading.size for reading in left if reading.entry == due[0]) / BANDWIDTH
        assert now <= PERIOD
        left = [reading for reading in left if reading.entry != due[0]]


def test_a_clock_that_was_set_back_puts_nothing_off_for_years() -> None:
    reading = Reading(EntryId("m", "c" * 40), 10.0**9, 1)
    due = next_due([reading], 0.0, PERIOD, BANDWIDTH)
    assert due is not None
    assert due[1] <= PERIOD


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [((None,), 0.0), (("nonsense",), 0.0), (("1970-01-01T00:01:00Z", None), 60.0), (("1970-01-01T00:01:00Z", "1970-01-01T00:02:00Z"), 120.0)],
)
def test_the_latest_time_counts_and_what_is_none_was_long_ago(stamps: tuple[str | None, ...], seconds: float) -> None:
    assert known_right(*stamps, now=1000.0) == seconds


def test_a_time_that_a_clock_far_ahead_wrote_tells_nothing() -> None:
    """Else a model would not be read before the clock is there, or for ever where it was read since."""
    assert known_right("2036-01-01T00:00:00Z", "1970-01-01T00:01:00Z", now=1000.0) == 60.0
    assert known_right("1970-01-01T00:30:00Z", now=1000.0) == 1800.0, "a little ahead is what clocks are"


@given(st.lists(st.integers(0, 3 * PIECE * 100), max_size=4))
def test_pieces_cover_every_chunk_of_every_blob_once_in_order(sizes: list[int]) -> None:
    chunk = 100
    files = [
        File(f"f{n}", size, f"{n:064x}", Check.FIRST_USE, chunks=bytes(i % 251 for i in range(-(-size // chunk) * DIGEST_BYTES)))
        for n, size in enumerate(sizes)
    ]
    files += [replace(file, path=f"again-{file.path}") for file in files[:1]]
    manifest = Manifest(parse_ref(f"hf://a/b@{'c' * 40}"), "hf://a/b", "", tuple(files), "", "", chunk_size=chunk)
    found = pieces(manifest)
    for file in files:
        mine = [piece for piece in found if piece.sha256 == file.sha256]
        assert b"".join(piece.chunks for piece in mine) == file.chunks
        assert sum(piece.length for piece in mine) == file.size
    at = 0
    for piece in found:
        assert piece.at == at
        at += piece.length
