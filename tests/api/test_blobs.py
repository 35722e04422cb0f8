"""GET and HEAD /v1/blobs/{sha256}: bytes of ready models for other nodes, and for nobody else."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvcache.api.serve import Connection
from nvcache.engine import share
from nvcache.settings import Settings
from tests.api.conftest import TOKEN, make_model
from tests.api.harness import WAIT, Daemon, UnixConnection, ask
from tests.engine.conftest import weights

BEARER = {"Authorization": f"Bearer {TOKEN}"}
SIZE = 30_000_000


@pytest.fixture
def sharing(settings_of: Callable[..., Settings], place: Path) -> Iterator[Daemon]:
    """A daemon that shares, with a large model."""
    (place / "token").write_text(TOKEN)
    settings = settings_of(admin_socket=place / "s" / "admin.sock", listen="127.0.0.1:0", listen_token_file=place / "token", share_blobs=True)
    (place / "origin").mkdir()
    with Daemon(settings) as running:
        yield running


@pytest.fixture
def content(sharing: Daemon, place: Path) -> bytes:
    """The bytes of a blob of a ready model."""
    make_model(place / "origin" / "m")
    data = weights(3, SIZE)
    (place / "origin" / "m" / "model.safetensors").write_bytes(data)
    done = sharing.admin("POST", "/v1/models", {"ref": f"file://{place}/origin/m"})
    assert done.status == 202
    sharing._follow(done.json["job"]["id"])
    return data


def path_of(data: bytes) -> str:
    return f"/v1/blobs/{hashlib.sha256(data).hexdigest()}"


def test_the_whole_and_what_is_said_of_it(sharing: Daemon, content: bytes) -> None:
    """The bytes, an ETag that is the digest, and nothing that tells where they lie or what they are called."""
    got = sharing.tcp("GET", path_of(content), headers=BEARER)
    assert (got.status, got.data) == (200, content)
    assert got.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["accept-ranges"] == "bytes"
    assert "immutable" in got.headers["cache-control"]
    assert not [value for value in got.headers.values() if "store" in value or "safetensors" in value]


def test_head_tells_without_sending(sharing: Daemon, content: bytes) -> None:
    """Range means nothing to a HEAD (RFC 9110 §14.2)."""
    got = sharing.tcp("HEAD", path_of(content), headers={**BEARER, "Range": "bytes=0-9"})
    assert (got.status, got.data, got.headers["content-length"]) == (200, b"", str(len(content)))


def test_ranges_over_one_connection(sharing: Daemon, content: bytes) -> None:
    """Answers follow each other on a connection, pieces of a blob and other calls mixed."""
    host, port = sharing.listeners[-1].sock.getsockname()[:2]
    connection = http.client.HTTPConnection(host, port, timeout=WAIT)
    for start, stop in [(0, 1), (5, 20_000_000), (len(content) - 3, len(content)), (7, 7_000_007)] * 3:
        connection.request("GET", path_of(content), headers={**BEARER, "Range": f"bytes={start}-{stop - 1}"})
        with connection.getresponse() as answer:
            assert (answer.status, answer.read()) == (206, content[start:stop])
            assert answer.getheader("Content-Range") == f"bytes {start}-{stop - 1}/{len(content)}"
        connection.request("GET", "/healthz")
        with connection.getresponse() as answer:
            assert answer.status == 200
            answer.read()
    assert sharing.listeners
    connection.close()


def test_pipelined_answers_come_in_order(sharing: Daemon, content: bytes) -> None:
    """What was written before is on its way before the bytes are handed over."""
    host, port = sharing.listeners[-1].sock.getsockname()[:2]
    lines = f"GET {path_of(content)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nRange: bytes=%d-%d\r\n\r\n"
    with socket.create_connection((host, port), timeout=WAIT) as sock:
        sock.sendall(b"".join((lines % span).encode() for span in [(0, 999_999), (1_000_000, 1_999_999), (2_000_000, 2_999_999)]))
        got = bytearray()
        while got.count(b"HTTP/1.1 206") < 3 or len(got) < 3_000_000:
            piece = sock.recv(2**20)
            assert piece, "the connection ended"
            got += piece
    bodies = bytes(got).split(b"HTTP/1.1 206")[1:]
    assert b"".join(body.partition(b"\r\n\r\n")[2] for body in bodies) == content[:3_000_000]


def test_the_bytes_wait_for_what_was_written_before(sharing: Daemon, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still in the server's own buffer when the bytes are handed over must not be overtaken on the wire."""
    before, hand_over = b"x" * 20_000_000, Connection._hand_over
    piled, left = threading.Event(), []

    async def with_more_before(self: Connection, cycle: Any, write: Any, count: int) -> None:
        self.transport.write(before)  # as if an earlier answer were not out yet: more than any socket takes while nobody reads
        piled.set()

        async def looked_at(sock: socket.socket) -> None:
            left.append(self.transport.get_write_buffer_size())
            await write(sock)

        await hand_over(self, cycle, looked_at, count)

    monkeypatch.setattr(Connection, "_hand_over", with_more_before)
    host, port = sharing.listeners[-1].sock.getsockname()[:2]
    with socket.create_connection((host, port), timeout=WAIT) as sock:
        sock.sendall(f"GET {path_of(content)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nRange: bytes=0-999999\r\n\r\n".encode())
        assert piled.wait(WAIT)
        with sock.makefile("rb") as stream:
            list(iter(stream.readline, b"\r\n"))
            assert stream.read(len(before)) == before
            assert stream.read(1_000_000) == content[:1_000_000]
    assert left == [0]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": "*"}, 304),
        ({"If-Match": '"other"'}, 412),
        ({"Range": f"bytes={2 * SIZE}-"}, 416),
    ],
)
def test_answers_without_bytes(sharing: Daemon, content: bytes, headers: dict[str, str], status: int) -> None:
    got = sharing.tcp("GET", path_of(content), headers=BEARER | headers)
    assert (got.status, got.data) == (status, b"")
    if status == 416:
        assert got.headers["content-range"] == f"bytes */{len(content)}"


