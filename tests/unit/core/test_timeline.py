"""Events of a timeline: what is written is read back, whatever is cut short or added; folding and trimming keep what matters."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from nvcache.core.timeline import (
    ENDS,
    LIMIT,
    MINOR,
    PHASES,
    Event,
    Kind,
    fold,
    of_revision,
    parse,
    slowest,
    to_bytes,
    to_dict,
    to_line,
    trim,
    with_starts,
)

MOMENTS = st.integers(0, 10**9).map(lambda number: number / 1000)
WORDS = st.none() | st.text(st.characters(codec="utf-8"), max_size=50)
EVENTS = st.builds(
    Event,
    at=MOMENTS,
    kind=st.sampled_from(Kind),
    seconds=st.none() | MOMENTS,
    bytes=st.none() | st.integers(0, 2**62),
    count=st.none() | st.integers(0, 10**6),
    source=WORDS,
    code=WORDS,
    what=WORDS,
    who=WORDS,
    job=st.none() | st.sampled_from(["1-a", "2-b", "3-c", "4-d"]),
    revision=WORDS,
)


def in_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.at)


@given(st.lists(EVENTS))
def test_what_is_written_is_read_back(events: list[Event]) -> None:
    assert parse(to_bytes(events)) == in_order(events)
    assert all(line.startswith(b"\n") and line.count(b"\n") == 1 for line in map(to_line, events))


@given(st.lists(EVENTS, min_size=1), st.data())
def test_a_torn_last_line_costs_that_line_only(events: list[Event], data: st.DataObject) -> None:
    last = to_line(events[-1])
    torn = to_bytes(events[:-1]) + last[: data.draw(st.integers(0, len(last) - 1))]
    assert parse(torn) == in_order(events[:-1])
    assert parse(torn + to_line(events[-1])) == in_order(events)


@settings(deadline=None)  # the first of such a value takes long to make
@given(st.binary() | st.text().map(str.encode) | st.recursive(st.none() | st.integers(), st.lists).map(lambda value: json.dumps(value).encode()))
def test_garbage_is_passed_over(garbage: bytes) -> None:
    event = Event(5.0, Kind.READY, 1.5)
    assert event in parse(to_line(event) + b"\n" + garbage + to_line(event))


@given(
    EVENTS,
    st.sampled_from(["at", "kind", "seconds", "bytes", "count", "what", "job"]),
    st.sampled_from([True, [], {}, -1, float("nan"), float("inf")]),
)
def test_a_field_of_another_type_is_no_event(event: Event, field: str, value: object) -> None:
    line = json.dumps({**to_dict(event), field: value}).encode()
    assert parse(line) == []


def test_a_kind_of_a_later_version_is_passed_over() -> None:
    assert parse(b'\n{"at": 1, "kind": "teleported"}\n{"at": 2, "kind": "ready", "new": {}}') == [Event(2.0, Kind.READY)]
    assert parse(b"[" * 100_000) == []


@given(st.lists(EVENTS, max_size=40), st.integers(0, 4000))
def test_trimming_fits_and_keeps_the_newest(events: list[Event], limit: int) -> None:
    events = in_order(events)
    kept = trim(events, limit)
    assert len(to_bytes(kept)) <= limit
    folded = fold(events)
    rest = iter(folded)
    assert all(event in rest for event in kept), "nothing is made up, and the order is the same"
    major, wanted = ([event for event in each if event.kind not in MINOR] for each in (kept, folded))
    assert major == wanted[len(wanted) - len(major) :]


def test_pods_that_come_and_go_do_not_push_out_the_fill() -> None:
    fill = [Event(1.0, Kind.ASKED, job="1"), Event(2.0, Kind.FETCHED, 3.0, 10, job="1"), Event(5.0, Kind.READY, 4.0, job="1")]
    pods = [Event(10.0 + i, Kind.LEASED if i % 2 else Kind.RELEASED, who=f"pod-{i}") for i in range(5000)]
    kept = trim(fill + pods, LIMIT // 2)
    assert kept[:3] == fill
    assert kept[-1] == pods[-1]
    assert LIMIT // 16 < len(to_bytes(kept)) <= LIMIT // 2


def failing(job: str, at: float, code: str = "source-unreachable", count: int | None = None) -> list[Event]:
    return [Event(at, Kind.ASKED, job=job), Event(at + 1, Kind.FAILED, 1.0, code=code, count=count, job=job)]


def test_tries_that_fail_alike_are_told_as_the_first_and_the_last() -> None:
    tries = [event for i in range(10) for event in failing(str(i), 10.0 * i)]
    folded = fold(tries)
    assert [(event.job, event.count) for event in folded] == [("0", None), ("0", None), ("9", None), ("9", 9)]
    again = fold([*folded, *failing("10", 200.0)])
    assert [(event.job, event.count) for event in again if event.kind is Kind.FAILED] == [("0", None), ("10", 10)]
    other = fold([*folded, *failing("11", 300.0, "bad-token")])
    assert [(event.job, event.count) for event in other if event.kind is Kind.FAILED] == [("0", None), ("9", 9), ("11", None)]


@given(st.lists(EVENTS, max_size=40))
def test_folding_twice_is_folding_once(events: list[Event]) -> None:
    once = fold(in_order(events))
    assert fold(once) == once


def test_a_hit_of_a_job_is_told_apart() -> None:
    hits = [Event(1.0, Kind.HIT, job="1-a"), Event(2.0, Kind.HIT), Event(3.0, Kind.HIT)]
    assert fold(hits) == [hits[0], Event(3.0, Kind.HIT, count=2)]


def test_hits_in_a_row_are_one() -> None:
    hits = [Event(float(i), Kind.HIT) for i in range(5)]
    assert fold([*hits, Event(9.0, Kind.LEASED), hits[0]]) == [Event(4.0, Kind.HIT, count=5), Event(9.0, Kind.LEASED), hits[0]]


def test_the_slowest_phase_of_every_job() -> None:
    one = [Event(1.0, Kind.RESOLVED, 1.0, job="1"), Event(2.0, Kind.WAITED, 7.0, job="1"), Event(9.0, Kind.FETCHED, 2.0, job="1")]
    retried = Event(9.0, Kind.RETRIED, 90.0, job="1")  # part of the fetch
    ready = Event(11.0, Kind.READY, 10.0, job="1")
    lonely = Event(20.0, Kind.READ, 5.0, job="2")
    assert slowest([*one, retried, ready, lonely]) == [one[1]]
    assert not PHASES & (ENDS | MINOR)


def test_a_revision_s_own_events_and_those_of_tries_that_never_found_out() -> None:
    unknown = failing("1", 1.0)
    mine = [Event(10.0, Kind.ASKED, job="2"), Event(11.0, Kind.READY, job="2", revision="abcdef0"), Event(12.0, Kind.HIT, revision="abcdef0")]
    others = [Event(20.0, Kind.ASKED, job="3"), Event(21.0, Kind.READY, job="3", revision="1234567")]
    assert of_revision([*unknown, *mine, *others], "abcdef0") == [*unknown, *mine]
    assert of_revision([*unknown, *mine, *others], "1234") == [*unknown, *others]


def test_starts_of_the_daemon_stand_where_they_interrupt_the_story() -> None:
    story = [Event(10.0, Kind.ASKED), Event(20.0, Kind.READY)]
    starts = [Event(at, Kind.STARTED) for at in (1.0, 11.0, 12.0, 30.0, 31.0)]
    assert [event.at for event in with_starts(story, starts)] == [10.0, 12.0, 20.0, 31.0]
    assert with_starts([], starts) == []
