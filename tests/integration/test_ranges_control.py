"""Stalls, aborts, proxies and TLS: the ranged reader never hangs and never trusts whom it should not."""

import random
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.base import HttpRemote
from tests.support.hub import HubServer, Kind, Repo
from tests.support.lanes import KIB, Lanes, remote
from tests.support.tls import make_tls

WEIGHTS = random.Random(3).randbytes(900 * KIB + 7)
SIZE = len(WEIGHTS)


@pytest.fixture(scope="module")
def server():
    with HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS})}) as hub:
        yield hub


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure_server(certificate):
    with HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS})}, tls=certificate) as hub:
        yield hub


@pytest.fixture
def secure(secure_server):
    secure_server.requests.clear()
    yield secure_server
    secure_server.faults.clear()


# --- stalls


@pytest.mark.parametrize("after", [0, 1, 300 * KIB])
def test_a_stalled_body_is_cut_and_read_on(hub, after):
    hub.faults.add("*", Kind.STALL, after=after)
    with Lanes(remote(hub, "m.safetensors", SIZE), stall_timeout=0.3) as lanes:
        assert lanes.read() == WEIGHTS
    starts = [request.range.split("=")[1].split("-")[0] for request in hub.seen("m.safetensors", origin="cdn")]
    assert starts == ["0", str(after)]


def test_a_trickle_is_a_stall_but_what_came_is_kept(hub):
    hub.faults.add("*", Kind.TRICKLE, after=1000, seconds=0.05)
    with Lanes(remote(hub, "m.safetensors", SIZE), stall_timeout=0.3) as lanes:
        assert lanes.read() == WEIGHTS
    assert int(hub.seen("m.safetensors", origin="cdn")[1].range.split("=")[1].split("-")[0]) >= 1000


def test_endless_stalls_end_at_the_deadline(hub):
    hub.faults.add("*", Kind.STALL, times=None)
    before = time.monotonic()
    with (
        Lanes(remote(hub, "m.safetensors", SIZE), stall_timeout=0.3, deadline=1.2) as lanes,
        pytest.raises(SourceError, match="came in 0") as caught,
    ):
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_STALLED, True)
    assert time.monotonic() - before < 30


def test_a_server_that_accepts_and_says_nothing(hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = HttpRemote(f"http://127.0.0.1:{silent.getsockname()[1]}/x", 10, name="x")
        with Lanes(mute, stall_timeout=0.3, deadline=0.8) as lanes, pytest.raises(SourceError) as caught:
            lanes.read()
    assert caught.value.code is Code.SOURCE_STALLED


def test_something_that_is_not_http():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            for _ in range(3):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        with in_background(talk):
            other = HttpRemote(f"http://127.0.0.1:{listener.getsockname()[1]}/x", 10, name="x")
            with Lanes(other) as lanes, pytest.raises(SourceError, match="not HTTP") as caught:
                lanes.read()
    assert caught.value.code is Code.SOURCE_PROTOCOL


# --- aborts


@contextmanager
def in_background(work):
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(20)
        assert not thread.is_alive()


def aborted_after(lanes, condition, offset=0):
    """Read in a thread, abort once `condition()`; how long it took to return, and what was raised."""
    reader, raised = lanes.reader(), []

    def work():
        try:
            reader.read(offset, memoryview(bytearray(SIZE - offset)))
        except (SourceError, Interrupted) as error:
            raised.append(error)

    limit = time.monotonic() + 10
    with in_background(work) as thread:
        while not condition():
            assert time.monotonic() < limit
            thread.join(0.01)
        before = time.monotonic()
        reader.abort()
        thread.join(5)
        took = time.monotonic() - before
    with pytest.raises(Interrupted):
        reader.read(offset, memoryview(bytearray(1)))
    return took, raised[0]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_abort_of_a_stalled_read(hub, secure, certificate, scheme):
    server = hub if scheme == "http" else secure
    fault = server.faults.add("*", Kind.STALL, after=100, times=None)
    with Lanes(remote(server, "m.safetensors", SIZE), stall_timeout=30.0, ca_file=str(certificate.cert)) as lanes:
        took, error = aborted_after(lanes, lambda: fault.hits)
    assert took < 2
    assert isinstance(error, Interrupted)
    assert error.code is Code.CANCELLED


def test_abort_while_backing_off(hub):
    fault = hub.faults.add("*", Kind.STATUS, status=500, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE)) as lanes:
        took, error = aborted_after(lanes, lambda: fault.hits >= 4)  # the next pause is seconds
    assert took < 2
    assert isinstance(error, Interrupted)