def test_only_what_a_ready_model_shows(sharing: Daemon, content: bytes, place: Path) -> None:
    """Neither what was never here, nor a blob that no model shows, nor one of a model that is withdrawn or removed."""
    stray = b"nobody's"
    name = hashlib.sha256(stray).hexdigest()
    blob = place / "store" / "blobs" / "sha256" / name[:2] / name
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(stray)
    for data in (b"never", stray):
        got = sharing.tcp("GET", path_of(data), headers=BEARER)
        assert (got.status, got.code) == (404, "unknown-blob")
    model = sharing.ask("GET", "/v1/models").json["models"][0]["entry"]
    assert sharing.admin("DELETE", f"/v1/models/{model}").status == 200
    assert sharing.tcp("GET", path_of(content), headers=BEARER).code == "unknown-blob"


@pytest.mark.parametrize("name", ["0" * 63, "A" * 64, "..%2f" * 4, "0" * 64 + ".note"])
def test_nothing_but_a_digest_is_a_name(sharing: Daemon, name: str) -> None:
    assert sharing.tcp("GET", f"/v1/blobs/{name}", headers=BEARER).status in (404, 422)


def test_who_may_not(sharing: Daemon, content: bytes, guarded_off: Daemon) -> None:
    """No token: 401. Pods on their socket: what is mounted into them, not all there is. A daemon that shares nothing says so of every name."""
    assert sharing.tcp("GET", path_of(content)).code == "unauthorized"
    assert sharing.ask("GET", path_of(content)).code == "not-allowed"
    assert sharing.admin("GET", path_of(content)).data == content
    got = guarded_off.tcp("GET", path_of(content), headers=BEARER)
    assert (got.status, got.code) == (403, "not-allowed")


@pytest.fixture
def guarded_off(settings_of: Callable[..., Settings], place: Path) -> Iterator[Daemon]:
    """A daemon that shares nothing, on a store of its own."""
    settings = settings_of(store=place / "off", socket=place / "off.sock", listen="127.0.0.1:0", listen_token_file=place / "token")
    (place / "token").write_text(TOKEN)
    with Daemon(settings) as running:
        yield running


def test_a_reader_that_takes_nothing_holds_up_nobody_and_is_dropped(sharing: Daemon, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it sits there the API answers; after the time for a stall its connection ends."""
    monkeypatch.setattr(share, "STALL_S", 1.0)
    host, port = sharing.listeners[-1].sock.getsockname()[:2]
    with socket.socket() as sock:
        sock.settimeout(WAIT)
        sock.connect((host, port))
        sock.sendall(f"GET {path_of(content)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        _until(sending=True)
        assert sharing.ask("GET", "/v1/models").status == 200
        _until(sending=False)
        got = 0
        try:
            while piece := sock.recv(2**20):
                got += len(piece)
        except ConnectionResetError:
            pass
        assert got < len(content)
    assert sharing.tcp("GET", path_of(content), headers=BEARER).data == content


def _until(*, sending: bool) -> None:
    """Wait until a thread has a blob open, or until none has."""
    never = threading.Event()
    for _ in range(400):
        if any("/blobs/sha256/" in _target(link) for link in Path("/proc/self/fd").iterdir()) is sending:
            return
        never.wait(0.05)
    raise AssertionError("no blob is open" if sending else "a blob is open still")


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def test_one_that_goes_away_leaves_nothing_open(sharing: Daemon, content: bytes) -> None:
    host, port = sharing.listeners[-1].sock.getsockname()[:2]
    with socket.create_connection((host, port)) as sock:
        sock.sendall(f"GET {path_of(content)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert sock.recv(100)
        _until(sending=True)
    _until(sending=False)
    assert sharing.tcp("GET", path_of(content), headers=BEARER).data == content


def test_a_daemon_that_stops_waits_for_no_slow_reader(sharing: Daemon, content: bytes) -> None:
    """The fixture's end fails if the server does not stop; the reader gets an end that comes too early, never other bytes."""
    host, port = sharing.listeners[-1].sock.getsockname()[:2]
    sock = socket.create_connection((host, port))
    sock.sendall(f"GET {path_of(content)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    assert sock.recv(100)
    sharing.loop.call_soon_threadsafe(sharing.stop.set)
    sharing._thread.join(WAIT)
    assert not sharing._thread.is_alive()
    sock.close()


def test_many_at_once(sharing: Daemon, content: bytes) -> None:
    """More than there are threads; each gets its own bytes."""
    bad: list[int] = []

    def read(number: int) -> None:
        start = number * 700_001
        got = sharing.tcp("GET", path_of(content), headers={**BEARER, "Range": f"bytes={start}-{start + 3_000_000}"})
        if got.data != content[start : start + 3_000_001]:
            bad.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not bad


def test_on_a_unix_socket_the_bytes_are_handed_over_as_well(sharing: Daemon, content: bytes) -> None:
    assert sharing.settings.admin_socket
    assert ask(UnixConnection(sharing.settings.admin_socket), "GET", path_of(content), headers={"Range": "bytes=1-3"}).data == content[1:4]
