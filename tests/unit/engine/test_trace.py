"""Where a fill's time goes, on a clock of the test's own: every moment belongs to one phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nvcache.core.states import JobState
from nvcache.core.timeline import PHASES, Event, Kind
from nvcache.engine import clock
from nvcache.engine.trace import Trace
from nvcache.errors import Code, Interrupted, SourceError

HUB = "https://hub.example"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock, "unix", lambda: now[0] + 1e9)

    def add(seconds: float) -> None:
        now[0] += seconds

    return add


def told(events: list[Event]) -> list[tuple[Kind, float | None]]:
    return [(event.kind, event.seconds) for event in events]


def test_a_moment_belongs_to_the_fetch_as_long_as_one_file_is_under_way(passes: Callable[[float], None]) -> None:
    events: list[Event] = []
    trace = Trace(events.append)
    with trace.fetching() as fetching, fetching.file(HUB, "one") as one, fetching.file(HUB, "two") as two:
        passes(3)  # both wait for lanes
        one.runs(True)
        passes(5)
        two.runs(True)
        passes(2)
        assert told(trace.going()) == [(Kind.WAITED, 3.0), (Kind.FETCHED, 7.0)]
        assert all(event.going for event in trace.going())
        one.runs(False)  # it makes way
        passes(1)
        two.runs(False)
        passes(4)  # both wait again
        one.runs(True)
        one.came(10, whole=True)
        passes(1)
    assert told(events) == [(Kind.WAITED, 7.0), (Kind.FETCHED, 9.0)]
    assert events[1].at == 1e9 + 1003
    assert (events[1].bytes, events[1].count, events[1].source) == (10, 1, HUB)
    assert trace.going() == []


def test_sources_proofs_shared_files_and_pauses_are_told_apart(passes: Callable[[float], None]) -> None:
    events: list[Event] = []
    with Trace(events.append).fetching() as fetching:
        fetching.reused(100)
        fetching.reused(200)
        with fetching.blocked():
            passes(2)
        with fetching.file("mirror near", "a") as near:
            near.runs(True)
            passes(3)
            near.trouble("source-stalled", 4.0, "first")
            near.trouble("source-stalled", 1.5, "last")
        with fetching.file(None, "b") as proof:
            proof.runs(True)
            passes(1)
            proof.came(7, whole=True)
    by_kind: dict[Kind, Any] = {event.kind: event for event in events}
    assert (by_kind[Kind.REUSED].bytes, by_kind[Kind.REUSED].count, by_kind[Kind.REUSED].seconds) == (300, 2, None)
    assert by_kind[Kind.WAITED].seconds == 2.0
    assert "another fill" in by_kind[Kind.WAITED].what
    assert (by_kind[Kind.FETCHED].source, by_kind[Kind.FETCHED].seconds) == ("mirror near", 3.0)
    assert (by_kind[Kind.PROVEN].seconds, by_kind[Kind.PROVEN].bytes) == (1.0, 7)
    retried = by_kind[Kind.RETRIED]
    assert (retried.count, retried.seconds, retried.code, retried.what) == (2, 5.5, "source-stalled", "last")
    assert sum(event.seconds for event in events if event.kind in PHASES) == 6.0


def test_a_phase_that_fails_is_told_and_a_short_one_is_not(passes: Callable[[float], None]) -> None:
    events: list[Event] = []
    trace = Trace(events.append)
    with pytest.raises(SourceError), trace.phase(Kind.LISTED) as facts:  # noqa: PT012 - what goes on is what is told
        facts["count"] = 3
        passes(30)
        assert told(trace.going()) == [(Kind.LISTED, 30.0)]
        raise SourceError(Code.SOURCE_STALLED, "cannot list: nothing came")
    with trace.phase(Kind.WAITED, least=0.05):
        passes(0.04)
    assert told(events) == [(Kind.LISTED, 30.0)]
    assert events[0].count == 3


@pytest.mark.parametrize(
    ("state", "error", "cancelled", "kind"),
    [
        (JobState.DONE, None, False, Kind.READY),
        (JobState.FAILED, SourceError(Code.SOURCE_BUSY, "cannot: busy"), False, Kind.FAILED),
        (JobState.FAILED, Interrupted(Code.NO_STRIPE, "cannot: away"), False, Kind.INTERRUPTED),
        (JobState.CANCELLED, Interrupted(Code.CANCELLED, "cannot: cancelled"), True, Kind.CANCELLED),
        (JobState.CANCELLED, Interrupted(Code.CANCELLED, "cannot: cancelled"), False, Kind.INTERRUPTED),
    ],
)
def test_how_a_job_ends(state: JobState, error: Any, cancelled: bool, kind: Kind) -> None:
    events: list[Event] = []
    Trace(events.append).ended(state, error, good=Kind.READY, cancelled=cancelled, seconds=2.0)
    assert [(event.kind, event.code) for event in events] == [(kind, str(error.code) if error else None)]


@pytest.mark.parametrize(
    ("seconds", "state", "told_as"), [(0.5, JobState.DONE, "hit"), (5.0, JobState.DONE, "start"), (0.5, JobState.FAILED, "start")]
)
def test_a_job_that_found_the_model_ready_at_once_is_a_hit(seconds: float, state: JobState, told_as: str) -> None:
    events: list[Event] = []
    hits: list[str | None] = []
    trace = Trace(events.append, hits.append)
    trace.happened(Kind.ASKED, who="pod")
    with trace.phase(Kind.RESOLVED):
        pass
    assert events == []
    assert [event.kind for event in trace.going()] == [Kind.ASKED, Kind.RESOLVED]
    error = None if state is JobState.DONE else SourceError(Code.GATED, "cannot: gated")
    trace.ended(state, error, good=Kind.READY, cancelled=False, seconds=seconds)
    assert (hits, len(events)) == ((["pod"], 0) if told_as == "hit" else ([], 3))
    assert trace.going() == []


def test_joiners_are_named_up_to_a_number() -> None:
    events: list[Event] = []
    trace = Trace(events.append)
    for number in range(100):
        trace.joined(str(number))
    assert [event.who for event in events] == ["0", "1", "2", "3", "4"]
