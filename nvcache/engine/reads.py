"""Knows whether a scrub has a file open just now, for whoever asks the kernel which models are in use: our own reading is none. It reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

T = TypeVar("T")
TRIES = 3
PATIENCE = 5.0  # seconds to wait for a piece to be read, or for the kernel's answer


class Reads:
    """The pieces that are being read in one store. All methods belong to the event loop."""

    def __init__(self) -> None:
        self._reading = _Nobody()
        self._asking = _Nobody()

    @asynccontextmanager
    async def piece(self) -> AsyncIterator[_Piece]:
        """One piece, begun while nobody asks; what is yielded is told by the workers when it is read and when it waits."""
        await self._asking.gone()
        piece = _Piece(self._reading)
        try:
            yield piece
        finally:
            piece.runs(False)

    async def beside(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` finds in use; asked again where that may have been a piece, which had waited for a worker, read just then."""
        self._asking.come()
        try:
            for _ in range(TRIES):
                await self._reading.gone()
                before = self._reading.times
                found = await ask()
                if not found or (self._reading.count == 0 and self._reading.times == before):
                    break
            return found
        finally:
            self._asking.go()


class _Nobody:
    """Counts who comes and goes, and lets others wait until nobody is there."""

    def __init__(self) -> None:
        self.count = self.times = 0
        self._none = asyncio.Event()
        self._none.set()

    def come(self) -> None:
        self.count, self.times = self.count + 1, self.times + 1
        self._none.clear()

    def go(self) -> None:
        self.count -= 1
        if self.count == 0:
            self._none.set()

    async def gone(self) -> None:
        """Wait, for a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._none.wait()


class _Piece:
    """One piece, as `Workers.run` tells of it."""

    def __init__(self, reading: _Nobody) -> None:
        self._reading = reading
        self._runs = False

    def runs(self, running: bool) -> None:
        """It has its lane, or waits for it."""
        if running is not self._runs:
            self._runs = running
            (self._reading.come if running else self._reading.go)()

    def trouble(self, code: str, pause: float, why: str) -> None:
        """No source is asked."""
