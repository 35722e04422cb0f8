"""Tells watchers of an entry what changes, at most four times a second each, never waiting for a slow one. It computes no status itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from nvcache.core.ref import EntryId
from nvcache.engine.status import ModelStatus

DEPTH = 16  # snapshots a watcher may be behind before it is dropped
PAUSE = 0.25  # seconds between two snapshots of one entry

Watcher = asyncio.Queue[ModelStatus | None]


class Watchers:
    """Queues by entry. A watcher that falls `DEPTH` snapshots behind gets None as its last item."""

    def __init__(self, status: Callable[[EntryId], ModelStatus | None]) -> None:
        self._status = status
        self._queues: dict[EntryId, set[Watcher]] = {}
        self._due: dict[EntryId, asyncio.TimerHandle] = {}

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
        if entry in self._queues and entry not in self._due:
            self._due[entry] = asyncio.get_running_loop().call_later(PAUSE, self._tell, entry)

    def close(self) -> None:
        """Drop every watcher."""
        for handle in self._due.values():
            handle.cancel()
        self._due.clear()
        for queues in self._queues.values():
            for queue in queues:
                _end(queue)

    def _tell(self, entry: EntryId) -> None:
        self._due.pop(entry, None)
        status = self._status(entry)
        for queue in list(self._queues.get(entry, ())):
            if status is None or queue.full():
                self._queues[entry].discard(queue)
                _end(queue)
            else:
                queue.put_nowait(status)


def _end(queue: Watcher) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(None)
