"""HTTP to the daemon over a Unix socket or TCP, with short time limits. It retries nothing and knows no model; standard library only."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 5.0
SYSTEM_SOCKET = "/run/nvcache/nvcache.sock"


@dataclass(eq=False)
class Problem(Exception):  # noqa: N818 - the name of the document it carries (RFC 9457)
    """What the daemon refused, or why it could not be asked (`daemon-unreachable`, `timeout`). `document` is the whole problem document."""

    code: str
    detail: str
    status: int = 0
    hint: str = ""
    retryable: bool = False
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.detail

    @classmethod
    def of(cls, document: Mapping[str, Any], status: int = 0) -> Problem:
        """The problem that a document tells of; what is missing from it stays empty."""
        told = document.get("status")
        return cls(
            code=str(document.get("code", "internal")),
            detail=str(document.get("detail", f"cannot do it: HTTP status {status}")),
            status=told if isinstance(told, int) else status,
            hint=str(document.get("hint", "")),
            retryable=bool(document.get("retryable", False)),
            document=document,
        )


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket (`host` is only what the Host header says)."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_SECONDS)
        self.sock.connect(self._path)


class Transport:
    """Where the daemon is and how to ask it. A connection a request: cheap on a Unix socket, and safe in threads, forks and restarts."""

    def __init__(self, url: str | None = None) -> None:
        self.url = url or default_url()
        parts = urlsplit(self.url)
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
            self._socket, self._host, self._port = unquote(parts.path), "", 0
        elif parts.scheme == "http" and parts.hostname:
            self._socket, self._host, self._port = "", parts.hostname, parts.port or 80
        else:
            raise ValueError(f"cannot use daemon URL {self.url!r}: it is neither unix:///path.sock nor http://host:port")

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Ask once. Returns the answer's object, empty for 204. Raises `Problem`; `timeout` is seconds without a byte once connected."""
        connection = self.open(method, path, body, timeout=timeout)
        try:
            with connection.getresponse() as response:
                data = response.read()
        except TimeoutError as error:
            raise Problem("timeout", f"cannot {method} {path}: no answer from {self.url} within {timeout:g} s", retryable=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()
        if response.status == http.HTTPStatus.NO_CONTENT:
            return {}
        document = self._object(data)
        if response.status >= 400:
            raise Problem.of(document, response.status)
        return document

    def open(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float, headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """Send a request; the caller reads the response and closes. Raises `Problem` (daemon-unreachable)."""
        connection = _UnixConnection(self._socket) if self._socket else http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        data = None if body is None else json.dumps(body).encode()
        asked = {"Connection": "close", **self._authorization(), **({"Content-Type": "application/json"} if data else {}), **(headers or {})}
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            connection.request(method, path, data, asked)
        except OSError as error:
            connection.close()
            raise self._unreachable(error) from error
        return connection

    def _authorization(self) -> dict[str, str]:
        """The bearer token, for TCP only, read at each request so that a rotated secret is seen."""
        file = os.environ.get("NVCACHE_TOKEN_FILE")
        if self._socket or not file:
            return {}
        try:
            return {"Authorization": f"Bearer {Path(file).read_text().strip()}"}
        except OSError as error:
            hint = "name a file that this user may read in NVCACHE_TOKEN_FILE"
            raise Problem("unauthorized", f"cannot read NVCACHE_TOKEN_FILE {file}: {error.strerror}", hint=hint) from error

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:  # ten thousand brackets are a recursion
            raise self._unreachable(error) from error
        if not isinstance(found, dict):
            raise self._unreachable(ValueError("the answer is not a JSON object"))
        return found

    def _unreachable(self, error: Exception) -> Problem:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        hint = _remedy(Path(self._socket), error) if self._socket else "start one with `nvcache serve`, or correct NVCACHE_URL"
        return Problem("daemon-unreachable", f"cannot reach the nvcache daemon at {self.url}: {why}", hint=hint, retryable=True)


def _remedy(path: Path, error: Exception) -> str:
    """What to do about a socket that cannot be used, by what can be seen of it from here."""
    with suppress(OSError):  # what cannot be looked at may well be one
        if path.exists() and not path.is_socket():
            return "that is no socket: name the daemon's with NVCACHE_SOCKET, the file and not its directory"
    if isinstance(error, PermissionError):
        with suppress(OSError):  # the directory can be looked at when what is in it cannot
            group = path.parent.stat().st_gid
            return f"you may not connect: join the socket's group (gid {group}; a pod by `supplementalGroups: [{group}]`), or run as its owner"
        return "you may not connect: join the socket's group, or run as its owner"
    if isinstance(error, ConnectionRefusedError):
        return "the daemon that left this socket has ended; look at its log, or start one with `nvcache serve`"
    with suppress(OSError):
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            return f"{path.parent} is not here: in a container mount the directory of the daemon's socket; or name its socket with NVCACHE_SOCKET"
    return "start one with `nvcache serve`, or name its socket with NVCACHE_SOCKET"


def default_url() -> str:
    """`NVCACHE_URL`, else the socket in `NVCACHE_SOCKET`, else this user's socket if there is one, else the system's."""
    if os.environ.get("NVCACHE_URL"):
        return os.environ["NVCACHE_URL"]
    if os.environ.get("NVCACHE_SOCKET"):
        return f"unix://{Path(os.environ['NVCACHE_SOCKET']).absolute()}"
    uid = os.getuid()
    runtime = (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}", f"/tmp/nvcache-{uid}")  # noqa: S108 - the daemon checks its owner
    own = (f"{directory}/nvcache/nvcache.sock" for directory in runtime if directory)
    return f"unix://{next((path for path in own if _is_mine(path, uid)), SYSTEM_SOCKET)}"


def _is_mine(path: str, uid: int) -> bool:
    """Whether the user's own daemon made it: anybody may create names below /tmp."""
    try:
        return os.lstat(path).st_uid == uid
    except OSError:
        return False
