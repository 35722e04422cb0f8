"""The arithmetic of the bandwidth limit, with a clock of the test's own."""

import heapq
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.sources.pace import LEAST, SPAN_S, Pace

MB = 10**6
RATES = st.floats(10_000, 1e10)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def paced(rate):
    clock = Clock()
    return Pace(rate, now=clock), clock


def read(pace, clock, wants, *, readers):
    """Let `readers` read these pieces (idle seconds before it, bytes) as soon as they may, each in no time; when each came, and its size."""
    pieces, free = [], [clock.now] * readers
    for idle, want in wants:
        clock.now = max(clock.now, heapq.heappop(free)) + idle
        size, turn = pace.book(want)
        pieces.append((clock.now + pace.wait(turn), size))
        heapq.heappush(free, pieces[-1][0])
    return pieces


@given(RATES, st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.3, 60.0]), st.integers(1, 4 * MB)), min_size=1, max_size=80), st.integers(1, 8))
def test_no_stretch_of_time_brings_more_than_the_rate_and_one_span(rate, wants, readers):
    pieces = sorted(read(*paced(rate), wants, readers=readers))
    largest = max(size for _, size in pieces)
    for first, last in itertools.combinations(range(len(pieces)), 2):
        took, brought = pieces[last][0] - pieces[first][0], sum(size for _, size in pieces[first : last + 1])
        assert brought <= rate * (took + SPAN_S) * (1 + 1e-9) + largest + 1


@given(RATES, st.integers(20, 80), st.integers(1, 8))
def test_who_always_wants_more_gets_the_whole_rate(rate, count, readers):
    pace, clock = paced(rate)
    since = clock.now
    pieces = read(pace, clock, [(0.0, 4 * MB)] * count, readers=readers)
    took, brought = pieces[-1][0] - since, sum(size for _, size in pieces[:-1])
    assert took == pytest.approx(brought / rate, rel=1e-6, abs=1e-9)


@given(RATES, st.integers(1, 4 * MB))
def test_a_piece_takes_a_span_at_most(rate, want):
    pace, _ = paced(rate)
    size, _ = pace.book(want)
    assert 0 < size <= want
    assert size <= max(LEAST, rate * SPAN_S)


def test_turns_come_in_the_order_of_booking():
    pace, clock = paced(MB)
    turns = [pace.book(100_000)[1] for _ in range(5)]
    assert [pace.wait(turn) for turn in turns] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    clock.now += 0.25
    assert [pace.wait(turn) for turn in turns] == pytest.approx([0.0, 0.0, 0.0, 0.05, 0.15])


def test_no_limit_makes_nobody_wait():
    pace, _ = paced(None)
    assert pace.rate is None
    for _ in range(3):
        size, turn = pace.book(MB)
        assert (size, pace.wait(turn)) == (MB, 0.0)


def test_a_new_rate_counts_for_those_that_wait():
    pace, _ = paced(100_000)
    pace.book(25_000)
    _, turn = pace.book(25_000)
    assert pace.wait(turn) == pytest.approx(0.25)
    pace.set(50_000)
    assert pace.wait(turn) == pytest.approx(0.5)
    pace.set(1e9)
    assert pace.wait(turn) == pytest.approx(0.000025)
    pace.set(None)
    assert pace.wait(turn) == 0.0


def test_a_limit_that_comes_after_none_owes_nothing_for_what_was_read():
    pace, clock = paced(None)
    pace.book(10**12)
    clock.now += 1
    pace.set(MB)
    size, turn = pace.book(100_000)
    assert pace.wait(turn) == 0.0
    assert pace.wait(turn + size) == pytest.approx(0.1)


def test_an_idle_hour_is_made_up_for_by_one_span_only():
    pace, clock = paced(MB)
    clock.now += 3600
    turns = [pace.book(250_000)[1] for _ in range(3)]
    assert [pace.wait(turn) for turn in turns] == pytest.approx([0.0, 0.0, 0.25])


def test_what_is_given_back_brings_the_others_forward():
    pace, _ = paced(MB)
    pace.book(200_000)
    _, second = pace.book(200_000)
    _, third = pace.book(200_000)
    pace.give_back(200_000)
    assert pace.wait(second) == 0.0
    assert pace.wait(third) == pytest.approx(0.2)


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
def test_what_is_no_pace(rate):
    pace = Pace(MB)
    with pytest.raises(ValueError, match="no pace"):
        pace.set(rate)
    assert pace.rate == MB
