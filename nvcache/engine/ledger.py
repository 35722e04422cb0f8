"""The store's room: what is used, what was promised, what may still be admitted, and which blobs may go. It measures the disk, evicts nothing.

Admission and the removal of blobs exclude each other: a fill that counts on a blob has said so before anybody looks whether the blob may go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from nvcache.core.evict import Eviction
from nvcache.core.space import Room, admit, effective_limit, in_the_way, shortfall
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.status import SpaceStatus
from nvcache.errors import Code, SpaceError
from nvcache.store.blobs import Blobs
from nvcache.store.claim import PATIENCE, POLL
from nvcache.store.ingest import discard
from nvcache.store.layout import Layout
from nvcache.store.receipts import drop_receipt, read_receipt, receipt_keys
from nvcache.store.room import allocated, measure

DISK_TIMEOUT = 30.0  # seconds a measurement may take before the disk counts as stalled
TRIES = 3  # evictions for one fill, where others take the room that was made
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
        self._ledger.promises.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.promises.discard(self)

    def settle(self, key: str, sha256: str) -> None:
        """The bytes of `key` are there as a blob now."""
        self.needs.pop(key, None)
        self.blobs.add(sha256)


class Evicts(Protocol):
    """What can make room. Neither call may wait for what somebody holds who waits to be admitted."""

    async def plan(self, need: int) -> Eviction:
        """What would go."""
        ...

    async def make_room(self, need: int, why: str) -> Eviction:
        """Have it go, if it is enough."""
        ...


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
        self.room = Room(limit=0, used=0, reserved=0, free=0)  # as last measured
        self._layout = layout
        self._blobs = blobs
        self._disk = disk
        self._min_free = min_free
        self._shown = shown
        self._broken = broken
        self._deciding = asyncio.Lock()
        self._limit: int | None = max_bytes
        self.evictor: Evicts | None = None

    async def measure(self) -> Room:
        """Look at the disk and refresh `status` and `room`. Raises `DiskError` when it fails or does not answer."""
        seen = await self._disk.bounded(DISK_TIMEOUT, "measure the store", measure, self._layout, self._blobs)
        if self._limit is None:
            self._limit = effective_limit(None, seen.free, seen.used)
        reserved = sum(max(0, size - seen.ingests.get(key, 0)) for key, size in self._promised().items())
        self.status = SpaceStatus(self._limit, seen.used, reserved, seen.free, seen.total, seen.quarantined)
        self.room = Room(limit=self._limit, used=seen.used, reserved=reserved, free=seen.free, min_free=self._min_free)
        return self.room

    async def admit(self, what: str, needs: Mapping[str, int], keys: Collection[str], blobs: Collection[str] = ()) -> Promise:
        """Promise `needs` (ingest key → bytes) to a fill of `keys` that counts on `blobs`, or raise `SpaceError` with numbers.

        What earlier fills left behind and no running one wants is given up first where that helps, then models are evicted. An error (full) says
        what is in the way.
        """
        with Promise(self, {}, keys, blobs):  # no eviction, not even its own, frees what it counts on
            for left in reversed(range(TRIES)):
                try:
                    return await self._admit(what, needs, keys, blobs)
                except SpaceError as error:
                    if error.code is not Code.FULL or self.evictor is None or left == 0:
                        raise
                    done = await self.evictor.make_room(shortfall(error), f"for {what}")
                    if not done.enough:
                        raise in_the_way(error, done) from error
        raise AssertionError("unreachable")

    async def tidy(self) -> Room:
        """Give up what earlier fills left behind and no running one wants, and what was mended and kept to look at; the answer is the room then."""
        async with self._deciding:
            return await self._tidy()

    async def _tidy(self, *more: Promise) -> Room:
        await self._patiently(lambda: self._disk.call(self._drop_idle, *self._wanted(*more), self._broken()))
        return await self.measure()

    async def _patiently(self, drop: Callable[[], Awaitable[bool]]) -> None:
        """Call `drop` until it has nothing left: the worker of a fill that was cancelled just now takes a moment to let go of its ingest."""
        for _ in range(int(PATIENCE / POLL)):
            if await drop():
                return
            await asyncio.sleep(POLL)

    def wanted_blobs(self) -> set[str]:
        """The blobs that running fills count on."""
        return set().union(*(promise.blobs for promise in self.promises))

    async def _admit(self, what: str, needs: Mapping[str, int], keys: Collection[str], blobs: Collection[str]) -> Promise:
        async with self._deciding:
            room = await self.measure()
            need = await self._need(needs)
            promise = Promise(self, needs, keys, blobs)
            if need > room.available:
                room = await self._tidy(promise)
            admit(room, need, what=what)
            self.promises.add(promise)
            self.status = replace(self.status, reserved=self.status.reserved + need)
            return promise

    async def check(self, what: str, needs: Mapping[str, int], blobs: Collection[str] = ()) -> tuple[str, ...]:
        """Raise what `admit` would, promising nothing; the answer names the models that would be evicted."""
        room = await self.measure()
        try:
            admit(room, await self._need(needs), what=what)
        except SpaceError as error:
            if error.code is not Code.FULL or self.evictor is None:
                raise
            with Promise(self, {}, (), blobs):
                plan = await self.evictor.plan(shortfall(error))
            if not plan.enough:
                raise in_the_way(error, plan) from error
            return tuple(victim.entry for victim in plan.victims)
        return ()

    async def free(self, keys: Iterable[str], blobs: Iterable[str], work: Callable[[], None] | None = None) -> None:
        """Do `work` (blocking), then remove those ingests and blobs that no entry and no running fill wants, and copies of theirs in quarantine."""
        left, gone = set(keys), set(blobs)

        async def drop(work: Callable[[], None] | None = None) -> bool:
            async with self._deciding:
                wanted_keys, wanted = self._wanted()
                left.difference_update(wanted_keys)
                await self._disk.call(self._free, left, gone - wanted, wanted, work)
                return not left

        if not await drop(work):
            await self._patiently(drop)
        await self.measure()

    def _free(self, keys: set[str], blobs: set[str], wanted: set[str], work: Callable[[], None] | None) -> None:
        """Takes out of `keys` what is gone, and leaves those that a task has open."""
        try:
            if work is not None:
                work()
        finally:
            for key in list(keys):
                receipt = read_receipt(self._layout, key)
                if discard(self._layout, key):
                    keys.discard(key)
                drop_receipt(self._layout, key)
                if receipt is not None and receipt.sha256 not in wanted:
                    blobs.add(receipt.sha256)
            for sha256 in blobs:
                self._blobs.remove_if_unreferenced(sha256, grace=0)
            self._blobs.drop_quarantined(wanted)

    def _drop_idle(self, keys: set[str], wanted: set[str], broken: set[str]) -> bool:
        """Whether nobody had any of it open."""
        idle = [discard(self._layout, key) for key in allocated(self._layout) if key not in keys]
        receipts = (read_receipt(self._layout, key) for key in receipt_keys(self._layout) if key in keys)
        keep = wanted | {receipt.sha256 for receipt in receipts if receipt is not None}
        self._blobs.drop_quarantined(broken)  # mended ones were kept for a person to look at, as long as there was room
        for sha256, _ in list(self._blobs.unreferenced(keep, grace=COMMIT_GRACE)):
            self._blobs.remove_if_unreferenced(sha256, grace=COMMIT_GRACE)
        return all(idle)

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
