"""A proxy in front of Azurite that records every request and makes the faults that Azurite never makes. It stores nothing and signs nothing.

A client is given `url` in place of Azurite's: a shared key signs account and path, a SAS neither host nor port, so both stay valid.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.azure_answers import INSTEAD, OTHER_MD5, expired_sas, expired_token, instead
from tests.support.azurite import ACCOUNT, Azurite, connection_string
from tests.support.faults import Fault, Faults, Kind
from tests.support.hub import Request
from tests.support.serving import LoopbackServer, reset

PIECE = 2**16
TIMEOUT_S = 60
HOPS = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}  # of one connection, or written anew
SPOILED = (Kind.TRUNCATE, Kind.RESET, Kind.FLIP, Kind.STALL, Kind.TRICKLE, Kind.EXPIRE, Kind.CALL, Kind.WRONG_MD5)


@dataclass
class BlobRequest(Request):
    """A request; `origin` is "bytes" if it asks for a blob's content, else "service", and `file` is container/blob. repr shows no credential."""

    @property
    def range(self) -> str | None:
        """The range asked for; x-ms-range is what the service looks at first."""
        return self.headers.get("x-ms-range") or self.headers.get("range")

    @property
    def match(self) -> str | None:
        """The If-Match header."""
        return self.headers.get("if-match")

    @property
    def credential(self) -> str | None:
        """The bearer token or the SAS's signature; None for a shared key, which no request reveals, and for none."""
        bearer = self.headers.get("authorization", "")
        return bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else parse_qs(self.query).get("sig", [None])[0]


class AzureProxy:
    """A context manager: `url` is the endpoint (account included), with Azurite's certificate if that has one. `bytes_per_s` limits all answers
    together, and may be changed while it serves.
    """

    def __init__(self, azurite: Azurite, *, faults: Faults | None = None) -> None:
        self.azurite, self.faults = azurite, faults or Faults()
        self.requests: list[BlobRequest] = []
        self.bytes_per_s: float | None = None
        self._revoked: set[str] = set()
        self._lock, self._free_at = threading.Lock(), 0.0
        self._stopped = threading.Event()
        self._server = _Server(self)
        self.url = f"{'https' if azurite.tls else 'http'}://127.0.0.1:{self._server.server_port}/{ACCOUNT}"

    def __enter__(self) -> Self:
        self._server.start("azure-proxy")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self.faults.clear()
        self._server.stop()

    @property
    def connection_string(self) -> str:
        """As Azure's portal shows it, with the account key."""
        return connection_string(self.url)

    def seen(self, glob: str = "*", *, origin: str | None = None, method: str | None = None) -> list[BlobRequest]:
        """The requests so far whose container/blob matches."""
        return [r for r in list(self.requests) if origin in (None, r.origin) and method in (None, r.method) and fnmatchcase(r.file, glob)]

    def bytes_sent(self, glob: str = "*") -> int:
        """Bytes of blob content sent so far, for those whose container/blob matches."""
        return sum(request.sent for request in self.seen(glob, origin="bytes"))

    @property
    def connections(self) -> int:
        """Connections that were made so far."""
        return self._server.accepted

    def revoke(self) -> None:
        """Every SAS and token seen so far has expired from now on."""
        self._revoked |= {request.credential for request in list(self.requests) if request.credential}

    def revoked(self, request: BlobRequest) -> bool:
        """Whether the credential of this request has expired."""
        return request.credential in self._revoked

    def drop_connections(self) -> None:
        """Close every open connection."""
        self._server.drop_connections()

    def pace(self, count: int) -> None:
        """Wait until `count` more bytes may be sent."""
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            now = time.monotonic()
            starts = max(now, self._free_at)
            self._free_at = starts + count / rate
        self._stopped.wait(starts - now)


class _Server(LoopbackServer):
    def __init__(self, proxy: AzureProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler, proxy.azurite.tls)


