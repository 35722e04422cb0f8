"""HTTP under Azure's SDK, against real sockets: answers are whole, on time and of bounded size, from servers that the settings trust."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests

from nvcache.sources.azure.bounded import BODY_LIMIT, session
from nvcache.sources.http import tls_context
from tests.support.serving import LoopbackServer
from tests.support.tls import Tls, make_tls

Serve = Callable[..., str]


DRIPS = {
    "/head": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
    "/continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "/length": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "/trailer": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """One behaviour a path."""
        match self.path:
            case "/whole":
                self._begin(5, b"whole")
            case "/chunked":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"3\r\nchu\r\n4\r\nnked\r\n0\r\n\r\n")
            case "/short":
                self._begin(50, b"short")
                self.close_connection = True
            case "/head" | "/continue" | "/length" | "/trailer":
                self._drip(*DRIPS[self.path])
            case "/trickle":
                self._begin(10_000, b"")
                try:
                    while True:
                        self.wfile.write(b".")
                        time.sleep(0.05)
                except OSError:
                    self.close_connection = True
            case _:
                self._begin(BODY_LIMIT + 2**20, b"")
                try:
                    while True:
                        self.wfile.write(bytes(2**20))
                except OSError:
                    self.close_connection = True

    def do_HEAD(self) -> None:
        """Headers of a body that does not come."""
        self._begin(5, b"")

    def _drip(self, first: bytes, drop: bytes) -> None:
        """An answer whose end does not come."""
        self.close_connection = True
        try:
            self.wfile.write(first)
            while True:
                self.wfile.write(drop)
                time.sleep(0.05)
        except OSError:
            return

    def _begin(self, length: int, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers; their URL."""
    servers = []

    def start(tls: Tls | None = None) -> str:
        server = LoopbackServer(("127.0.0.1", 0), _Handler, tls)
        server.start("bounded")
        servers.append(server)
        return f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def client() -> Iterator[requests.Session]:
    """A session that gives an answer one second."""
    with session(tls_context(None), None, 1.0) as made:
        yield made


@pytest.mark.parametrize("path", ["whole", "chunked"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_what_it_was(serve: Serve, client: requests.Session, path: str, stream: bool) -> None:
    """Read at once or as a stream, as the SDK does both, and over a connection that is used again."""
    url = serve()
    for _ in range(3):
        answer = client.get(f"{url}/{path}", timeout=5, stream=stream)
        assert b"".join(answer.iter_content(2)) == path.encode()
    assert client.head(f"{url}/whole", timeout=5).headers["Content-Length"] == "5"


@pytest.mark.parametrize("path", ["trickle", "head", "continue", "length", "trailer"])
def test_an_answer_that_trickles_ends(serve: Serve, client: requests.Session, path: str) -> None:
    """Each byte comes in time, the whole never would."""
    began = time.monotonic()
    with pytest.raises(requests.ReadTimeout):
        client.get(f"{serve()}/{path}", timeout=5)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(("path", "why"), [("short", "IncompleteRead"), ("endless", "longer than 64 MiB")])
def test_an_answer_that_is_not_whole(serve: Serve, client: requests.Session, path: str, why: str) -> None:
    """Cut off, or more than anybody has use for."""
    with pytest.raises(requests.ConnectionError, match=why):
        client.get(f"{serve()}/{path}", timeout=5)


def test_only_what_the_settings_name_is_trusted(serve: Serve, tmp_path: Path, client: requests.Session) -> None:
    """The given certificate alone: requests must not load its own bundle into the context that the readers share."""
    tls = make_tls(tmp_path)
    url = serve(tls)
    with pytest.raises(requests.exceptions.SSLError):
        client.get(f"{url}/whole", timeout=5)
    trusted = tls_context(str(tls.cert))
    with session(trusted, None, 1.0) as made:
        assert made.get(f"{url}/whole", timeout=5).content == b"whole"
    assert trusted.cert_store_stats()["x509"] == 1


def test_nothing_is_taken_from_the_environment(serve: Serve, client: requests.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a proxy nor a .netrc."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert client.get(f"{serve()}/whole", timeout=5).content == b"whole"
    with session(tls_context(None), "http://127.0.0.1:9", 1.0) as proxied, pytest.raises(requests.exceptions.ProxyError):
        proxied.get(f"{serve()}/whole", timeout=5)
