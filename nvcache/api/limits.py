"""Bounds every request in time and size, as plain ASGI middleware. It looks at no path and no content.

A request that outlives its limit is answered with a problem (timeout; stopping when the daemon is on its way out). A handler that needs longer
moves its own deadline with `extend`; an event stream removes it, and is ended by `Lifecycle.stopping`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nvcache.api import problems
from nvcache.errors import Code

BODY_BYTES = 64 * 1024
REQUEST_SECONDS = 30.0
DRY_RUN_SECONDS = 150.0  # a source may take two minutes to list a repository
LAST_SECONDS = 1.0  # what a request still gets once the daemon stops
DEADLINE = "nvcache.deadline"
ABORT = "nvcache.abort"  # left in a scope's state by `serve`: drops the connection without waiting for its buffer


@dataclass(slots=True)
class Lifecycle:
    """What the requests in flight share with the one who stops the daemon."""

    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    flights: set[asyncio.Timeout] = field(default_factory=set)

    def stop(self) -> None:
        """End event streams at once and give every other request one more second."""
        self.stopping.set()
        soon = asyncio.get_running_loop().time() + LAST_SECONDS
        for deadline in self.flights:
            when = deadline.when()
            if not deadline.expired() and (when is None or when > soon):
                deadline.reschedule(soon)


class Limits:
    """The middleware; one an application."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, bounded."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(LAST_SECONDS if self._lifecycle.stopping.is_set() else REQUEST_SECONDS) as deadline:
                scope.setdefault("state", {})[DEADLINE] = deadline
                self._lifecycle.flights.add(deadline)
                try:
                    await self._app(scope, _bounded(receive), watched)
                finally:
                    self._lifecycle.flights.discard(deadline)
        except TimeoutError:
            if not deadline.expired():
                raise
            if started:
                abort(scope)
            else:
                await self._too_late(scope)(scope, receive, send)

    def _too_late(self, scope: Scope) -> ASGIApp:
        stopping = self._lifecycle.stopping.is_set()
        code, why = (Code.STOPPING, "the daemon is stopping") if stopping else (Code.TIMEOUT, "it took too long")
        return problems.reply(problems.plain(code, f"cannot {scope['method']} {scope['path']}: {why}"))


def extend(request: Request, seconds: float | None) -> None:
    """Give this request `seconds` from now instead of the usual limit; None: no limit."""
    deadline: asyncio.Timeout = request.scope["state"][DEADLINE]
    deadline.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)


def abort(scope: Scope) -> None:
    """Drop the connection of a peer that does not read; nothing to do where the server did not say how."""
    drop: Callable[[], Any] | None = scope["state"].get(ABORT)
    if drop:
        drop()


def _bounded(receive: Receive) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > BODY_BYTES:
            # the one exception that FastAPI passes on from inside its reading of a body
            raise HTTPException(413, f"the body is larger than {BODY_BYTES} bytes")
        return message

    return counted
