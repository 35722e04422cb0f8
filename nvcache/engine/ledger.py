"""The store's room: what is used, what was promised to fills, what may still be admitted. It measures the disk and evicts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace

from nvcache.core.space import Room, admit, effective_limit
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.status import SpaceStatus
from nvcache.store.blobs import Blobs
from nvcache.store.ingest import discard
from nvcache.store.layout import Layout
from nvcache.store.receipts import read_receipt, receipt_keys
from nvcache.store.room import allocated, measure

DISK_TIMEOUT = 30.0  # seconds a measurement may take before the disk counts as stalled
COMMIT_GRACE = 60.0  # seconds between a blob and its receipt, at the very most


class Promise:
    """Space admitted to one fill: `needs` by ingest key, and the `keys` of everything it made or found. What two fills share counts once."""

    def __init__(self, ledger: Ledger, needs: Mapping[str, int], keys: Iterable[str]) -> None:
        self.needs = dict(needs)
        self.keys = frozenset(keys)
        self._ledger = ledger

    def __enter__(self) -> Promise:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.promises.discard(self)

    def settle(self, key: str) -> None:
        """The bytes of `key` are there as a blob now."""
        self.needs.pop(key, None)


class Ledger:
    """Admits fills and knows the numbers. All methods belong to the event loop."""

    def __init__(self, layout: Layout, blobs: Blobs, disk: DaemonExecutor, max_bytes: int | None, min_free: int) -> None:
        self.promises: set[Promise] = set()
        self.status = SpaceStatus(0, 0, 0, 0, 0)
        self._layout = layout
        self._blobs = blobs
        self._disk = disk
        self._min_free = min_free
        self._admitting = asyncio.Lock()
        self._limit: int | None = max_bytes

    async def measure(self) -> Room:
        """Look at the disk and refresh `status`. Raises `DiskError` when it fails or does not answer."""
        seen = await self._disk.bounded(DISK_TIMEOUT, "measure the store", measure, self._layout, self._blobs)
        if self._limit is None:
            self._limit = effective_limit(None, seen.free, seen.used)
        reserved = sum(max(0, size - seen.ingests.get(key, 0)) for key, size in self._promised().items())
        self.status = SpaceStatus(self._limit, seen.used, reserved, seen.free, seen.total, seen.quarantined)
        return Room(limit=self._limit, used=seen.used, reserved=reserved, free=seen.free, min_free=self._min_free)

    async def admit(self, what: str, needs: Mapping[str, int], keys: Iterable[str]) -> Promise:
        """Promise `needs` (ingest key → bytes) to a fill of `keys`, or raise `SpaceError` with numbers.

        What earlier fills left behind and no running one wants is given up first where that helps.
        """
        async with self._admitting:
            room = await self.measure()
            need = await self._need(needs)
            promise = Promise(self, needs, keys)
            if need > room.available:
                await self._disk.call(self._drop_idle, promise.keys.union(*(other.keys for other in self.promises)))
                room = await self.measure()
            admit(room, need, what=what)
            self.promises.add(promise)
            self.status = replace(self.status, reserved=self.status.reserved + need)
            return promise

    async def check(self, what: str, needs: Mapping[str, int]) -> None:
        """Raise what `admit` would, promising nothing."""
        room = await self.measure()
        admit(room, await self._need(needs), what=what)

    async def _need(self, needs: Mapping[str, int]) -> int:
        """What must be new for `needs`: not promised already, and not held by the ingest of an earlier try, which `used` counts."""
        promised = self._promised()
        held = await self._disk.call(allocated, self._layout)
        return sum(max(0, size - held.get(key, 0)) for key, size in needs.items() if key not in promised)

    def _promised(self) -> dict[str, int]:
        return {key: size for promise in self.promises for key, size in promise.needs.items()}

    def _drop_idle(self, wanted: frozenset[str]) -> None:
        for key in allocated(self._layout):
            if key not in wanted:
                discard(self._layout, key)
        receipts = {key: read_receipt(self._layout, key) for key in receipt_keys(self._layout)}
        keep = {receipt.sha256 for key, receipt in receipts.items() if receipt and key in wanted}
        self._blobs.forget_mended()
        for sha256, _ in list(self._blobs.unreferenced(keep, grace=COMMIT_GRACE)):
            self._blobs.remove_if_unreferenced(sha256, grace=COMMIT_GRACE)
