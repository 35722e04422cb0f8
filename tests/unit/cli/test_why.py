"""why against a scripted daemon: what it asks, and that it says in one sentence and marks in the table where the time went."""

from __future__ import annotations

import json

import pytest

from tests.support.stub_daemon import problem
from tests.unit.cli.conftest import ENTRY

SLUG = "hf--org--name"
HUB = "https://hub.example"


def event(second, kind, **given):
    base = dict.fromkeys(("seconds", "bytes", "count", "rate", "source", "code", "what", "who", "job", "revision"))
    return {**base, "at": f"2025-01-02T03:04:{second:02}.000Z", "kind": kind, "going": False, "slowest": False, "job": "2-b", **given}


START = [
    event(0, "asked", what="a pod or a person waits for it", who="uid=7/pid=8"),
    event(0, "resolved", seconds=0.2, source=HUB),
    event(1, "waited", seconds=3.0, what="free lanes: other fetches had them"),
    event(4, "fetched", seconds=16.0, bytes=32_000_000, rate=2e6, count=7, source=HUB, slowest=True),
    event(5, "retried", seconds=9.0, count=3, code="source-busy", source=HUB, what="cannot fetch x: it answers 503"),
    event(20, "ready", seconds=20.0, bytes=32_000_000),
]


def ask(stub, events, slug=SLUG):
    stub.answer(f"GET /v1/models/{slug}/timeline", {"entry": slug, "events": events})


def test_the_sentence_and_the_mark_answer_the_question(stub, run):
    ask(stub, [event(0, "removed", job=None), *START])
    ran = run("why", "org/name")
    assert ran.code == 0
    sentence, _, head, *rows = ran.out.splitlines()
    assert sentence == (f"ready after 20 s; 80% of it fetched 32.0 MB at 2.0 MB/s from {HUB}; 3 requests had to be made again (source-busy)")
    assert head.split() == ["TIME", "(UTC)", "EVENT", "TOOK", "SIZE", "RATE", "DETAILS"]
    assert [row.split()[2] for row in rows] == [each["kind"] for each in START]
    assert [row for row in rows if "slowest" in row] == [rows[3]]
    assert "by uid=7/pid=8" in rows[0]
    assert "source-busy, 3 times, cannot fetch x: it answers 503" in rows[4]


def test_all_and_json_show_everything(stub, run):
    events = [event(0, "removed", job="1-a"), *START, *(event(30, "leased", job=None, who=f"pod-{i}") for i in range(40))]
    ask(stub, events)
    few, everything = run("why", "org/name"), run("why", "--all", "org/name")
    assert "removed" not in few.out
    assert [row.rpartition("by ")[2].strip() for row in few.out.splitlines() if "leased" in row] == [f"pod-{i}" for i in range(28, 40)], "the newest"
    assert "28 events before the last 12 left out; --all shows everything" in few.err
    assert everything.out.count("leased") == 40
    assert "removed" in everything.out
    assert json.loads(run("why", "--json", "org/name").out)["events"] == events


def test_who_was_served_while_the_source_was_down_had_no_start(stub, run):
    down = [
        event(40, "asked", what="a pod or a person waits for it", job="3-c"),
        event(41, "failed", seconds=1.0, code="source-unreachable", what="cannot resolve it: no", job="3-c"),
        event(41, "hit", what="the revision resolved last: its source is down", job="3-c"),
    ]
    ask(stub, [*START, *down])
    sentence, _, _, *rows = run("why", "org/name").out.splitlines()
    assert sentence.startswith("ready after 20 s")
    assert [row.split()[2] for row in rows[-2:]] == ["failed", "hit"]
    ask(stub, down)
    assert run("why", "org/name").out.splitlines()[0].startswith("TIME"), "no start is told"


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (event(9, "failed", seconds=9.0, code="bad-token", what="cannot resolve it: no"), "failed after 9.0 s; cannot resolve it: no (bad-token)"),
        (event(9, "interrupted", seconds=9.0, code="stopping", what="cannot go on"), "interrupted after 9.0 s; cannot go on (stopping)"),
        (event(9, "cancelled", seconds=9.0), "cancelled after 9.0 s"),
    ],
)
def test_a_start_that_came_to_nothing(stub, run, end, sentence):
    ask(stub, [START[0], end])
    assert run("why", "org/name").out.splitlines()[0] == sentence


def test_a_start_that_still_goes_on(stub, run):
    ask(stub, [START[0], {**START[3], "going": True}])
    ran = run("why", "org/name")
    assert ran.out.startswith("under way for ")
    assert "fetched…" in ran.out


def test_without_a_start_there_is_only_the_table(stub, run):
    ask(stub, [event(1, "withdrawn", job=None, what="files of it are gone or short", code="degraded")])
    assert run("why", "org/name").out.splitlines()[1].endswith("degraded, files of it are gone or short")
    ask(stub, [])
    ran = run("why", "org/name")
    assert (ran.code, ran.out) == (0, "")
    assert "nothing is noted" in ran.err


def test_a_model_that_is_gone_is_asked_for_by_its_slug(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname%40main", (404, problem("unknown-model")))
    ask(stub, START)
    assert run("why", "org/name@main").code == 0
    assert stub.asked[-1].path == f"/v1/models/{SLUG}/timeline"


def test_one_that_nobody_knows_is_a_problem(stub, run):
    assert run("why", "org/other").code == run("show", "org/other").code != 0


def test_an_entry_is_asked_for_as_it_is_and_nothing_changes_the_terminal(stub, run):
    ask(stub, [event(0, "leased", who="\x1b[31mred\n")], ENTRY)
    ran = run("why", ENTRY)
    assert "\x1b" not in ran.out
    assert len(ran.out.splitlines()) == 2
