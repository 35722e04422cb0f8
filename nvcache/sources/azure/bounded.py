"""HTTP for Azure's SDK: every answer is read whole, within a time and a size, trusting what the ranged reader trusts. It knows nothing of Azure.

requests limits each wait for bytes but no answer: a server that sends a byte now and then would hold its caller for ever.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, ReadTimeoutError

SILENCE_S = 10.0  # longest wait for a connection or for the next bytes of an answer
ANSWER_S = 30.0  # for a whole answer
BODY_LIMIT = 64 * 2**20
REFUSAL_LIMIT = 2**20  # of an error's body, which is not needed: its headers say what it is
TAG_LIMIT = 2**20  # in XML, where each costs the parser half a KiB and the whole process time; a page of 5,000 blobs has some 300,000
PIECE = 64 * 2**10
POOL = 32  # connections kept


def session(trusted: ssl.SSLContext, proxy: str | None, answer_s: float = ANSWER_S) -> requests.Session:
    """A session that takes nothing from the environment."""
    made = requests.Session()
    made.trust_env = False
    made.headers["Accept-Encoding"] = "identity"
    made.proxies = {"http": proxy, "https": proxy} if proxy else {}
    for scheme in ("http://", "https://"):
        made.mount(scheme, _Bounded(trusted, answer_s))
    return made


class _Bounded(HTTPAdapter):
    """Answers come whole or not at all."""

    def __init__(self, trusted: ssl.SSLContext, answer_s: float) -> None:
        self._trusted = trusted
        self._answer_s = answer_s
        super().__init__(pool_maxsize=POOL)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._trusted, **kwargs)
        _bound(self.poolmanager, self._answer_s)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._trusted, **kwargs)
        _bound(manager, self._answer_s)
        return manager

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing to add: the context knows what to trust, and requests would load its own bundle into it."""

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: dict[str, str] | None = None,
    ) -> requests.Response:
        """See `HTTPAdapter`. Raises requests' own errors."""
        deadline = time.monotonic() + self._answer_s
        response = super().send(request, True, timeout, verify, cert, proxies)
        try:
            response.raw = _whole(response.raw, request.method, deadline)
        except ReadTimeoutError as error:
            response.close()
            raise requests.ReadTimeout(error, request=request) from error
        except HTTPError as error:
            response.close()
            raise requests.ConnectionError(error, request=request) from error
        return response


class _Timely(io.RawIOBase):
    """What a connection brings, until a moment: also a head, a chunk's length or a trailer that comes byte by byte ends then."""

    def __init__(self, raw: io.RawIOBase, deadline: float) -> None:
        self._raw, self._deadline = raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TimeoutError("no whole answer in time")
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _bound(manager: PoolManager, answer_s: float) -> None:
    """Have connections that `manager` makes take `answer_s` seconds for an answer at most."""

    def answer(sock: socket.socket, **kwargs: Any) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, **kwargs)
        response.fp = io.BufferedReader(_Timely(response.fp.detach(), time.monotonic() + answer_s))
        return response

    class Plain(HTTPConnectionPool):
        ConnectionCls = type("Plain", (HTTPConnection,), {"response_class": staticmethod(answer)})

    class Secure(HTTPSConnectionPool):
        ConnectionCls = type("Secure", (HTTPSConnection,), {"response_class": staticmethod(answer)})

    manager.pool_classes_by_scheme = {"http": Plain, "https": Secure}


def _whole(raw: BaseHTTPResponse, method: str | None, deadline: float) -> HTTPResponse:
    """The same answer with its body in memory."""
    body, unused = bytearray(), {"transfer-encoding"}
    while piece := raw.read1(PIECE, decode_content=False):
        body += piece
        if time.monotonic() > deadline:
            raise ReadTimeoutError(None, None, "no whole answer in time")  # type: ignore[arg-type]  # it is only printed
        if len(body) > BODY_LIMIT:
            raise HTTPError(f"the answer is longer than {BODY_LIMIT >> 20} MiB")
        if raw.status >= 400 and len(body) > REFUSAL_LIMIT:
            body.clear()
            raw.close()
            unused |= {"content-length"}
            break
    if "xml" in raw.headers.get("Content-Type", "").lower() and body.count(b"<") > TAG_LIMIT:
        raise HTTPError(f"the answer has more than {TAG_LIMIT:,} tags")
    headers = {name: value for name, value in raw.headers.items() if name.lower() not in unused}
    return HTTPResponse(io.BytesIO(body), headers, raw.status, reason=raw.reason, preload_content=False, decode_content=False, request_method=method)
