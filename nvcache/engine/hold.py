"""What this process has open of one store: the lock, and the threads that touch its files. What they do there is others' business."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from nvcache.engine.blocking import DaemonExecutor
from nvcache.errors import NvcacheError
from nvcache.store.root import Root


class Hold:
    """The hold on the store at `store`; `make` lets a missing directory become one. Every call that touches the store runs on its threads."""

    def __init__(self, store: Path, *, make: bool) -> None:
        self.store = store
        self.disk = DaemonExecutor("disk", 8)
        self.checks = DaemonExecutor("check", 4)  # for look-ups: a disk that does not answer must not hold up other work
        self.share = DaemonExecutor("share", 16)  # one for each answer that sends a blob to another node
        self._make = make
        self._root: Root | None = None

    async def take(self) -> Root:
        """Open the store, for as long as the disk takes. Raises what `Root.open` raises."""
        return await self.disk.call(self._open)

    async def release(self, why: Callable[[], NvcacheError]) -> None:
        """Refuse calls with `why()`, wait for those that run, for as long as the disk takes, and give the lock back."""
        for threads in (self.disk, self.checks, self.share):
            await asyncio.wrap_future(threads.close(why))
        if self._root is not None:
            self._root.close()

    def _open(self) -> Root:
        """The root is noted here, on the thread: it has to be closed also when nobody waits for it any more."""
        self._root = Root.open(self.store, make=self._make)
        return self._root