class _DropError(ConnectionError):
    """The fault, or Azurite, ends this connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """Record it, and forward it or answer it here."""
        url = urlsplit(self.path)
        self.proxy, path = self.server.proxy, unquote(url.path)
        fields = parse_qs(url.query)
        origin = "bytes" if self.command == "GET" and not {"comp", "restype"} & fields.keys() else "service"
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.note = BlobRequest(self.command, origin, path, url.query, headers, path.removeprefix(f"/{ACCOUNT}").lstrip("/"))
        self.proxy.requests.append(self.note)
        fault = self.proxy.faults.take((origin, "*"), self.command, path, self.note.file)
        if fault and fault.kind not in INSTEAD + SPOILED:
            raise ValueError(f"this proxy makes no fault {fault.kind}")
        if self.proxy.revoked(self.note):
            self._instead(**(expired_token() if "authorization" in headers else expired_sas()))
        elif fault and fault.kind in INSTEAD:
            self._instead(**instead(fault))
        else:
            self._forward(fault)

    do_HEAD = do_PUT = do_DELETE = do_POST = do_GET  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Requests are recorded, not printed."""

    def _instead(self, status: int, headers: dict[str, str], body: bytes, skew_s: float) -> None:
        for _ in self._sent():
            pass
        self.note.status = status
        self.send_response_only(status)
        for name, value in ({"Date": formatdate(time.time() + skew_s, usegmt=True)} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _sent(self) -> Iterator[bytes]:
        """The body of the request."""
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            piece = self.rfile.read(min(PIECE, left))
            if not piece:
                raise _DropError
            left -= len(piece)
            yield piece

    def _forward(self, fault: Fault | None) -> None:
        upstream = self._connect()
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOPS or name.lower() == "content-length":
                    upstream.putheader(name, value)
            upstream.endheaders()
            for piece in self._sent():
                upstream.send(piece)
            with upstream.getresponse() as answer:
                self._answer(answer, fault)
        except OSError:  # the client is gone, or the fault ended it
            self.close_connection = True
        finally:
            upstream.close()

    def _connect(self) -> http.client.HTTPConnection:
        own = urlsplit(self.proxy.azurite.url)
        if self.proxy.azurite.tls is None:
            return http.client.HTTPConnection(own.netloc, timeout=TIMEOUT_S)
        context = ssl.create_default_context(cafile=self.proxy.azurite.tls.cert)
        return http.client.HTTPSConnection(own.netloc, timeout=TIMEOUT_S, context=context)

    def _answer(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        self.note.status = answer.status
        whole = None if answer.length is not None or self.command == "HEAD" else answer.read()  # chunked: an error or a listing
        length = answer.length if whole is None else len(whole)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            wrong = fault is not None and fault.kind is Kind.WRONG_MD5 and name.lower() == "content-md5"
            if name.lower() not in HOPS:
                self.send_header(name, OTHER_MD5 if wrong else value)
        declared = answer.getheader("Content-Length") if self.command == "HEAD" else str(length)
        if declared is not None and answer.status not in (204, 304):
            self.send_header("Content-Length", declared)
        self.end_headers()
        if self.command == "HEAD":
            return
        if whole is not None:
            self._send(whole)
        elif fault and fault.kind is not Kind.WRONG_MD5:
            self._spoiled(answer, length or 0, fault)
        else:
            self._copy(answer, length or 0)

    def _spoiled(self, answer: http.client.HTTPResponse, length: int, fault: Fault) -> None:
        """The body, with the fault after so many bytes of it."""
        if fault.kind is Kind.TRICKLE:
            for at in range(0, length, fault.after):
                self._copy(answer, min(fault.after, length - at))
                fault.released.wait(fault.seconds)
            return
        before = min(fault.after, length)
        self._copy(answer, before)
        match fault.kind:
            case Kind.FLIP if before < length:
                self._send(bytes([answer.read(1)[0] ^ 0xFF]))
                before += 1
            case Kind.STALL:
                fault.released.wait(fault.seconds)
            case Kind.CALL:
                assert fault.hook is not None
                fault.hook()
            case Kind.EXPIRE:
                self.proxy.revoke()
                raise _DropError
            case Kind.RESET:
                reset(self.connection)
                raise _DropError
            case Kind.TRUNCATE:
                raise _DropError
        self._copy(answer, length - before)

    def _copy(self, answer: http.client.HTTPResponse, count: int) -> None:
        while count > 0:
            piece = answer.read(min(PIECE, count))
            if not piece:
                raise _DropError
            self._send(piece)
            count -= len(piece)

    def _send(self, piece: bytes) -> None:
        self.proxy.pace(len(piece))
        if self.note.status in (200, 206):
            self.note.sent += len(piece)  # before: the client may look as soon as it has the bytes
        self.wfile.write(piece)
