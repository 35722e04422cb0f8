"""Who is asking and what they may do: peer credentials on Unix sockets, a bearer token on TCP. It knows nothing of what the calls do.

======================  ==========================================================================================
read                    look at models, jobs, space, metrics
pod                     also: make ready what `allow` matches, hold and release one's own leases
admin                   everything
======================  ==========================================================================================

A caller of the admin socket is admin, a caller of the pods' socket is pod. Without an admin socket the daemon's own user is admin on the pods'.
"""

from __future__ import annotations

import hmac
import socket as sockets
import struct
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import aiofiles
from fastapi import Request

from nvcache.core.ref import Ref
from nvcache.engine.status import LeaseStatus
from nvcache.errors import Code, RequestError
from nvcache.settings import Settings

_UCRED = struct.Struct("=iII")  # pid, uid, gid; see unix(7), SO_PEERCRED
PEER = "nvcache.peer"  # the key in an ASGI scope's state under which `serve` leaves a `Peer`


class Scope(IntEnum):
    """What a caller may do; each includes the ones before."""

    READ = 1
    POD = 2
    ADMIN = 3


_MAY = {Scope.READ: "may only look", Scope.POD: "may only ask, warm and lease"}


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


class Gate:
    """Tells callers apart by the settings; one a daemon."""

    def __init__(self, settings: Settings, euid: int) -> None:
        self._admin_socket = str(settings.admin_socket) if settings.admin_socket else None
        self._euid = euid
        self._token_file = settings.listen_token_file if settings.listen else None
        self._listen_scope = Scope[settings.listen_scope.upper()]
        self._allow = settings.allow

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

    def may_warm(self, caller: Caller, ref: Ref) -> bool:
        """Whether `caller` may make `ref` ready: a pattern of `allow` matches it; one without a revision allows every revision."""
        return caller.scope is Scope.ADMIN or any(fnmatchcase(str(ref), pattern) or fnmatchcase(ref.base, pattern) for pattern in self._allow)

    def _local(self, peer: Peer) -> Caller:
        admin = peer.path == self._admin_socket if self._admin_socket else peer.uid == self._euid
        return Caller(Scope.ADMIN if admin else Scope.POD, f"uid={peer.uid}/", peer.pid)

    async def _bearer(self, request: Request) -> Caller:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        expected = await _token(self._token_file)
        if kind.lower() != "bearer" or not expected or not hmac.compare_digest(token.strip().encode(), expected.encode()):
            raise RequestError(Code.UNAUTHORIZED, f"cannot {request.method} {request.url.path}: the bearer token is missing or wrong")
        return Caller(self._listen_scope, "tcp/")


async def _token(path: Path | None) -> str | None:
    """The token as the file has it now, so that a rotated secret counts at once; None when it cannot be read, and then nobody is let in."""
    if path is None:
        return None
    try:
        async with aiofiles.open(path, encoding="utf-8") as file:
            return (await file.read(4096)).strip() or None
    except (OSError, UnicodeDecodeError):
        return None
