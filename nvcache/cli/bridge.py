"""A way from a browser on this machine to the daemon: an HTTP server on 127.0.0.1 that shows the page and passes on what the page asks. It changes
nothing: it knows GET alone, and of the daemon's calls only those that the page reads.

Other users of the machine can connect to the port, and so can any web site in the same browser. Therefore:

* the link holds a secret that is exchanged, once, for a cookie (HttpOnly, SameSite=Strict) without which there is nothing to see;
* a link that is opened for the user stands on the browser's command line, where everybody can read it: then nobody is heard but that user and root;
* a Host that is not this machine's own name is refused: a site whose name was made to point here (DNS rebinding) is another origin's;
* every answer says that no other origin may embed it.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from nvcache.api import page, problems
from nvcache.client import Problem
from nvcache.client.transport import Transport
from nvcache.engine.status import ErrorInfo
from nvcache.errors import Code, ConfigError
from nvcache.system.loopback import owner

ADDRESS = "127.0.0.1"
NAMES = frozenset({ADDRESS, "localhost", "::1"})  # a forwarded port (ssh -L, kubectl port-forward) may have another number, not another name
PASSED_ON = frozenset({"/v1/models", "/v1/jobs", "/v1/space", "/v1/stripe", "/v1/leases", "/v1/events", "/readyz", "/version"})
HEAD_SECONDS = 10.0  # for a request to come, and for a browser to take what it is sent
SILENCE_SECONDS = 30.0  # without a byte from the daemon; a stream has a sign of life every ten
CONNECTIONS = 64
PIECE = 64 * 1024


class Bridge(ThreadingHTTPServer):
    """Serves from a thread of its own while it is entered. `link` is what to open: it lets one browser in."""

    daemon_threads = True  # they end with the process; each is bounded by its time limits
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(self, url: str, port: int = 0, *, private: bool = False) -> None:
        """`url` is the daemon's; port 0 is any that is free; `private`: other users' connections are dropped.

        Raises `ConfigError` (socket-in-use, bad-config) when the port cannot be had.
        """
        self.private = private
        self.transport = Transport(url)
        self.sheets = page.sheets()
        self._once: str | None = secrets.token_urlsafe(24)
        self._session = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="bridge")
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            code = Code.SOCKET_IN_USE if port else Code.BAD_CONFIG
            raise ConfigError(
                code, f"cannot listen on {ADDRESS}:{port}: {error.strerror or error}", hint="name another with --port, or none at all"
            ) from error
        self.link = f"http://{ADDRESS}:{self.server_port}/?key={self._once}"
        self.cookie = f"nvcache-{self.server_port}"  # cookies do not tell ports apart

    def server_bind(self) -> None:
        """Without http.server's look-up of this machine's name, which may wait for a DNS that does not answer."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, error: BaseException | None = None, trace: TracebackType | None = None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def wait(self) -> None:
        """Until Ctrl-C."""
        self._thread.join()

    def exchange(self, key: str) -> str | None:
        """The session's secret for that of the link; None for any other key, and the second time."""
        with self._lock:
            if self._once is None or not hmac.compare_digest(key.encode(), self._once.encode()):
                return None
            self._once = None
            return self._session

    def knows(self, session: str) -> bool:
        """Whether this is the browser that was let in."""
        return hmac.compare_digest(session.encode(), self._session.encode())

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether that connection is heard at all."""
        try:
            return not self.private or owner(client_address, (ADDRESS, self.server_port)) in (0, os.geteuid())
        except OSError:
            return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more connection, in a thread; of too many the newest is dropped."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be had
            self._room.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()


class _Handler(BaseHTTPRequestHandler):
    """One request a connection: on the loopback interface another costs nothing."""

    server: Bridge
    protocol_version = "HTTP/1.1"
    timeout = HEAD_SECONDS

    def do_GET(self) -> None:
        """The page, one of its files, or what the daemon says."""
        self.close_connection = True
        with suppress(OSError, HTTPException):  # the browser is gone or takes nothing, or the daemon stopped: that answer ends where it is
            self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Nothing: stderr is for people."""

    def version_string(self) -> str:
        """What the header Server says."""
        return "nvcache"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, such as another method than GET, as a problem like any other."""
        self.close_connection = True
        status = HTTPStatus(code)
        with suppress(OSError):
            self._problem(status, problems.plain(Code.BAD_REQUEST, f"cannot answer that: {message or status.phrase}"))

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        if not _ours(self.headers.get("Host", "")):
            self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST, "it was asked for under another name than this machine's", f"open http://{ADDRESS} or localhost"
            )
            return
        key = parse_qs(query).get("key", [""])[0] if path == "/" else ""
        session = self.server.exchange(key) if key else None
        if session is None and not self.server.knows(self._cookie()):
            hint = "open the link that `nvcache ui` printed; it lets in one browser, once. Start it anew for another link"
            self._refuse(HTTPStatus.FORBIDDEN, "this browser was not let in, or the link was used before", hint)
        elif path in self.server.sheets:
            # The page itself, and no redirect to it: a browser that came by a link from elsewhere would not send the cookie along.
            sheet = self.server.sheets[path]
            fresh = {"Set-Cookie": f"{self.server.cookie}={session}; Path=/; HttpOnly; SameSite=Strict"} if session else {}
            self._send(HTTPStatus.OK, sheet.media_type, sheet.content, fresh)
        elif path in PASSED_ON:
            self._pass_on(path)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "this address has only the page and what it reads", "ask the daemon's own socket")

    def _pass_on(self, path: str) -> None:
        """What the daemon answers, as it comes. Its problems are passed on; that it is away is one of them."""
        try:
            connection = self.server.transport.open("GET", path, timeout=SILENCE_SECONDS)
        except Problem as problem:
            self._problem(HTTPStatus.SERVICE_UNAVAILABLE, ErrorInfo(Code(problem.code), problem.detail, problem.hint, problem.retryable))
            return
        with closing(connection):
            try:
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                why = f"cannot GET {path}: the daemon did not answer: {str(error) or type(error).__name__}"
                self._problem(HTTPStatus.SERVICE_UNAVAILABLE, problems.plain(Code.DAEMON_UNREACHABLE, why))
                return
            with response:
                self._copy(response)

    def _copy(self, response: HTTPResponse) -> None:
        # 401 would have the page ask for a token; it is this side that has it.
        status = HTTPStatus.BAD_GATEWAY if response.status == HTTPStatus.UNAUTHORIZED else response.status
        length = response.getheader("Content-Length")
        self._head(status, response.getheader("Content-Type", ""), {"Content-Length": length} if length else {})
        while piece := response.read1(PIECE):
            self.wfile.write(piece)

    def _refuse(self, status: HTTPStatus, why: str, hint: str) -> None:
        self._problem(status, ErrorInfo(Code.NOT_ALLOWED, f"cannot GET {self.path.partition('?')[0]}: {why}", hint, retryable=False))

    def _problem(self, status: HTTPStatus, error: ErrorInfo) -> None:
        self._send(status, problems.MEDIA_TYPE, json.dumps(problems.document(error, int(status))).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes, more: Mapping[str, str] | None = None) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(more or {})})
        self.wfile.write(content)

    def _head(self, status: int, kind: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **page.HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            return ""
        return found.value if found else ""


def _ours(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in NAMES
    except ValueError:  # a bracket without its pair
        return False
