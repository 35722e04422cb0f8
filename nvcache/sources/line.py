"""One HTTP connection that another thread may cut: one request at a time, its body read into the caller's memory. It follows and retries nothing.

The body goes by the standard library's `readinto` straight to where it belongs: no client measured was faster (docs/design.md).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum

from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.http import Target, Transport, UnreadableCaError, proxy_authorization, proxy_for, tls_context, tls_hint
from nvcache.sources.pace import Pace

PIECE = 256 * 1024  # bytes that are worth going on for
LONG_PIECE = 16 * PIECE  # read at a time while it flows: a fifth less CPU than small pieces over plain http
FLOWS_S = 0.1  # a piece that takes longer is followed by a small one, so that a slow body is not taken for a stalled one
LOOK_S = 0.25  # how soon a line that waits for its turn sees that the pace changed
DRAIN = 64 * 1024  # longest body worth reading to keep a connection


class Cut(StrEnum):
    """Why another thread shut a connection."""

    STALLED = "stalled"
    ABORTED = "aborted"


class Watchdog:
    """One thread that cuts every watched line whose last piece is older than its stall timeout. Made once a process; `close` ends the thread."""

    def __init__(self) -> None:
        self._lines: set[Line] = set()
        self._wake = threading.Condition()
        self._due = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, line: Line) -> Iterator[None]:
        """Watch `line` inside, from now."""
        line.beat = time.monotonic()
        with self._wake:
            self._lines.add(line)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="stall watchdog", daemon=True)
                self._thread.start()
            elif line.beat + line.stall_timeout < self._due:
                self._wake.notify()
        try:
            yield
        finally:
            with self._wake:
                self._lines.discard(line)

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with self._wake:
            while not self._closed:
                now = time.monotonic()
                self._due = now + 3600.0
                for line in self._lines:
                    late = now >= line.beat + line.stall_timeout
                    if late:
                        line.cut(Cut.STALLED)  # under the lock, so that a line that just finished is never cut
                    self._due = min(self._due, (now if late else line.beat) + line.stall_timeout)
                self._wake.wait(self._due - now)


class Line:
    """A connection to one origin at a time, used by one thread; `cut` may come from any. `name` is the file's, for messages."""

    def __init__(self, name: str, transport: Transport, watchdog: Watchdog, pace: Pace) -> None:
        self.name, self.stall_timeout = name, transport.stall_timeout
        self.beat = 0.0  # time.monotonic() of the last sign of life
        self.filling = 0  # bytes the running `fill` has got
        self._transport, self._watchdog, self._pace = transport, watchdog, pace
        self._lock = threading.Lock()
        self._cut: Cut | None = None
        self._is_cut = threading.Event()
        self._target: Target | None = None
        self._socket: socket.socket | None = None
        self._http: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._broken: SourceError | Interrupted | None = None

    def ask(self, target: Target, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send a GET and return its answer, status and headers read. Raises `SourceError` or, after `cut`, what it was cut for.

        A kept connection that turns out to be closed by the other end is dialled again at once.
        """
        with self._watchdog.watch(self):
            while True:
                kept = self._reusable(target)
                try:
                    if not kept:
                        self.drop()
                        self._dial(target)
                    return self._exchange(target, headers)
                except (OSError, http.client.HTTPException, UnicodeError) as error:
                    failure = self._failure(error, target)
                    self.drop()
                    if not kept or isinstance(failure, Interrupted) or failure.code is Code.SOURCE_STALLED:
                        raise failure from None

    def fill(self, view: memoryview) -> int:
        """Read the body into `view` until it is full or the body ends; returns the bytes read. When it is short, `why` tells the reason."""
        self.filling, filled, response = 0, 0, self._response
        if response is None:
            return 0
        with self._watchdog.watch(self):
            try:
                piece = least = self._transport.stall_bytes
                while filled < len(view):
                    want = min(piece, len(view) - filled)
                    paced = self._pace.rate is not None
                    if paced:
                        want = self._in_turn(want)
                    got = 0
                    try:
                        got = response.readinto(view[filled : filled + want])
                    finally:
                        if paced and got < want:
                            self._pace.give_back(want - got)
                    if got == 0:
                        break
                    self.filling, filled, now = filled + got, filled + got, time.monotonic()
                    piece = min(2 * piece, max(least, LONG_PIECE)) if now - self.beat < FLOWS_S else least
                    self.beat = now
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._broken = self._failure(error, self._target)
        return filled

    def _in_turn(self, want: int) -> int:
        """How many of `want` bytes may be read, once the pace allows them; 0 if the line is cut first, or none are allowed until the deadline.

        A line that waits for its turn owes no sign of life: its `beat` is ahead of the time meanwhile.
        """
        size, turn = self._pace.book(want)
        until = time.monotonic() + self._transport.deadline
        while (left := min(self._pace.wait(turn), LOOK_S)) > 0:
            now = time.monotonic()
            self.beat = now + left
            if now >= until:
                self._broken = self._limited()
            if self._broken is not None or self._is_cut.wait(left):
                self._pace.give_back(size)
                return 0
        self.beat = time.monotonic()
        return size

    def _limited(self) -> SourceError:
        what = f"cannot fetch {self.name} from {self._target.origin if self._target else 'its source'}"
        why = f"the bandwidth limit ({self._pace.rate or 0:,.0f} bytes/s) let nothing through in {self._transport.deadline:g} s"
        return SourceError(Code.SOURCE_BUSY, f"{what}: {why}", hint="raise the limit of this source's bandwidth")

    def drain(self) -> None:
        """Get a short body out of the way, so that the connection can be kept; a long one costs the connection."""
        scratch = memoryview(bytearray(DRAIN))
        if self.fill(scratch) == len(scratch) or self._broken is not None:
            self.drop()

    @property
    def ended(self) -> bool:
        """A chunked body said itself that it is over: a short one is not a broken one."""
        return self._response is not None and bool(self._response.chunked) and self._broken is None and self._cut is None

    def why(self) -> SourceError | Interrupted:
        """The reason why the last `fill` was short. The connection is of no more use and closed."""
        error = self._broken or self._failure(ConnectionError(), self._target)
        self.drop()
        return error

    def cut(self, reason: Cut) -> None:
        """Shut the connection down from any thread: what blocks on it returns."""
        with self._lock:
            self._cut = self._cut or reason
            self._is_cut.set()
            if self._socket is not None:
                with suppress(OSError):  # not connected yet, or closed already
                    # not SSLSocket.shutdown: it would take the TLS state away under a thread that reads
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def drop(self) -> None:
        """Close the connection; the next `ask` dials. Safe to call twice."""
        if self._response is not None:
            self._response.close()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = self._http = self._response = self._target = self._broken = None
            if self._cut is Cut.STALLED:
                self._cut = None
                self._is_cut.clear()

    def _reusable(self, target: Target) -> bool:
        same = self._target is not None and self._target.origin == target.origin
        return same and self._http is not None and self._http.sock is not None and (self._response is None or self._response.isclosed())

    def _exchange(self, target: Target, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        assert self._http is not None  # noqa: S101 - dialled by the caller
        proxy = proxy_for(target, self._transport.proxies)
        forward = proxy is not None and target.scheme == "http"
        self._http.putrequest("GET", f"{target.origin}{target.path}" if forward else target.path, skip_host=True, skip_accept_encoding=True)
        fixed = {"Host": target.authority, "User-Agent": self._transport.user_agent, "Accept-Encoding": "identity"}
        for name, value in {**fixed, **headers, **(proxy_authorization(proxy) if forward and proxy else {})}.items():
            self._http.putheader(name, value)
        self._http.endheaders()
        self._response = self._http.getresponse()
        self._target, self.beat = target, time.monotonic()
        return self._response

    def _dial(self, target: Target) -> None:
        try:
            proxy = proxy_for(target, self._transport.proxies)
        except ValueError as error:
            raise self._refused(target, str(error), retryable=False) from None
        sock = self._connect(Target.parse(proxy) if proxy else target)
        if target.scheme == "https":
            if proxy:
                self._tunnel(sock, target, proxy)
            sock = tls_context(self._transport.ca_file).wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
            self._adopt(sock)
            sock.do_handshake()
        sock.settimeout(None)  # from here on the watchdog bounds every wait, and a blocking read costs one system call
        self._http = http.client.HTTPConnection(target.host, target.port)
        self._http.auto_open = 0
        self._http.sock = sock

    def _connect(self, target: Target) -> socket.socket:
        """A connection to the first address that answers within the connect timeout. Only the name look-up has the resolver's own time limit."""
        last: OSError = OSError("the name has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            self._adopt(sock)
            self.beat = time.monotonic()
            try:
                sock.settimeout(self._transport.connect_timeout)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                last = error
            else:
                return sock
        raise last

    def _adopt(self, sock: socket.socket) -> None:
        """Make `sock` the one that `cut` shuts."""
        with self._lock:
            self._socket = sock
            if self._cut is None:
                return
        sock.close()
        raise ConnectionAbortedError("cut")

    def _tunnel(self, sock: socket.socket, target: Target, proxy: str) -> None:
        """CONNECT through `proxy` (RFC 9110 §9.3.6)."""
        host = f"[{target.host}]" if ":" in target.host else target.host
        lines = [f"CONNECT {host}:{target.port} HTTP/1.1", f"Host: {host}:{target.port}", f"User-Agent: {self._transport.user_agent}"]
        lines += [f"{name}: {value}" for name, value in proxy_authorization(proxy).items()]
        sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        answer = http.client.HTTPResponse(sock, method="CONNECT")
        try:
            answer.begin()
        finally:
            answer.close()
        if answer.status != 200:
            transient = answer.status >= 500 or answer.status in (408, 429)
            raise self._refused(target, f"the proxy {Target.parse(proxy).origin} answers {answer.status}", retryable=transient)

    def _refused(self, target: Target, why: str, *, retryable: bool) -> SourceError:
        return SourceError(Code.SOURCE_UNREACHABLE, f"cannot fetch {self.name} from {target.origin}: {why}", retryable=retryable)

    def _failure(self, error: Exception, target: Target | None) -> SourceError | Interrupted:
        """The one place where what sockets, TLS and http.client raise becomes an error of ours; it quotes nothing that may hold a URL."""
        what = f"cannot fetch {self.name} from {target.origin if target else 'its source'}"
        if self._cut is Cut.ABORTED:
            return Interrupted(Code.CANCELLED, f"{what}: cancelled")
        if self._cut is Cut.STALLED:
            return SourceError(Code.SOURCE_STALLED, f"{what}: too little came in {self.stall_timeout:g} s")
        if isinstance(error, ssl.SSLCertVerificationError):
            return SourceError(Code.SOURCE_TLS, f"{what}: its certificate cannot be trusted: {error.verify_message}")
        if isinstance(error, UnreadableCaError):
            return SourceError(Code.SOURCE_TLS, f"{what}: the certificates in {self._transport.ca_file} cannot be read")
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError) and self._http is None:
            return SourceError(Code.SOURCE_TLS, f"{what}: no TLS connection: {error.reason}", hint=tls_hint(error))
        if isinstance(error, socket.gaierror):
            return SourceError(Code.SOURCE_UNREACHABLE, f"{what}: its name cannot be resolved: {error.strerror}")
        if isinstance(error, TimeoutError):
            return SourceError(Code.SOURCE_UNREACHABLE, f"{what}: no connection in {self._transport.connect_timeout:g} s")
        if isinstance(error, http.client.HTTPException) and not isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
            return SourceError(Code.SOURCE_PROTOCOL, f"{what}: the answer is not HTTP ({type(error).__name__})")
        why = (error.strerror if isinstance(error, OSError) else None) or "the connection was closed before the end"
        return SourceError(Code.SOURCE_UNREACHABLE, f"{what}: {why}")
