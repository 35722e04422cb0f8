"""Server-sent events: snapshot first, then changes, coalesced; and every way in which a stream ends. Under the real server."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from nvcache.api import events
from nvcache.api.limits import Lifecycle, Limits
from nvcache.core.states import ModelState
from nvcache.engine.status import ErrorInfo, ModelStatus, Progress
from nvcache.engine.watch import Watcher
from nvcache.errors import Code, DiskError
from tests.api.harness import WAIT, Daemon, Hosted, UnixConnection

FETCHING = ModelStatus("hf--a--b@" + "1" * 40, "hf://a/b", "1" * 40, ModelState.FETCHING, 2, 100)


class Stage(Hosted):
    """Serves event streams whose queue the test fills."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._app)
        self.closed = 0
        self.connections: list[UnixConnection] = []

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for connection in self.connections:
            connection.close()

    async def _app(self) -> FastAPI:
        app = FastAPI()
        self.queue: Watcher = asyncio.Queue()
        lifecycle = app.state.lifecycle = Lifecycle()
        app.add_middleware(Limits, lifecycle=lifecycle)

        @app.get("/events")
        async def stream(request: Request) -> Response:
            stack = AsyncExitStack()
            stack.callback(self._count)
            return events.EventStream(request, self.queue, stack, lifecycle)

        return app

    def _count(self) -> None:
        self.closed += 1

    def put(self, *statuses: ModelStatus | ErrorInfo | None) -> None:
        """Let the engine say these, all at once."""
        for status in statuses:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, status)

    def open(self, **headers: str) -> HTTPResponse:
        """Connect to the stream."""
        connection = UnixConnection(self.socket)
        self.connections.append(connection)
        connection.request("GET", "/events", headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return response

    def wait_closed(self) -> None:
        """Until the subscription is given back."""

        async def until() -> None:
            async with asyncio.timeout(WAIT):
                while not self.closed:
                    await asyncio.sleep(0.01)

        self.call(until())


@pytest.fixture
def stage(place: Path) -> Iterator[Stage]:
    with Stage(place / "x.sock") as running:
        yield running


def next_event(response: HTTPResponse) -> dict[str, Any]:
    """The next block of the stream: its fields, or the comment under ':'; empty at the end."""
    fields: dict[str, Any] = {}
    for raw in response:
        line = raw.decode().rstrip("\n")
        if not line:
            return fields
        name, _, value = line.partition(":")
        fields[name or ":"] = json.loads(value) if name == "data" else value.strip()
    return fields


def test_a_problem_ends_the_stream(stage: Stage) -> None:
    stage.put(FETCHING)
    response = stage.open()
    next_event(response)
    next_event(response)
    stage.put(replace(FETCHING, state=ModelState.VERIFYING), ErrorInfo.of(DiskError(Code.NO_STRIPE, "cannot use the cache: it is away")))
    last = next_event(response)
    if last["event"] == "change":
        last = next_event(response)
    assert (last["event"], last["data"]["code"], last["data"]["retryable"]) == ("problem", "no-stripe", True)
    assert next_event(response) == {}
    stage.wait_closed()


def test_a_snapshot_comes_first_then_changes_until_ready(stage: Stage) -> None:
    stage.put(FETCHING)
    response = stage.open()
    assert next_event(response) == {"retry": "1000"}
    first = next_event(response)
    assert (first["event"], first["id"], first["data"]["state"]) == ("snapshot", "1", "fetching")
    stage.put(replace(FETCHING, state=ModelState.VERIFYING))
    second = next_event(response)
    assert (second["event"], second["id"], second["data"]["state"]) == ("change", "2", "verifying")
    stage.put(replace(FETCHING, state=ModelState.READY, path="/x"))
    last = next_event(response)
    assert (last["data"]["state"], last["data"]["path"]) == ("ready", "/x")
    assert next_event(response) == {}
    stage.wait_closed()


@pytest.mark.parametrize("state", [ModelState.READY, ModelState.FAILED, ModelState.ABSENT])
def test_a_stream_that_has_nothing_to_wait_for_ends_after_its_snapshot(stage: Stage, state: ModelState) -> None:
    stage.put(replace(FETCHING, state=state))
    response = stage.open()
    assert response.read().count(b"data: ") == 1


def test_ids_go_on_where_the_last_stream_ended(stage: Stage) -> None:
    stage.put(replace(FETCHING, state=ModelState.READY))
    assert b"id: 42\n" in stage.open(Last_Event_ID="41").read()
    for odd in ("x", "-1", "9" * 40, "\u0663".encode().decode("latin-1")):
        stage.put(replace(FETCHING, state=ModelState.READY))
        assert b"id: 1\n" in stage.open(Last_Event_ID=odd).read()


def test_many_changes_are_told_four_times_a_second_and_the_newest_wins(stage: Stage) -> None:
    stage.put(FETCHING)
    response = stage.open()
    next_event(response)
    next_event(response)
    began = time.monotonic()
    stage.put(*(replace(FETCHING, progress=Progress(1000, done)) for done in range(1000)))
    seen = []
    while not seen or seen[-1] != 999:
        seen.append(next_event(response)["data"]["progress"]["bytes_done"])
    assert seen == sorted(seen)
    assert len(seen) <= 1 + (time.monotonic() - began) / events.GAP_SECONDS
    stage.put(replace(FETCHING, state=ModelState.READY))
    assert next_event(response)["data"]["state"] == "ready"


def test_silence_is_filled_with_comments(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.05)
    stage.put(FETCHING)
    response = stage.open()
    assert [sorted(next_event(response)) for _ in range(4)] == [["retry"], ["data", "event", "id"], [":"], [":"]]
    stage.put(None)
    while next_event(response):
        pass


def test_a_dropped_subscription_ends_the_stream(stage: Stage) -> None:
    stage.put(FETCHING, None)
    assert stage.open().read().count(b"data: ") == 1
    stage.wait_closed()


def test_a_reader_that_goes_away_is_noticed(stage: Stage) -> None:
    stage.put(FETCHING)
    response = stage.open()
    next_event(response)
    next_event(response)
    stage.connections[0].close()
    response.close()
    stage.wait_closed()


def test_a_reader_that_does_not_read_is_dropped(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(events, "GAP_SECONDS", 0.0)
    with socket.socket(socket.AF_UNIX) as sleepy:
        sleepy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleepy.settimeout(WAIT)
        sleepy.connect(str(stage.socket))
        sleepy.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        large = replace(FETCHING, warnings=("x" * 500_000,))

        async def keep_talking() -> None:
            async with asyncio.timeout(WAIT):
                while not stage.closed:
                    stage.queue.put_nowait(large)
                    await asyncio.sleep(0.01)

        stage.call(keep_talking())
        with pytest.raises((ConnectionError, EOFError)):  # noqa: PT012 - what had arrived is read before the end shows
            while sleepy.recv(1 << 20):
                pass
            raise EOFError


def test_a_stopping_daemon_ends_streams_at_once(stage: Stage) -> None:
    stage.put(FETCHING)
    response = stage.open()
    next_event(response)
    next_event(response)
    began = time.monotonic()
    stage.loop.call_soon_threadsafe(stage.stop.set)
    assert next_event(response) == {}
    assert time.monotonic() - began < 9  # the next sign of life would come after ten
    stage.wait_closed()


def test_the_daemon_streams_a_ready_model_s_snapshot(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    answer = daemon.ask("GET", f"/v1/models/{entry}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert b'"state":"ready"' in answer.data


def test_an_unknown_model_has_no_events(daemon: Daemon) -> None:
    answer = daemon.ask("GET", f"/v1/models/{FETCHING.entry}/events")
    assert (answer.status, answer.code) == (404, "unknown-model")
