"""Requests are bounded in size and time, their errors are problem documents, and defects keep their trace to the log. Under the real server."""

from __future__ import annotations

import asyncio
import http.client
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from nvcache.api import limits, serve
from nvcache.api.limits import Lifecycle, Limits, extend
from nvcache.settings import Settings
from tests.api.harness import WAIT, Daemon, Hosted, UnixConnection


def bounded_app(lifecycle: Lifecycle) -> FastAPI:
    app = FastAPI()
    app.state.lifecycle = lifecycle
    app.add_middleware(Limits, lifecycle=lifecycle)

    @app.get("/stuck")
    async def stuck() -> Response:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    @app.get("/patient")
    async def patient(request: Request) -> Response:
        extend(request, None)
        await asyncio.sleep(3 * limits.REQUEST_SECONDS)
        return Response("done")

    return app


@pytest.fixture
def hosted(place: Path) -> Iterator[Hosted]:
    async def build() -> FastAPI:
        return bounded_app(Lifecycle())

    with Hosted(place / "x.sock", build) as running:
        yield running


def test_a_request_that_takes_too_long_is_answered(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS", 0.1)
    answer = hosted.ask("GET", "/stuck")
    assert (answer.status, answer.code) == (504, "timeout")
    assert hosted.ask("GET", "/patient").data == b"done"


def test_stopping_ends_a_stuck_request_soon(place: Path) -> None:
    async def build() -> FastAPI:
        return bounded_app(Lifecycle())

    with Hosted(place / "x.sock", build) as running:
        connection = UnixConnection(running.socket)
        connection.request("GET", "/stuck")
        began = time.monotonic()
        running.loop.call_soon_threadsafe(running.stop.set)
        response = connection.getresponse()
        assert response.status == 503
        assert b"urn:nvcache:error:stopping" in response.read()
        connection.close()
    assert time.monotonic() - began < 5


def test_a_body_over_the_limit_is_refused(daemon: Daemon) -> None:
    body = b'{"ref": "' + b"a" * limits.BODY_BYTES + b'"}'
    answer = daemon.ask("POST", "/v1/models", body)
    assert (answer.status, answer.code) == (413, "bad-request")


def test_a_chunked_body_over_the_limit_is_refused(daemon: Daemon) -> None:
    connection = UnixConnection(daemon.socket)
    connection.request("POST", "/v1/models", (b" " * 8192 for _ in range(16)), {"Content-Type": "application/json"}, encode_chunked=True)
    with connection.getresponse() as response:
        assert response.status == 413
    connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"ref": 7}',
        b'{"ref": "a/b", "pin": "yes"}',
        b'{"ref": "a/b", "nope": 1}',
        b"[" * 60000,
        b'{"ref": "\\ud800"}',
    ],
)
def test_a_malformed_body_is_bad_request(daemon: Daemon, body: bytes) -> None:
    answer = daemon.ask("POST", "/v1/models", body)
    assert (answer.status, answer.code) == (422, "bad-request")


def test_a_body_that_is_not_json_by_its_type_is_refused(daemon: Daemon) -> None:
    assert daemon.ask("POST", "/v1/models", b'{"ref": "a/b"}', {"Content-Type": "text/plain"}).code == "bad-request"


def test_a_head_over_the_limit_is_refused(daemon: Daemon) -> None:
    answer = daemon.ask("GET", "/healthz", headers={f"X-{n}": "v" * 4000 for n in range(9)})
    assert answer.status == 400
    assert daemon.ask("GET", "/healthz?" + "q" * serve.HEAD_BYTES).status == 400


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
def test_a_caller_who_never_finishes_asking_is_dropped(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.settimeout(5)
        slow.connect(str(daemon.socket))
        slow.sendall(begun)
        with suppress(ConnectionResetError):  # dropped with what it sent unread
            assert slow.recv(100) == b""


def test_unknown_paths_and_methods_are_problems(daemon: Daemon) -> None:
    assert (daemon.ask("GET", "/v2/models").status, daemon.ask("GET", "/v2/models").code) == (404, "bad-request")
    wrong = daemon.ask("PATCH", "/v1/models")
    assert (wrong.status, wrong.code, wrong.headers["allow"]) == (405, "bad-request", "GET, POST")
    assert daemon.ask("POST", "/v1/models/x/pin").headers["allow"] == "DELETE, PUT"


def test_a_defect_is_told_without_its_trace(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("hidden detail")

    monkeypatch.setattr(daemon.engine, "space", broken)
    with caplog.at_level(logging.ERROR):
        answer = daemon.ask("GET", "/v1/space")
        assert (answer.status, answer.code) == (500, "internal")
        assert daemon.ask("GET", "/healthz").status == 200  # answered after the log was written
    assert b"hidden" not in answer.data
    assert "ZeroDivisionError: hidden detail" in caplog.text


def test_one_connection_serves_many_requests(daemon: Daemon) -> None:
    connection = UnixConnection(daemon.socket)
    for _ in range(3):
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{"status":"ok"}')
    assert isinstance(connection, http.client.HTTPConnection)
    connection.close()


def test_whoever_opens_too_many_connections_loses_the_oldest_and_nobody_else_does(
    settings_of: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port for probes asks for no token: a flood there must not take the descriptors that the store and the sockets need."""
    monkeypatch.setattr(serve, "CONNECTIONS", 8)
    with Daemon(settings_of(listen="127.0.0.1:0", listen_scope="metrics")) as daemon, ExitStack() as stack:
        pod = UnixConnection(daemon.socket)
        stack.callback(pod.close)
        pod.connect()
        address = daemon.listeners[-1].sock.getsockname()
        flood = [stack.enter_context(closing(socket.create_connection(address, WAIT))) for _ in range(20)]
        for dropped in flood[:12]:
            dropped.settimeout(WAIT)
            with suppress(ConnectionResetError):
                assert dropped.recv(1) == b""
        assert daemon.tcp("GET", "/healthz").status == 200, "a probe still gets through"
        flood[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert flood[-1].recv(15) == b"HTTP/1.1 200 OK"
        pod.request("GET", "/v1/models")
        assert pod.getresponse().status == 200


def test_the_connections_of_one_way_are_a_part_of_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((256, 32), (20_000, 1024), (resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda _which, soft=soft: (soft, soft))
        assert serve._most_connections() == most