def test_abort_while_throttled(hub):
    fault = hub.faults.add("*", Kind.THROTTLE, seconds=8, style="ratelimit")
    with Lanes(remote(hub, "m.safetensors", SIZE)) as lanes:
        took, error = aborted_after(lanes, lambda: fault.hits)
    assert took < 2
    assert isinstance(error, Interrupted)


def test_abort_while_connecting():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:  # a full accept queue leaves further connections in SYN_SENT
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            with Lanes(HttpRemote(f"http://127.0.0.1:{port}/x", SIZE, name="x"), connect_timeout=9.0, stall_timeout=30.0) as lanes:
                begun = time.monotonic()
                took, error = aborted_after(lanes, lambda: time.monotonic() > begun + 0.2)
        finally:
            for filler in fillers:
                filler.close()
    assert took < 2
    assert isinstance(error, Interrupted)


def test_abort_while_waiting_for_another_reader_to_open_the_route(hub):
    fault = hub.faults.add("*", Kind.STALL, origin="hub", times=None)  # in the body of the redirect
    with Lanes(remote(hub, "m.safetensors", SIZE), stall_timeout=30.0) as lanes:
        first = lanes.reader()

        def work():
            with pytest.raises(Interrupted):
                first.read(0, memoryview(bytearray(10)))

        with in_background(work):
            limit = time.monotonic() + 5
            while not fault.hits:
                assert time.monotonic() < limit
            begun = time.monotonic()
            took, error = aborted_after(lanes, lambda: time.monotonic() > begun + 0.2, offset=100)
            first.abort()
    assert took < 2
    assert isinstance(error, Interrupted)
    assert fault.hits == 1


def test_pausing_an_origin_on_behalf_of_another_process_tells_nobody():
    told = []
    with Lanes(HttpRemote("http://127.0.0.1:1/x", 10, name="x"), on_pause=lambda *what: told.append(what)) as lanes:
        lanes.throttle.pause("http://127.0.0.1:1", 5)
        lanes.throttle.pause("http://127.0.0.1:1", 1)  # the longer one stands
        assert 4 < lanes.throttle.left("http://127.0.0.1:1") <= 5
        assert lanes.throttle.left("http://127.0.0.2:1") == 0
        lanes.throttle.asked("http://127.0.0.1:1", 1e9)
        assert lanes.throttle.left("http://127.0.0.1:1") <= 3600
    assert told == [("http://127.0.0.1:1", 1e9)]


# --- TLS


def test_tls_with_a_private_ca_and_four_lanes(secure, certificate):
    with Lanes(remote(secure, "m.safetensors", SIZE, token="t"), ca_file=str(certificate.cert)) as lanes:
        assert lanes.fetch() == WEIGHTS
    assert secure.bytes_sent() == SIZE
    assert all("authorization" not in request.headers for request in secure.seen(origin="cdn"))


@pytest.mark.parametrize("kind", [Kind.TRUNCATE, Kind.RESET, Kind.STALL, Kind.EXPIRE, Kind.CHUNKED])
def test_faults_over_tls(secure, certificate, kind):
    secure.faults.add("*", kind, after=300 * KIB)
    with Lanes(remote(secure, "m.safetensors", SIZE), stall_timeout=0.4, ca_file=str(certificate.cert)) as lanes:
        assert lanes.read() == WEIGHTS


def test_an_unknown_certificate_is_permanent(secure):
    with Lanes(remote(secure, "m.safetensors", SIZE)) as lanes, pytest.raises(SourceError, match="cannot be trusted") as caught:
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_TLS, False)
    assert secure.requests == []


def test_a_certificate_for_another_name(tmp_path):
    tls = make_tls(tmp_path, names="DNS:elsewhere.invalid")
    with (
        HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS})}, tls=tls) as hub,
        Lanes(remote(hub, "m.safetensors", SIZE), ca_file=str(tls.cert)) as lanes,
        pytest.raises(SourceError) as caught,
    ):
        lanes.read()
    assert caught.value.code is Code.SOURCE_TLS


def test_certificates_that_cannot_be_read(secure, tmp_path):
    (tmp_path / "empty.pem").write_text("")
    for ca_file in (tmp_path / "none.pem", tmp_path / "empty.pem"):
        with (
            Lanes(remote(secure, "m.safetensors", SIZE), ca_file=str(ca_file)) as lanes,
            pytest.raises(SourceError, match="cannot be read") as caught,
        ):
            lanes.read()
        assert caught.value.code is Code.SOURCE_TLS


