"""What the client makes of daemons that are absent, silent, broken or somebody else; over real sockets with canned bytes."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvcache import client
from nvcache.client import Client, Problem
from nvcache.client import transport as transport_module

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@contextmanager
def speaking(path: Path, *answers: bytes) -> Iterator[list[bytes]]:
    """A server on `path` that gives each caller the next answer, after reading one piece; it then stays silent until the caller goes."""
    seen: list[bytes] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    server.settimeout(10)

    def run() -> None:
        for answer in answers:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(10)
                seen.append(_request(connection))
                connection.sendall(answer)
                if answer:
                    connection.shutdown(socket.SHUT_WR)
                connection.recv(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        thread.join(10)
        server.close()


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data or (b"Content-Length" in data and not data.endswith(b"}")):
        data += connection.recv(65536)
    return data


def of(path: Path) -> Client:
    return Client(f"unix://{path}")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        of(tmp_path / "x.sock").request("GET", "/healthz")
    problem = caught.value
    assert (problem.code, problem.retryable) == ("daemon-unreachable", True)
    assert "No such file" in str(problem)
    assert "nvcache serve" in problem.hint
    assert client.Client(f"unix://{tmp_path}/x.sock").resolve("a/b", default="a/b") == "a/b"


def test_ensure_of_a_daemon_that_never_answers_ends_soon_and_names_the_socket(tmp_path: Path) -> None:
    for limits in ({"wait_daemon": 0.3}, {"wait_daemon": 0.3, "timeout": 60.0}, {"timeout": 0.3}, {"wait_daemon": 0.0}):
        began = time.monotonic()
        with pytest.raises(Problem) as caught:
            of(tmp_path / "x.sock").ensure("a/b", **limits)
        assert caught.value.code == "daemon-unreachable"
        assert str(tmp_path / "x.sock") in str(caught.value)
        assert "goes on" not in str(caught.value)
        assert time.monotonic() - began < 30


def test_ensure_of_what_takes_connections_and_never_answers_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.Client.request, "__kwdefaults__", {"timeout": 0.2})
    with speaking(tmp_path / "x.sock", b""), pytest.raises(Problem, match="does not answer") as caught:
        of(tmp_path / "x.sock").ensure("a/b", wait_daemon=0.0)
    assert caught.value.code == "daemon-unreachable"


def test_a_socket_that_one_may_not_use_has_its_own_hint(tmp_path: Path) -> None:
    group = tmp_path.stat().st_gid
    problem = of(tmp_path / "x.sock")._transport._unreachable(PermissionError(13, "Permission denied"))
    how = f"join the socket's group (gid {group}; a pod by `supplementalGroups: [{group}]`), or run as its owner"
    assert problem.hint == f"you may not connect: {how}"


def test_a_socket_that_is_not_there_is_told_from_one_that_nobody_listens_on(tmp_path: Path) -> None:
    nobody = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(nobody))
    for path, hint in (
        (tmp_path / "not" / "x.sock", f"{tmp_path}/not is not here: in a container mount the directory of the daemon's socket"),
        (tmp_path / "x.sock", "start one with `nvcache serve`"),
        (nobody, "the daemon that left this socket has ended"),
        (tmp_path, "that is no socket: name the daemon's with NVCACHE_SOCKET"),
    ):
        with pytest.raises(Problem) as caught:
            of(path).request("GET", "/healthz")
        assert caught.value.code == "daemon-unreachable"
        assert caught.value.hint.startswith(hint)


def test_a_dead_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "x.sock"))
    with pytest.raises(Problem, match="Connection refused"):
        of(tmp_path / "x.sock").request("GET", "/healthz")


def test_a_silent_daemon_costs_seconds_not_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with speaking(tmp_path / "x.sock", b""):
        began = time.monotonic()
        with pytest.raises(Problem) as caught:
            of(tmp_path / "x.sock").request("GET", "/healthz", timeout=0.2)
        assert caught.value.code == "timeout"
        assert time.monotonic() - began < 30
    assert transport_module.ANSWER_SECONDS <= 5


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        OK % (2, b"hi"),
        OK % (2, b"[]"),
        b"HTTP/1.1 200 OK\r\n",
        OK % (2, b"{}"),
        OK % (13, b'{"hello": "you"}'),
    ],
)
def test_what_is_no_answer_is_no_answer(tmp_path: Path, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with speaking(tmp_path / "x.sock", answer, answer):
        with pytest.raises(Problem) as caught:
            of(tmp_path / "x.sock").model("a/b")
        assert caught.value.code == "daemon-unreachable"
        with caplog.at_level(logging.WARNING, "nvcache.client"):
            assert of(tmp_path / "x.sock").resolve("a/b", "fallback") == "fallback"
    assert "a/b is not taken from the cache" in caplog.text


def test_a_problem_without_a_document_keeps_its_status(tmp_path: Path) -> None:
    with speaking(tmp_path / "x.sock", b"HTTP/1.1 503 x\r\nContent-Length: 2\r\n\r\n{}"), pytest.raises(Problem, match="HTTP status 503"):
        of(tmp_path / "x.sock").request("GET", "/healthz")


def test_a_wait_outlasts_a_daemon_that_restarts(tmp_path: Path) -> None:
    ready = b'{"entry": "e", "ref": "r", "state": "ready", "path": "/p", "job": null}'
    broken = b"HTTP/1.1 503 x\r\nContent-Length: 40\r\n\r\n" + b'{"code": "starting", "detail": "cannot"}'.ljust(40)
    with speaking(tmp_path / "x.sock", b"garbage\r\n", broken, OK % (len(ready), ready)) as seen:
        model = of(tmp_path / "x.sock").ensure("a/b", timeout=10, pin=True)
    assert (model.ready, model.path) == (True, "/p")
    assert len(seen) == 3
    assert b'{"ref": "a/b", "pin": true}' in seen[2]


def test_a_wait_that_is_over_says_so(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        of(tmp_path / "x.sock").ensure("a/b", timeout=0.2)
    assert caught.value.code in ("timeout", "daemon-unreachable")


@pytest.mark.parametrize("url", ["ftp://x", "unix://relative/path", "nvcache.sock", "http://", ""])
def test_urls_that_are_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCACHE_URL", "bogus")
    with pytest.raises(ValueError, match=r"neither unix:///path\.sock nor http://host:port"):
        Client(url)


def test_where_the_daemon_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVCACHE_URL", raising=False)
    monkeypatch.delenv("NVCACHE_SOCKET", raising=False)
    assert Client().url.endswith("/nvcache.sock")
    monkeypatch.setenv("NVCACHE_SOCKET", "/a/b.sock")
    assert Client().url == "unix:///a/b.sock"
    monkeypatch.setenv("NVCACHE_URL", "http://127.0.0.1:1")
    assert Client().url == "http://127.0.0.1:1"


def test_the_token_is_sent_over_tcp_and_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCACHE_TOKEN_FILE", str(tmp_path / "token"))
    over_tcp = transport_module.Transport("http://127.0.0.1:1")
    with pytest.raises(Problem, match="cannot read NVCACHE_TOKEN_FILE"):
        over_tcp.request("GET", "/healthz")
    (tmp_path / "token").write_text("secret\n")
    assert over_tcp._authorization() == {"Authorization": "Bearer secret"}
    assert transport_module.Transport("unix:///x.sock")._authorization() == {}
