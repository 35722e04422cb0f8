"""A daemon's front without an engine: an HTTP server on a Unix socket that gives scripted answers and keeps what it was asked. It caches nothing."""

from __future__ import annotations

import json
import socketserver
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    body: Any


class StubDaemon:
    """Answers `METHOD path?query` with the statuses and objects given to `answer`, one after the other; the last one is repeated.

    A context manager: serving inside, closed after. What it has no answer for is 404 unknown-model.
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.asked: list[Asked] = []
        self._answers: dict[str, list[tuple[int, Any]]] = {}
        self._server = _Server(str(socket), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="stub-daemon")

    def __enter__(self) -> StubDaemon:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
        self.socket.unlink()

    def answer(self, call: str, *replies: Any, status: int = 200) -> None:
        """Script `call` ("GET /v1/models"). A reply is an object, sent with `status`, or a pair (status, object)."""
        self._answers[call] = [reply if isinstance(reply, tuple) else (status, reply) for reply in replies]

    def take(self, call: str) -> tuple[int, Any]:
        """The next answer to `call`."""
        left = self._answers.get(call, [(404, problem("unknown-model", f"cannot find anything for {call}: not scripted"))])
        return left.pop(0) if len(left) > 1 else left[0]


def problem(code: str, detail: str = "cannot do it: a test", **members: Any) -> dict[str, Any]:
    """A problem document."""
    base = {"type": f"urn:nvcache:error:{code}", "title": code, "detail": detail, "code": code, "hint": f"a hint for {code}"}
    return {**base, "status": 500, "retryable": False, "retry_after_s": None, **members}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = False

    def __init__(self, path: str, stub: StubDaemon) -> None:
        self.stub = stub
        super().__init__(path, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 10

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_args: object) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.stub.asked.append(Asked(self.command, self.path, body))
        status, reply = self.server.stub.take(f"{self.command} {self.path}")
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if status < 400 else "application/problem+json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server's names