def test_tls_to_a_server_that_speaks_none(hub):
    plain = HttpRemote(hub.url.replace("http:", "https:") + "/x", 10, name="x")
    with Lanes(plain, deadline=1.0) as lanes, pytest.raises(SourceError) as caught:
        lanes.read()
    assert (caught.value.code, caught.value.hint) == (Code.SOURCE_TLS, "it speaks plain http; write http://")


def test_a_redirect_from_https_to_http_is_refused(secure, certificate):
    secure.faults.add("*", Kind.DOWNGRADE, origin="hub")
    with (
        Lanes(remote(secure, "m.safetensors", SIZE), ca_file=str(certificate.cert)) as lanes,
        pytest.raises(SourceError, match="plain http") as caught,
    ):
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_PROTOCOL, False)


# --- proxies


class Proxy:
    """A forward proxy of a few lines: CONNECT for https, absolute-form for http; it notes request lines and credentials."""

    def __init__(self, refuse=None):
        self.refuse, self.seen = refuse, []
        self._listener = socket.create_server(("127.0.0.3", 0))
        self._threads, self._sockets = [], []
        self.url = f"http://user:p%40ss@127.0.0.3:{self._listener.getsockname()[1]}"

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        for sock in (self._listener, *self._sockets):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the peer was faster
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            self._start(self._serve, client)

    def _serve(self, client):
        head = b""
        while b"\r\n\r\n" not in head:
            piece = client.recv(65536)
            if not piece:
                return
            head += piece
        line, _, rest = head.partition(b"\r\n")
        self.seen.append((line.decode(), b"Proxy-Authorization: Basic dXNlcjpwQHNz" in rest))
        method, target, _ = line.decode().split()
        if self.refuse:
            client.sendall(b"HTTP/1.1 %d no\r\nContent-Length: 0\r\n\r\n" % self.refuse)
            return
        host, port = (target if method == "CONNECT" else target.split("/")[2]).rsplit(":", 1)
        server = socket.create_connection((host, int(port)))
        self._sockets.append(server)
        if method == "CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = "/" + target.split("/", 3)[3]
            server.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n".encode() + rest)
        self._start(self._pump, server, client)
        self._pump(client, server)

    @staticmethod
    def _pump(source, sink):
        try:
            while piece := source.recv(65536):
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_http_through_a_proxy(hub):
    with Proxy() as proxy, Lanes(remote(hub, "m.safetensors", SIZE), proxies={"http": proxy.url}) as lanes:
        assert lanes.read() == WEIGHTS
        assert [line.split("?")[0].split("/acme")[0] for line, _ in proxy.seen] == [f"GET {hub.url}", f"GET {hub.cdn_url}"]
        assert all(known for _, known in proxy.seen)
    assert all("proxy-authorization" not in request.headers or request.headers["proxy-authorization"] for request in hub.requests)


def test_https_through_a_proxy(secure, certificate):
    proxies = {"all": "", "no": "example.com"}
    with (
        Proxy() as proxy,
        Lanes(remote(secure, "m.safetensors", SIZE), proxies={**proxies, "all": proxy.url}, ca_file=str(certificate.cert)) as lanes,
    ):
        assert lanes.fetch() == WEIGHTS
        assert {line for line, _ in proxy.seen} == {f"CONNECT {url.removeprefix('https://')} HTTP/1.1" for url in (secure.url, secure.cdn_url)}
        assert all(known for _, known in proxy.seen)
    assert all("proxy-authorization" not in request.headers for request in secure.requests)


def test_a_proxy_that_refuses_is_named_without_its_password(secure):
    with (
        Proxy(refuse=407) as proxy,
        Lanes(remote(secure, "m.safetensors", SIZE), proxies={"https": proxy.url}) as lanes,
        pytest.raises(SourceError, match=r"proxy http://127\.0\.0\.3:\d+ answers 407") as caught,
    ):
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_UNREACHABLE, False)
    assert "p%40ss" not in str(caught.value)
    assert "p@ss" not in str(caught.value)


def test_no_proxy_goes_straight(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE), proxies={"http": "http://127.0.0.1:1", "no": "127.0.0.0/8"}) as lanes:
        assert lanes.read() == WEIGHTS


def test_a_kind_of_proxy_that_is_not_known(hub):
    with (
        Lanes(remote(hub, "m.safetensors", SIZE), proxies={"all": "socks5://127.0.0.1:1"}) as lanes,
        pytest.raises(SourceError, match="http:// proxy") as caught,
    ):
        lanes.read()
    assert not caught.value.retryable
