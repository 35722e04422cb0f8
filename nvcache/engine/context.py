"""What the engine's rooms share: one object with the opened store, the sources, the workers and the shelf. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from nvcache.core.ref import EntryId, Scheme
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.declared import Declared
from nvcache.engine.kaito import Kaito
from nvcache.engine.ledger import Ledger
from nvcache.engine.reads import Reads
from nvcache.engine.rescue import Rescue
from nvcache.engine.shelf import Entry, Shelf
from nvcache.engine.status import Counters
from nvcache.engine.timeline import Timeline
from nvcache.engine.workers import Workers
from nvcache.errors import NvcacheError, SourceError
from nvcache.sources.base import Source
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import Catalog, EntryState
from nvcache.store.layout import Layout
from nvcache.store.receipts import read_receipt, receipt_keys
from nvcache.store.views import Views

P = ParamSpec("P")
T = TypeVar("T")


class Locks:
    """Locks by name, made when first asked for and forgotten when nobody holds or awaits them."""

    def __init__(self) -> None:
        self._locks: dict[object, tuple[asyncio.Lock, int]] = {}

    def __call__(self, name: object) -> AbstractAsyncContextManager[None]:
        return _Held(self, name)

    async def acquire(self, name: object) -> None:
        """Take the lock `name`."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            await lock.acquire()
        except asyncio.CancelledError:
            self._leave(name)
            raise

    def held(self, name: object) -> bool:
        """Whether somebody has or awaits the lock `name`."""
        return name in self._locks

    def release(self, name: object) -> None:
        """Give the lock `name` back."""
        self._locks[name][0].release()
        self._leave(name)

    def _leave(self, name: object) -> None:
        lock, users = self._locks[name]
        if users == 1:
            del self._locks[name]
        else:
            self._locks[name] = (lock, users - 1)


class _Held(AbstractAsyncContextManager[None]):
    def __init__(self, locks: Locks, name: object) -> None:
        self._locks, self._name = locks, name

    async def __aenter__(self) -> None:
        await self._locks.acquire(self._name)

    async def __aexit__(self, *_: object) -> None:
        self._locks.release(self._name)


@dataclass
class Context:
    """Everything a fill, a repair or a look-up needs. `entry_locks` serialise what changes one entry, `key_locks` what makes one blob.

    `state_locks` serialise what is decided of one entry, from reading its state to having written the next: they are taken after an entry's lock and
    before that of a Hub name, and held for no longer than that.
    """

    layout: Layout
    blobs: Blobs
    views: Views
    catalog: Catalog
    ledger: Ledger
    workers: Workers
    rescue: Rescue
    kaito: Kaito
    declared: Declared
    timeline: Timeline
    sources: Mapping[Scheme, Source]
    disk: DaemonExecutor  # short file work
    net: DaemonExecutor  # resolving and listing
    version: str
    changed: Callable[[EntryId], None]  # an entry's state changed: tell the watchers
    doubt: Callable[[NvcacheError], None]  # something failed: if it was the disk, whoever keeps the disks should look
    shelf: Shelf = field(default_factory=Shelf)
    counters: Counters = field(default_factory=Counters)
    entry_locks: Locks = field(default_factory=Locks)
    key_locks: Locks = field(default_factory=Locks)
    state_locks: Locks = field(default_factory=Locks)
    reads: Reads = field(default_factory=Reads)

    async def ask(self, scheme: Scheme, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a source answers; its failures are counted."""
        try:
            return await self.net.call(call, *args, **kwargs)
        except SourceError as error:
            self.counters.source_failed(str(scheme), str(error.code))
            raise

    async def decide(self, entry: Entry, change: Callable[[EntryState], EntryState]) -> None:
        """Remember of an entry what `change` makes of its state; of one that is gone, nothing. Raises `SpaceError`, `DiskError`."""
        async with self.state_locks(entry.id):
            state = change(entry.state)
            if state != entry.state and not entry.removing and self.shelf.entries.get(entry.id) is entry:
                await self.disk.call(self.catalog.write_state, entry.id, state)
                entry.state = state

    def receipted(self) -> set[str]:
        """The SHA-256 of every blob that a receipt speaks of."""
        found = (read_receipt(self.layout, key) for key in receipt_keys(self.layout))
        return {receipt.sha256 for receipt in found if receipt is not None}
