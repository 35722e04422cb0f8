"""Who is asking and what they may do: peer credentials on Unix sockets, a bearer token on TCP. It knows nothing of what the calls do.

======================  ==========================================================================================
metrics                 health, version and metrics: what names no model; the one scope that needs no token over TCP
read                    also: look at models, jobs, space
pod                     also: make ready what `allow` matches, hold and release one's own leases
admin                   everything
======================  ==========================================================================================

A caller of the admin socket is admin, a caller of the pods' socket is pod. Without an admin socket the daemon's own user is admin on the pods'.
With `listen_scope = "metrics"` a caller over TCP gets no further than to the four paths of that scope, whatever a route asks for.
"""

from __future__ import annotations

import hmac
import re
import socket as sockets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import aiofiles
from fastapi import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from nvcache.api import problems
from nvcache.core.ref import Ref, Scheme
from nvcache.engine.status import ErrorInfo, LeaseStatus
from nvcache.errors import Code, RequestError
from nvcache.settings import Settings

_PID = re.compile(r"^(uid=-?\d+/|tcp/)pid=\d+/")  # of a holder
_UCRED = struct.Struct("=iII")  # pid, uid, gid; see unix(7), SO_PEERCRED
PEER = "nvcache.peer"  # the key in an ASGI scope's state under which `serve` leaves a `Peer`


class Scope(IntEnum):
    """What a caller may do; each includes the ones before."""

    METRICS = 0
    READ = 1
    POD = 2
    ADMIN = 3


METRICS_PATHS = frozenset({"/healthz", "/readyz", "/version", "/metrics"})
_MAY = {Scope.METRICS: "may only see health, version and metrics", Scope.READ: "may only look", Scope.POD: "may only ask, warm and lease"}


class _Socket(Protocol):
    @property
    def family(self) -> int: ...
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...
    def getsockname(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection. `path` is the Unix socket it came through, None for TCP; `pid` is 0 when the kernel cannot name it here."""

    path: str | None
    pid: int = 0
    uid: int = -1

    @classmethod
    def of(cls, sock: _Socket) -> Peer:
        """The peer of a connected socket, as the kernel recorded it at connect()."""
        if sock.family != sockets.AF_UNIX:
            return cls(None)
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _UCRED.size))
        return cls(str(sock.getsockname()), pid, uid)


@dataclass(frozen=True, slots=True)
class Caller:
    """A peer whose scope is known. `owner` begins the holder of every lease it takes, so that one user cannot touch another's."""

    scope: Scope
    owner: str
    pid: int = 0

    def holder(self, name: str) -> str:
        """The holder to write into a lease: an admin's own words, else prefixed with who the kernel says it is."""
        if self.scope is Scope.ADMIN and name:
            return name
        return f"{self.owner}pid={self.pid}/{name}" if self.pid else self.owner + name

    def owns(self, lease: LeaseStatus) -> bool:
        """Whether it may renew and release `lease`: its own user took it, from whatever process (loaders fork)."""
        return self.scope is Scope.ADMIN or lease.holder.startswith(self.owner)


def came_locally(request: Request) -> bool:
    """Whether a request came by a Unix socket."""
    return (request.scope["state"].get(PEER) or Peer(None)).path is not None


def same_holder(one: str, other: str) -> bool:
    """Whether two holders, as `Caller.holder` writes them, are one user's under one name: a pod's processes have each a pid of their own."""
    return _PID.sub(r"\1", one) == _PID.sub(r"\1", other)


class Gate:
    """Tells callers apart by the settings; one a daemon. `allow` is asked each time: it may change while the daemon runs."""

    def __init__(self, settings: Settings, euid: int, allow: Callable[[], Sequence[str]]) -> None:
        self._admin_socket = str(settings.admin_socket) if settings.admin_socket else None
        self._euid = euid
        self._token_file = settings.listen_token_file if settings.listen else None
        self._listen_scope = Scope[settings.listen_scope.upper()]
        self._allow = allow

    async def admit(self, request: Request, need: Scope, doing: str) -> Caller:
        """The caller, if it may do what needs `need`; `doing` says that in words ("pin hf--org--name").

        Raises `RequestError`: unauthorized (no or wrong token), not-allowed (scope too small).
        """
        peer = request.scope["state"].get(PEER) or Peer(None)
        caller = await self._bearer(request) if peer.path is None else self._local(peer)
        if caller.scope < need:
            remote = peer.path is None
            hint = "ask on the daemon's Unix socket, or have the operator raise listen_scope" if remote else None
            raise RequestError(Code.NOT_ALLOWED, f"cannot {doing}: this {'token' if remote else 'socket'} {_MAY[caller.scope]}", hint=hint)
        return caller

    def shut(self, connection: Connection) -> bool:
        """Whether a request is turned away unseen: it came over TCP, where there is health, version and metrics only, and asks for another path."""
        if self._listen_scope is not Scope.METRICS or connection["path"] in METRICS_PATHS:
            return False
        return (connection.get("state", {}).get(PEER) or Peer(None)).path is None

    def may_warm(self, caller: Caller, ref: Ref) -> bool:
        """Whether `caller` may make `ref` ready: a pattern of `allow` matches it; one without a revision allows every revision."""
        return caller.scope is Scope.ADMIN or any(_matches(name, pattern, ref.scheme) for pattern in self._allow() for name in (str(ref), ref.base))

    def _local(self, peer: Peer) -> Caller:
        admin = peer.path == self._admin_socket if self._admin_socket else peer.uid == self._euid
        return Caller(Scope.ADMIN if admin else Scope.POD, f"uid={peer.uid}/", peer.pid)

    async def _bearer(self, request: Request) -> Caller:
        if self._listen_scope is Scope.METRICS:
            return Caller(Scope.METRICS, "tcp/")
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        expected = await _token(self._token_file)
        if kind.lower() != "bearer" or not expected or not hmac.compare_digest(token.strip().encode(), expected.encode()):
            raise RequestError(Code.UNAUTHORIZED, f"cannot {request.method} {request.url.path}: the bearer token is missing or wrong")
        return Caller(self._listen_scope, "tcp/")


class Door:
    """ASGI middleware that turns away what `Gate.shut` says: no route, no document and no 404 tells such a caller what there is."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http" or not self._gate.shut(scope):
            await self._app(scope, receive, send)
            return
        why = f"cannot {scope['method']} {scope['path']}: this address answers {', '.join(sorted(METRICS_PATHS))} and nothing else"
        hint = "ask on the daemon's Unix socket, or have the operator set another listen_scope, with a listen_token_file"
        await problems.reply(ErrorInfo.of(RequestError(Code.NOT_ALLOWED, why, hint=hint)))(scope, receive, send)


def _matches(name: str, pattern: str, scheme: Scheme) -> bool:
    """Whether a pattern of `allow` means the reference `name`.

    Of blobs, `*` stays within its part (`az://*/models/x` is no container `secrets`), except that a last part `*` means everything below.
    """
    if scheme is not Scheme.AZ:
        return fnmatchcase(name, pattern)
    names, patterns = name.split("/"), pattern.split("/")
    if patterns[-1] == "*" and len(names) >= len(patterns):
        names, patterns = names[: len(patterns) - 1], patterns[:-1]
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


async def _token(path: Path | None) -> str | None:
    """The token as the file has it now, so that a rotated secret counts at once; None when it cannot be read, and then nobody is let in."""
    if path is None:
        return None
    try:
        async with aiofiles.open(path, encoding="utf-8") as file:
            return (await file.read(4096)).strip() or None
    except (OSError, UnicodeDecodeError):
        return None
