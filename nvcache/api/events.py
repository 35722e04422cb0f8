"""One model's changes as server-sent events (the HTML standard's text/event-stream). It decides no state and keeps no history.

First a `snapshot`, then a `change` for every later state, each the whole model; at most four a second, newer ones replacing older ones. `id` only
grows, also across reconnects that send `Last-Event-ID`. A comment every ten seconds shows that the daemon lives. The stream ends when the model is
ready, failed or gone, when the daemon stops, and for a reader that does not take what it is sent.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nvcache.api import wire
from nvcache.api.limits import Lifecycle, abort, extend
from nvcache.core.states import ModelState
from nvcache.engine.status import ModelStatus

GAP_SECONDS = 0.25
HEARTBEAT_SECONDS = 10.0
SLOW_SECONDS = 5.0
RETRY_MS = 1000
ENDS = frozenset({ModelState.READY, ModelState.FAILED, ModelState.ABSENT})


class EventStream(Response):
    """The response that follows `queue` until it ends; `stack` holds the subscription open and is closed with the stream."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, queue: asyncio.Queue[ModelStatus | None], stack: AsyncExitStack, lifecycle: Lifecycle) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._queue = queue
        self._stack = stack
        self._lifecycle = lifecycle
        self._id = _last_id(request)
        self._latest: ModelStatus | None = None
        self._news = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end; whoever ends it, the subscription and the helper tasks are gone afterwards."""
        extend(self._request, None)
        helpers = [
            asyncio.create_task(self._take(), name="events-take"),
            asyncio.create_task(_gone(receive), name="events-gone"),
            asyncio.create_task(self._lifecycle.stopping.wait(), name="events-stop"),
        ]
        async with self._stack:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self._stream(helpers, send)
            except TimeoutError:
                abort(scope)
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, helpers: list[asyncio.Task[bool]], send: Send) -> None:
        take, *ends = helpers
        await _say(send, f"retry: {RETRY_MS}\n\n".encode())
        kind = "snapshot"
        while not any(task.done() for task in ends):
            news = asyncio.create_task(self._news.wait(), name="events-news")
            try:
                await asyncio.wait({news, take, *ends}, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            if self._latest is not None:
                status, self._latest = self._latest, None
                self._news.clear()
                self._id += 1
                await _say(send, b"id: %d\nevent: %s\ndata: %s\n\n" % (self._id, kind.encode(), wire.to_json(status)))
                if status.state in ENDS:
                    return
                kind = "change"
                await asyncio.wait(ends, timeout=GAP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            elif take.done():  # the engine dropped the subscription
                return
            elif not any(task.done() for task in ends):
                await _say(send, b": alive\n\n")

    async def _take(self) -> bool:
        """Keep only the newest snapshot, so that the engine's queue never fills while the reader is being sent the last one."""
        while (status := await self._queue.get()) is not None:
            self._latest = status
            self._news.set()
        return True


async def _say(send: Send, data: bytes) -> None:
    message: Message = {"type": "http.response.body", "body": data, "more_body": True}
    async with asyncio.timeout(SLOW_SECONDS):
        await send(message)


async def _gone(receive: Receive) -> bool:
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


def _last_id(request: Request) -> int:
    text = request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else 0
