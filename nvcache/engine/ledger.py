"""The store's room: what is used, what was promised, what may still be admitted, and which blobs may go. It measures the disk, evicts nothing.

Admission and the removal of blobs exclude each other: a fill that counts on a blob has said so before anybody looks whether the blob may go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from nvcache.core.space import Room, admit, effective_limit
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.status import SpaceStatus
from nvcache.store.blobs import Blobs
from nvcache.store.ingest import discard
from nvcache.store.layout import Layout
from nvcache.store.receipts import drop_receipt, read_receipt, receipt_keys
from nvcache.store.room import allocated, measure

DISK_TIMEOUT = 30.0  # seconds a measurement may take before the disk counts as stalled
COMMIT_GRACE = 60.0  # seconds between a blob and its receipt, at the very most


class Promise:
    """Space admitted to one fill: `needs` by ingest key, the `keys` of all its files, and the `blobs` it counts on or made (SHA-256).

    Two fills of the same content both hold it; it counts once.
    """

    def __init__(self, ledger: Ledger, needs: Mapping[str, int], keys: Iterable[str], blobs: Iterable[str]) -> None:
        self.needs = dict(needs)
        self.keys = frozenset(keys)
        self.blobs = set(blobs)
        self._ledger = ledger

    def __enter__(self) -> Promise:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.promises.discard(self)

    def settle(self, key: str, sha256: str) -> None:
        """The bytes of `key` are there as a blob now."""
        self.needs.pop(key, None)
        self.blobs.add(sha256)


class Ledger:
    """Admits fills and knows the numbers. All methods belong to the event loop.

    `shown` tells the blobs of all entries, ready or not; `broken` those of entries that are being repaired.
    """

    def __init__(
        self,
        layout: Layout,
        blobs: Blobs,
        disk: DaemonExecutor,
        *,
        max_bytes: int | None,
        min_free: int,
        shown: Callable[[], set[str]],
        broken: Callable[[], set[str]],
    ) -> None:
        self.promises: set[Promise] = set()
        self.status = SpaceStatus(0, 0, 0, 0, 0)
        self._layout = layout
        self._blobs = blobs
        self._disk = disk
        self._min_free = min_free
        self._shown = shown
        self._broken = broken
        self._deciding = asyncio.Lock()
        self._limit: int | None = max_bytes

    async def measure(self) -> Room:
        """Look at the disk and refresh `status`. Raises `DiskError` when it fails or does not answer."""
        seen = await self._disk.bounded(DISK_TIMEOUT, "measure the store", measure, self._layout, self._blobs)
        if self._limit is None:
            self._limit = effective_limit(None, seen.free, seen.used)
        reserved = sum(max(0, size - seen.ingests.get(key, 0)) for key, size in self._promised().items())
        self.status = SpaceStatus(self._limit, seen.used, reserved, seen.free, seen.total, seen.quarantined)
        return Room(limit=self._limit, used=seen.used, reserved=reserved, free=seen.free, min_free=self._min_free)

    async def admit(self, what: str, needs: Mapping[str, int], keys: Iterable[str], blobs: Iterable[str] = ()) -> Promise:
        """Promise `needs` (ingest key → bytes) to a fill of `keys` that counts on `blobs`, or raise `SpaceError` with numbers.

        What earlier fills left behind and no running one wants is given up first where that helps.
        """
        async with self._deciding:
            room = await self.measure()
            need = await self._need(needs)
            promise = Promise(self, needs, keys, blobs)
            if need > room.available:
                await self._disk.call(self._drop_idle, *self._wanted(promise), self._broken())
                room = await self.measure()
            admit(room, need, what=what)
            self.promises.add(promise)
            self.status = replace(self.status, reserved=self.status.reserved + need)
            return promise

    async def check(self, what: str, needs: Mapping[str, int]) -> None:
        """Raise what `admit` would, promising nothing."""
        room = await self.measure()
        admit(room, await self._need(needs), what=what)

    async def free(self, keys: Iterable[str], blobs: Iterable[str], work: Callable[[], None] | None = None) -> None:
        """Do `work` (blocking), then remove those ingests and blobs that no entry and no running fill wants, and copies of theirs in quarantine."""
        async with self._deciding:
            wanted_keys, wanted = self._wanted()
            await self._disk.call(self._free, set(keys) - wanted_keys, set(blobs) - wanted, wanted, work)
        await self.measure()

    def _free(self, keys: set[str], blobs: set[str], wanted: set[str], work: Callable[[], None] | None) -> None:
        if work is not None:
            work()
        for key in keys:
            receipt = read_receipt(self._layout, key)
            discard(self._layout, key)
            drop_receipt(self._layout, key)
            if receipt is not None and receipt.sha256 not in wanted:
                blobs.add(receipt.sha256)
        for sha256 in blobs:
            self._blobs.remove_if_unreferenced(sha256, grace=0)
        self._blobs.drop_quarantined(wanted)

    def _drop_idle(self, keys: set[str], wanted: set[str], broken: set[str]) -> None:
        for key in allocated(self._layout):
            if key not in keys:
                discard(self._layout, key)
        receipts = (read_receipt(self._layout, key) for key in receipt_keys(self._layout) if key in keys)
        keep = wanted | {receipt.sha256 for receipt in receipts if receipt is not None}
        self._blobs.drop_quarantined(broken)  # mended ones were kept for a person to look at, as long as there was room
        for sha256, _ in list(self._blobs.unreferenced(keep, grace=COMMIT_GRACE)):
            self._blobs.remove_if_unreferenced(sha256, grace=COMMIT_GRACE)

    async def _need(self, needs: Mapping[str, int]) -> int:
        """What must be new for `needs`: not promised already, and not held by the ingest of an earlier try, which `used` counts."""
        promised = self._promised()
        held = await self._disk.call(allocated, self._layout)
        return sum(max(0, size - held.get(key, 0)) for key, size in needs.items() if key not in promised)

    def _promised(self) -> dict[str, int]:
        return {key: size for promise in self.promises for key, size in promise.needs.items()}

    def _wanted(self, *more: Promise) -> tuple[set[str], set[str]]:
        """The ingest keys and the blobs that running fills (and `more`) count on, and the blobs of every entry."""
        promises = [*self.promises, *more]
        keys: set[str] = set().union(*(promise.keys for promise in promises))
        return keys, self._shown().union(*(promise.blobs for promise in promises))
