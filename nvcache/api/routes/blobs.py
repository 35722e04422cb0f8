"""Blobs: the bytes of ready models by SHA-256, for other nodes. Off unless `share_blobs`; never a path, never what is not proven."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from nvcache.api import schemas
from nvcache.api.limits import LAST_SECONDS, abort, extend
from nvcache.api.ranges import Span, asked
from nvcache.api.routes.common import admit, engine_of
from nvcache.api.scope import Scope, came_locally
from nvcache.engine.engine import Sharing
from nvcache.errors import Code, NvcacheError, RequestError

router = APIRouter(prefix="/v1", tags=["blobs"], responses=schemas.PROBLEMS)
Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the content, in lower-case hex")]
HAND_OVER = "nvcache.hand-over"  # the key in an ASGI scope's state under which `serve` leaves `Connection.hand_over`
_BYTES: dict[str, Any] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the bytes, or for HEAD their number", **_BYTES},
    206: {"description": "the range that was asked for", **_BYTES},
    304: {"description": "the caller has it"},
    412: {"description": "If-Match names another content"},
    416: {"description": "the range is outside of it"},
}


@router.get("/blobs/{sha256}", response_class=Response, responses=ANSWERS)
async def read(request: Request, sha256: Sha256) -> Response:
    """The bytes that have this SHA-256, where a ready model has them; whole, or one range. For `[[mirrors]]` of other nodes."""
    return await _answer(request, sha256)


@router.head("/blobs/{sha256}", response_class=Response, responses={200: {"description": "it is here; Content-Length is its size"}})
async def look(request: Request, sha256: Sha256) -> Response:
    """Whether a ready model has these bytes, and how many they are."""
    return await _answer(request, sha256)


async def _answer(request: Request, sha256: str) -> Response:
    # A pod on a socket is shown models by what is mounted into it; by their digests it would have them all.
    await admit(request, Scope.ADMIN if came_locally(request) else Scope.READ, f"read blob {sha256[:12]}…")
    engine = engine_of(request)
    if not engine.settings.share_blobs:
        raise RequestError(Code.NOT_ALLOWED, f"cannot share blob {sha256[:12]}…: this daemon shares none", hint="set share_blobs = true there")
    async with AsyncExitStack() as stack:
        blob = await stack.enter_async_context(engine.share(sha256))
        tag = f'"{sha256}"'
        headers = {name: value for name, value in request.headers.items() if request.method == "GET" or name != "range"}
        span = asked(headers, tag, blob.size)
        return _Bytes(request, blob, span, tag, stack.pop_all())


class _Bytes(Response):
    """The answer; `stack` keeps the store open until the last byte is sent."""

    def __init__(self, request: Request, blob: Sharing, span: Span, tag: str, stack: AsyncExitStack) -> None:
        super().__init__(status_code=span.status)
        self._request, self._blob, self._span, self._stack = request, blob, span, stack
        self.headers["etag"] = tag
        self.headers["accept-ranges"] = "bytes"
        self.headers["cache-control"] = "private, max-age=31536000, immutable"
        if span.status in (200, 206):
            self.headers["content-type"] = "application/octet-stream"
            self.headers["content-length"] = str(span.length)
        elif span.status == 304:
            del self.headers["content-length"]
        if content_range := span.content_range(blob.size):
            self.headers["content-range"] = content_range

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Send it. Once it has begun, what goes wrong can only be told by an end that comes too early."""
        extend(self._request, None)  # bounded by what the other side takes, see `engine.share`
        try:
            async with self._stack:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                if self._span.length and self._request.method == "GET":
                    await scope["state"][HAND_OVER](lambda sock: self._blob.send(sock, self._span.start, self._span.length), self._span.length)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (NvcacheError, ConnectionError):
            abort(scope)
            extend(self._request, LAST_SECONDS)  # a request that others wait behind is not told that its caller is gone
            while (await receive())["type"] != "http.disconnect":
                pass
