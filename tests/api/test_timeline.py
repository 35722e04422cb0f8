"""The story of a model over HTTP, and the stream of all models, as a real daemon gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from nvcache.api import events
from nvcache.core.timeline import ENDS
from tests.api.conftest import TOKEN, make_model
from tests.api.harness import Daemon, UnixConnection


def test_the_story_of_a_model_by_entry_and_by_slug(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    answer = daemon.ask("GET", f"/v1/models/{entry}/timeline")
    assert answer.status == 200
    kinds = [event["kind"] for event in answer.json["events"]]
    assert kinds[0] == "asked"
    assert kinds[-1] == "ready"
    assert answer.json["events"][0]["at"].endswith("Z")
    assert sum(event["slowest"] for event in answer.json["events"]) == 1
    assert daemon.ask("GET", f"/v1/models/{entry.partition('@')[0]}/timeline").json["events"] == answer.json["events"]
    assert daemon.ask("GET", f"/v1/models/{entry.partition('@')[0]}@{'0' * 64}/timeline").code == "unknown-model"
    assert daemon.ask("GET", "/v1/models/hf--nobody--nothing/timeline").code == "unknown-model"


def test_the_story_of_a_model_that_is_gone(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    daemon.ask("DELETE", f"/v1/models/{entry}")
    events = daemon.ask("GET", f"/v1/models/{entry}/timeline").json["events"]
    assert [event["kind"] for event in events][-1] == "removed"
    assert len([event for event in events if event["kind"] in ENDS]) == 1


def test_who_asked_and_who_holds_it_is_the_operators_business(guarded: Daemon, model: str) -> None:
    entry = guarded.ready(model)["entry"]
    guarded.ask("POST", f"/v1/models/{entry}/leases", {"holder": "team-a/vllm-0"})
    path = f"/v1/models/{entry}/timeline"
    told = {event["kind"]: event["who"] for event in guarded.admin("GET", path).json["events"]}
    assert told["leased"].endswith("/team-a/vllm-0")
    assert told["asked"].startswith("uid=")
    assert "team-a" not in guarded.ask("GET", path).data.decode()
    assert "uid=" not in guarded.ask("GET", path).data.decode()
    assert guarded.tcp("GET", path).code == "unauthorized"
    assert "team-a" not in guarded.tcp("GET", path, headers={"Authorization": f"Bearer {TOKEN}"}).data.decode()


@contextmanager
def stream(daemon: Daemon) -> Iterator[HTTPResponse]:
    connection = UnixConnection(daemon.socket)
    connection.request("GET", "/v1/events")
    response = connection.getresponse()
    assert response.status == 200
    try:
        yield response
    finally:
        response.close()
        connection.close()


def frames(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Every frame with data, as it comes."""
    fields: dict[str, Any] = {}
    for raw in response:
        line = raw.decode().rstrip("\n")
        name, _, value = line.partition(":")
        if name:
            fields[name] = json.loads(value) if name == "data" else value.strip()
        elif not line:
            if "data" in fields:
                yield fields
            fields = {}


def test_the_stream_of_all_models_tells_what_is_here_what_comes_and_what_goes(daemon: Daemon, model: str, place: Path) -> None:
    other = f"file://{make_model(place / 'origin' / 'other', fill=1)}"
    first = daemon.ready(model)["entry"]
    with stream(daemon) as response:
        told = frames(response)
        snapshot = next(told)
        assert (snapshot["event"], snapshot["data"]["entry"], snapshot["data"]["state"]) == ("snapshot", first, "ready")
        second = daemon.ready(other)["entry"]
        seen = [next(told)]
        while (seen[-1]["data"]["entry"], seen[-1]["data"]["state"]) != (second, "ready"):
            seen.append(next(told))
        daemon.ask("DELETE", f"/v1/models/{first}")
        while (seen[-1]["data"]["entry"], seen[-1]["data"]["state"]) != (first, "absent"):
            seen.append(next(told))
        assert {frame["event"] for frame in seen} == {"change"}
        ids = [int(frame["id"]) for frame in (snapshot, *seen)]
        assert ids == sorted(set(ids))


def test_a_snapshot_comes_in_parts_and_is_one_snapshot(daemon: Daemon, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PART", 2)
    entries = [daemon.ready(f"file://{make_model(place / 'origin' / str(number), fill=number)}")["entry"] for number in range(5)]
    with stream(daemon) as response:
        told = frames(response)
        here = [next(told) for _ in entries]
        assert [(frame["event"], frame["data"]["entry"]) for frame in here] == [("snapshot", entry) for entry in sorted(entries)]
        daemon.ask("PUT", f"/v1/models/{entries[0]}/pin")
        assert {frame["event"] for frame in takewhile(lambda frame: not frame["data"]["pinned"], told)} <= {"change"}


def test_the_stream_of_an_empty_node_waits_and_ends_with_the_daemon(daemon: Daemon, model: str) -> None:
    with stream(daemon) as response:
        told = frames(response)
        daemon.ready(model)
        assert next(told)["event"] == "change"
        daemon.loop.call_soon_threadsafe(daemon.stop.set)
        for _ in told:
            pass


def test_a_reader_that_is_slow_hears_how_it_is_not_how_it_was(daemon: Daemon, model: str) -> None:
    with stream(daemon) as response:
        entry = daemon.ready(model)["entry"]
        for pinned in [True, False] * 20 + [True]:
            daemon.ask("PUT" if pinned else "DELETE", f"/v1/models/{entry}/pin")
        seen = []
        for frame in frames(response):
            seen.append(frame)
            if frame["data"]["pinned"] and len(seen) > 1 and daemon.ask("GET", f"/v1/models/{entry}").json["pinned"]:
                break
        assert len(seen) < 41
