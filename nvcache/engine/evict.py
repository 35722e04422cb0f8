"""Makes room by removing models, as `core.evict` chooses: when a fill does not fit, and in the background above the watermarks. It admits no fill.

A model that is being fetched, changed or repaired just now is let alone: whoever does so holds its lock, and may be waiting for room himself.
"""

from __future__ import annotations

import asyncio
import logging

from nvcache.core.evict import LEASED, Candidate, Eviction, Marks, excess, plan_eviction
from nvcache.core.ref import EntryId, parse_entry
from nvcache.core.space import admit, human, in_the_way
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.ledger import DISK_TIMEOUT
from nvcache.engine.remove import Remover
from nvcache.engine.shelf import Entry
from nvcache.engine.status import EvictionStatus
from nvcache.errors import Code, RequestError, SpaceError

log = logging.getLogger(__name__)
ROUNDS = 3  # plans in a row, where models of the one before were taken up meanwhile
HELD = frozenset({Code.LEASED, Code.PINNED, Code.UNKNOWN_MODEL, Code.IN_USE})  # of a victim that is none any more


class Evictor:
    """Eviction from one store. All methods belong to the event loop."""

    def __init__(self, context: Context, remover: Remover, marks: Marks) -> None:
        self._do = context
        self._remover = remover
        self._marks = marks
        self._evicting = asyncio.Lock()  # one plan at a time: two would both count on the same bytes

    async def plan(self, need: int) -> Eviction:
        """What would go so that `need` more bytes are free. Removes nothing. Raises `DiskError`."""
        await self.look_who_reads()
        return plan_eviction(need, map(self._candidate, self._do.shelf.entries.values()), self._do.ledger.wanted_blobs())

    async def look_who_reads(self) -> None:
        """Note of each model whether a process has files of it open or mapped, as the kernel says. Raises `DiskError`."""
        entries = list(self._do.shelf.entries.values())
        used = await self._do.reads.beside(lambda: self._do.disk.bounded(DISK_TIMEOUT, "see who reads the models", self._in_use, entries))
        for entry in entries:
            if entry.in_use is not (entry.id in used):
                entry.in_use = not entry.in_use
                self._do.changed(entry.id)

    async def make_room(self, need: int, why: str) -> Eviction:
        """Free `need` bytes if that can be done, else nothing; the answer is what was done, or why it cannot be. Raises `DiskError`."""
        async with self._evicting:
            for _ in range(ROUNDS):
                plan = await self.plan(need)
                freed = await self._carry_out(plan, why) if plan.enough else 0
                if not plan.enough or freed == plan.freed:
                    break
                need -= freed
            return plan

    async def evict(self, need: int, *, dry_run: bool) -> EvictionStatus:
        """Have `need` bytes available, or with `dry_run` say what that would take. Raises `SpaceError` (too-large, full) when it cannot be had."""
        room = await self._do.ledger.measure()
        short = max(0, need - room.available)
        if dry_run:
            return told(need, short, await self.plan(short))
        if short:
            room = await self._do.ledger.tidy()
            short = max(0, need - room.available)
        try:
            admit(room, need, what=human(need))
        except SpaceError as error:
            if error.code is not Code.FULL:
                raise
            done = await self.make_room(short, "as the operator asked")
            if not done.enough:
                raise in_the_way(error, done, names=True) from error
            return told(need, short, done)
        return told(need, 0, await self.plan(0))

    async def keep_to_marks(self) -> None:
        """Bring the store back below its marks, as far as that can be done. Raises `DiskError`."""
        room = await self._do.ledger.measure()
        if excess(room.capacity, room.used, room.reserved, self._marks):
            room = await self._do.ledger.tidy()
        over = excess(room.capacity, room.used, room.reserved, self._marks)
        if over == 0:
            return
        async with self._evicting:
            plan = await self.plan(over)
            if excess(room.capacity, room.used - plan.freed, room.reserved, self._marks):  # what is held is above the mark by itself:
                plan = await self.plan(max(0, room.used + room.reserved - room.capacity))  # what else went would only be fetched again
            await self._carry_out(plan, "the cache is above its mark" if room.capacity == room.limit else "the disk is getting full")

    async def _carry_out(self, plan: Eviction, why: str) -> int:
        """Remove the victims, in their order, up to one that was held or taken up meanwhile: the bytes that this freed."""
        freed = 0
        for victim in plan.victims:
            try:
                await self._remover.evict(parse_entry(victim.entry), why)
            except RequestError as error:
                if error.code not in HELD:
                    raise
                break
            freed += victim.frees
            self._do.counters.evictions += 1
            self._do.counters.evicted_bytes += victim.frees
            log.info("evicted, %s: %s freed", why, human(victim.frees), extra={"facts": {"model": victim.entry}})
        return freed

    def _candidate(self, entry: Entry) -> Candidate:
        return Candidate(
            entry=str(entry.id),
            blobs=entry.manifest.blobs,
            last_used=entry.last_used or entry.state.resolved_at,
            held=tuple(self._held(entry)),
            in_use=entry.in_use,
            holders=tuple(lease.holder for lease in self._do.shelf.holders(entry.id, clock.unix())),
        )

    def _held(self, entry: Entry) -> list[str]:
        """Why it must stay, in words."""
        found = ["pinned"] if entry.state.pin else []
        if self._do.declared.holds(entry, self._do.shelf):
            found.append("declared")
        if self._do.shelf.holders(entry.id, clock.unix()):
            found.append(LEASED)
        if entry.removing or self._do.entry_locks.held(entry.id):
            found.append("being fetched, repaired or removed")
        if entry.in_use and self._do.ledger.room.disk_is_short:
            found.append("open in a process, which keeps its bytes on the disk")
        return found

    def _in_use(self, entries: list[Entry]) -> set[EntryId]:
        """Which of them a process has open or mapped. Blocks."""
        return {entry.id for entry in entries if any(self._do.blobs.in_use(sha256) for sha256 in entry.manifest.blobs)}


def told(need: int, short: int, plan: Eviction) -> EvictionStatus:
    """A plan as the API shows it."""
    return EvictionStatus(
        need=need,
        short=short,
        freed=plan.freed,
        enough=plan.enough,
        victims=tuple(
            {
                "entry": victim.entry,
                "frees": victim.frees,
                "last_used": clock.from_unix(victim.last_used) if victim.last_used else None,
                "in_use": victim.in_use,
            }
            for victim in plan.victims
        ),
        in_the_way=tuple({"entry": each.entry, "bytes": each.size, "held": list(each.named)} for each in plan.in_the_way),
    )
