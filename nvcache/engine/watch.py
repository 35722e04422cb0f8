"""Tells watchers of an entry what changes, at most four times a second each, never waiting for a slow one. It computes no status itself.

`Bell` is for one listener who wants to know only that something changed, of whatever entry, job or stripe.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

from nvcache.core.ref import EntryId
from nvcache.core.states import ModelState
from nvcache.engine.status import ErrorInfo, ModelStatus

DEPTH = 16  # snapshots a watcher may be behind before it is dropped
PAUSE = 0.25  # seconds between two snapshots of one entry

Watcher = asyncio.Queue[ModelStatus | ErrorInfo | None]


class Bell:
    """Tells one listener that something changed, not what. However often it rings until he listens again is once."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Something changed."""
        self._rung.set()

    async def listen(self, seconds: float) -> None:
        """Return once it rang since the last time, or after `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()


class Changes:
    """What is here, then what changed since it was last asked, for one reader: what he hears, however slow he is, is how it is when he asks.

    Only names are kept for him, so that a thousand readers who take nothing cost next to nothing.
    """

    def __init__(self, status: Callable[[EntryId], ModelStatus | None], here: Iterable[EntryId] = ()) -> None:
        self._status = status
        self._here = deque(here)
        self._changed: dict[EntryId, None] = {}
        self._rung = asyncio.Event()
        self._why: ErrorInfo | None = None
        self.over = False  # nothing more will come

    @property
    def more(self) -> bool:
        """Whether there is more to take of what was here."""
        return bool(self._here)

    @property
    def waiting(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._here or self._changed or self._why)

    def ring(self, *entries: EntryId) -> None:
        """These changed."""
        self._changed.update(dict.fromkeys(entries))
        self._rung.set()

    def close(self, why: ErrorInfo | None) -> None:
        """Nothing more will come, and why if there is something to tell."""
        self.over, self._why = True, why
        self._rung.set()

    async def wait(self) -> None:
        """Until there is something to take."""
        await self._rung.wait()
        self._rung.clear()

    def take_here(self, most: int) -> list[ModelStatus]:
        """The next of the models that were here at the beginning, as they are now; none when all were taken."""
        found: list[ModelStatus] = []
        while self._here and len(found) < most:
            entry = self._here.popleft()
            if (status := self._status(entry)) is not None:
                self._changed.pop(entry, None)
                found.append(status)
        return found

    def take(self) -> list[ModelStatus | ErrorInfo]:
        """Every model that changed, as it is now, one that is gone as absent; last an error when there will be no more."""
        changed, self._changed = self._changed, {}
        found: list[ModelStatus | ErrorInfo] = [self._status(entry) or absent(entry) for entry in changed]
        return [*found, *([self._why] if self._why is not None else [])]


def absent(entry: EntryId) -> ModelStatus:
    """One that the node has not, or no longer."""
    return ModelStatus(str(entry), str(entry), entry.revision, ModelState.ABSENT, 0, 0)


class Watchers:
    """Queues by entry. A watcher's last item is None when it fell `DEPTH` snapshots behind or the entry is gone, an error when all are dropped."""

    def __init__(self, status: Callable[[EntryId], ModelStatus | None], bell: Bell) -> None:
        self._status = status
        self._bell = bell
        self._queues: dict[EntryId, set[Watcher]] = {}
        self._due: dict[EntryId, asyncio.TimerHandle] = {}
        self._changes: set[Changes] = set()

    @asynccontextmanager
    async def watch_all(self, here: Iterable[EntryId]) -> AsyncIterator[Changes]:
        """Those that are `here`, then the changes of all entries from now on."""
        changes = Changes(self._status, here)
        self._changes.add(changes)
        try:
            yield changes
        finally:
            self._changes.discard(changes)

    @asynccontextmanager
    async def watch(self, entry: EntryId) -> AsyncIterator[Watcher]:
        """A queue that starts with the entry's status now."""
        queue: Watcher = asyncio.Queue(DEPTH)
        first = self._status(entry)
        if first is not None:
            queue.put_nowait(first)
        self._queues.setdefault(entry, set()).add(queue)
        try:
            yield queue
        finally:
            left = self._queues.get(entry, set())
            left.discard(queue)
            if not left:
                self._queues.pop(entry, None)

    def changed(self, entry: EntryId) -> None:
        """Something about `entry` changed: its watchers hear of it within `PAUSE` seconds, once for all changes until then."""
        self._bell.ring()
        for changes in self._changes:
            changes.ring(entry)
        if entry in self._queues and entry not in self._due:
            self._due[entry] = asyncio.get_running_loop().call_later(PAUSE, self._tell, entry)

    def close(self, why: ErrorInfo | None) -> None:
        """Drop every watcher, and tell them why if there is something to tell."""
        for handle in self._due.values():
            handle.cancel()
        self._due.clear()
        for queues in self._queues.values():
            for queue in queues:
                _end(queue, why)
        for changes in self._changes:
            changes.close(why)

    def _tell(self, entry: EntryId) -> None:
        self._due.pop(entry, None)
        status = self._status(entry)
        for queue in list(self._queues.get(entry, ())):
            if status is None or queue.full():
                self._queues[entry].discard(queue)
                _end(queue)
            else:
                queue.put_nowait(status)


def _end(queue: Watcher, why: ErrorInfo | None = None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(why)
