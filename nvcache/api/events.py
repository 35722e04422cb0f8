"""Changes as server-sent events (the HTML standard's text/event-stream), of one model or of all. It decides no state and keeps no history.

First a `snapshot` of each model, then a `change` for every later state, each the whole model; at most four rounds a second, newer states replacing
older ones. `id` only grows, also across reconnects that send `Last-Event-ID`. A comment every ten seconds shows that the daemon lives. The stream of
one model ends when it is ready, failed or gone; that of all goes on, and says `absent` of one that is gone. Both end when the daemon stops, with a
`problem` when the disks go, and for a reader that does not take what it is sent.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nvcache.api import wire
from nvcache.api.limits import Lifecycle, abort, extend
from nvcache.core.states import ModelState
from nvcache.engine.status import ErrorInfo, ModelStatus
from nvcache.engine.watch import Changes, Watcher

GAP_SECONDS = 0.25
HEARTBEAT_SECONDS = 10.0
SLOW_SECONDS = 5.0
RETRY_MS = 1000
PART = 4  # models of a snapshot that are sent before it is others' turn: many readers at once must not hold up a probe
ENDS = frozenset({ModelState.READY, ModelState.FAILED, ModelState.ABSENT})


class Stream(Response, ABC):
    """The response that follows a subscription until it ends; `stack` holds it open and is closed with the stream."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, stack: AsyncExitStack, lifecycle: Lifecycle) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._stack = stack
        self._lifecycle = lifecycle
        self._id = _last_id(request)
        self._news = asyncio.Event()
        self._kind = "snapshot"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end; whoever ends it, the subscription and the helper tasks are gone afterwards."""
        extend(self._request, None)
        helpers = [
            asyncio.create_task(self._listen(), name="events-listen"),
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
        listening, *ends = helpers
        await _say(send, f"retry: {RETRY_MS}\n\n".encode())
        while not any(task.done() for task in ends):
            news = asyncio.create_task(self._news.wait(), name="events-news")
            try:
                await asyncio.wait({news, listening, *ends}, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            self._news.clear()
            latest = self._take()
            for each in latest:
                self._id += 1
                kind = "problem" if isinstance(each, ErrorInfo) else self._kind
                await _say(send, b"id: %d\nevent: %s\ndata: %s\n\n" % (self._id, kind.encode(), wire.to_json(each)))
                if isinstance(each, ErrorInfo) or self._ends(each):
                    return
            if latest:
                self._kind = "change"
                await asyncio.wait(ends, timeout=0 if self._more() else GAP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            elif listening.done():  # the engine dropped the subscription
                return
            elif not any(task.done() for task in ends):
                await _say(send, b": alive\n\n")

    @abstractmethod
    async def _listen(self) -> bool:
        """Set `_news` whenever there is something to take; returns when nothing more will come."""

    @abstractmethod
    def _take(self) -> list[ModelStatus | ErrorInfo]:
        """What is to be sent next."""

    def _more(self) -> bool:
        """Whether what was taken was not all of the snapshot."""
        return False

    @abstractmethod
    def _ends(self, status: ModelStatus) -> bool:
        """Whether that was the last that is of interest."""


class EventStream(Stream):
    """One model's changes, from `queue`."""

    def __init__(self, request: Request, queue: Watcher, stack: AsyncExitStack, lifecycle: Lifecycle) -> None:
        super().__init__(request, stack, lifecycle)
        self._queue = queue
        self._latest: ModelStatus | ErrorInfo | None = None

    async def _listen(self) -> bool:
        """Keep only the newest state, so that the engine's queue never fills while the reader is being sent the last one."""
        while (latest := await self._queue.get()) is not None:
            self._latest = latest
            self._news.set()
            if isinstance(latest, ErrorInfo):
                break
        return True

    def _take(self) -> list[ModelStatus | ErrorInfo]:
        latest, self._latest = self._latest, None
        return [] if latest is None else [latest]

    def _ends(self, status: ModelStatus) -> bool:
        return status.state in ENDS


class AllEvents(Stream):
    """All models, as they are and as they change: what `changes` tells."""

    def __init__(self, request: Request, changes: Changes, stack: AsyncExitStack, lifecycle: Lifecycle) -> None:
        super().__init__(request, stack, lifecycle)
        self._changes = changes
        if changes.more:
            self._news.set()

    async def _listen(self) -> bool:
        while not self._changes.over:
            await self._changes.wait()
            self._news.set()
        return True

    def _take(self) -> list[ModelStatus | ErrorInfo]:
        here = self._changes.take_here(PART)
        self._kind = "snapshot" if here else "change"
        if here and self._changes.waiting:
            self._news.set()
        return [*here] or self._changes.take()

    def _more(self) -> bool:
        return self._changes.more

    def _ends(self, status: ModelStatus) -> bool:
        return False


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
