"""Leases: holds on ready entries, in memory and on the disk. They protect from removal; they load nothing and evict nothing.

A full disk refuses no lease: the model is there, and a pod that was to load it must not fail for what others wrote. Such a lease is in memory alone
until a renewal can write it, and its holder is told a time so short that he renews soon. When the daemon ends before that it is unknown, and its
holder takes one anew, as after any long absence.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from nvcache.core.ref import EntryId, Ref, SlugName, parse_entry
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.status import LeaseStatus, ModelStatus
from nvcache.errors import Code, DiskError, NvcacheError, RequestError, SpaceError
from nvcache.store.catalog import Lease

log = logging.getLogger(__name__)
TTL_MIN, TTL_MAX = 1.0, 86400.0  # seconds
GRACE = 120.0  # seconds every lease lives on after a restart, so that its holder can find us again


class Leases:
    """The leases of one store. All methods belong to the event loop."""

    def __init__(self, context: Context, ttl: float, used: Callable[[EntryId], None]) -> None:
        """`ttl` is the default, in seconds; `used` is told of each entry that is held on to."""
        self._do = context
        self._default = ttl
        self._used = used
        self._taken: dict[str, float] = {}  # lease → when, monotonic
        self._older: dict[str, tuple[str, ...]] = {}  # lease → those it was made of, whose files stand for it until it is written itself

    async def take(self, status: ModelStatus, holder: str, ttl_s: float | None) -> LeaseStatus:
        """Hold the entry that was just looked up. Raises `RequestError` (not-ready, bad-request, unknown-lease), `DiskError`."""
        entry_id = parse_entry(status.entry)
        entry = self._do.shelf.entries.get(entry_id)
        if status.path is None or entry is None or entry.removing:
            raise RequestError(Code.NOT_READY, f"cannot lease {status.entry}: it is {status.state}")
        ttl = self._ttl(self._default if ttl_s is None else ttl_s)
        lease = Lease(secrets.token_hex(16), entry_id, holder, clock.unix() + ttl, ttl)
        self._do.shelf.leases[lease.id] = lease  # in memory first: from here on nobody removes the entry
        try:
            kept = await self._written(lease)
        except NvcacheError:
            self._do.shelf.leases.pop(lease.id, None)
            with suppress(DiskError, SpaceError):  # its file may be there all the same, and would hold the entry from the next start on
                await self._do.disk.call(self._do.catalog.remove_lease, lease.id)
            raise
        self._taken[lease.id] = clock.monotonic()
        self._do.counters.leases_taken += 1
        if not kept:
            log.warning("the disk is full: a lease is in memory alone until it can be written", extra={"facts": {"model": str(entry_id)}})
        self._do.timeline.note(entry_id, Kind.LEASED, who=holder, what=f"for {ttl:g} s")
        self._do.changed(entry_id)
        return self._status(lease, kept=kept)

    async def adopt(self, name: Ref | SlugName, theirs: Callable[[str], bool], holder: str, ttl_s: float | None) -> LeaseStatus | None:
        """Renew the live lease that `find` finds, as `holder`'s and under another id; None without one.

        Whoever had it may be ending just now, and would release it by its old id. Raises as `renew` does.
        """
        found = self.find(name, theirs)
        if found is None:
            return None
        held = self._held(name, found)
        ttl = self._ttl(held.ttl if ttl_s is None else ttl_s)
        fresh = replace(held, id=secrets.token_hex(16), holder=holder, expires=clock.unix() + ttl, ttl=ttl)
        del self._do.shelf.leases[found]
        self._do.shelf.leases[fresh.id] = fresh
        self._taken[fresh.id] = self._taken.pop(found, clock.monotonic())
        self._older[fresh.id] = (found, *self._older.pop(found, ()))
        self._do.timeline.note(fresh.entry, Kind.LEASED, who=holder, what=f"taken over, for {ttl:g} s")
        self._used(fresh.entry)
        return self._status(fresh, kept=await self._written(fresh))

    async def renew(self, name: Ref | SlugName, lease_id: str, ttl_s: float | None) -> LeaseStatus:
        """Let a lease live `ttl_s` seconds (by default as long as it was taken for) from now. Raises `RequestError` (unknown-lease, bad-request)."""
        held = self._held(name, lease_id)
        ttl = self._ttl(held.ttl if ttl_s is None else ttl_s)
        fresh = replace(held, expires=clock.unix() + ttl, ttl=ttl)
        self._do.shelf.leases[lease_id] = fresh
        self._used(fresh.entry)
        return self._status(fresh, kept=await self._written(fresh))

    async def release(self, name: Ref | SlugName, lease_id: str) -> None:
        """End a lease. Raises `RequestError` (unknown-lease), `DiskError`: it has ended, and may be back after a restart."""
        held = self._held(name, lease_id)
        del self._do.shelf.leases[lease_id]
        self._ended(held, Kind.RELEASED)
        self._do.changed(held.entry)
        await self._erase(lease_id)

    def find(self, name: Ref | SlugName, theirs: Callable[[str], bool]) -> str | None:
        """The live lease on what `name` means whose holder `theirs` accepts, the one that lives longest if there are several.

        A name without a revision means every revision of the model: its holder loads the one it was given, whatever the name means by now.
        """
        exact = None if name.revision is None else self._do.shelf.find(name)
        now = clock.unix()
        live = (lease for lease in self._do.shelf.leases.values() if lease.expires > now and lease.entry.slug == name.slug)
        found = [lease for lease in live if theirs(lease.holder) and (name.revision is None or lease.entry == exact)]
        return max(found, key=lambda lease: lease.expires).id if found else None

    def all(self) -> list[LeaseStatus]:
        """Every lease that has not run out."""
        now = clock.unix()
        return [self._status(lease) for lease in self._do.shelf.leases.values() if lease.expires > now]

    async def expire(self) -> None:
        """Forget the leases that have run out, and shorten what a clock that was set back has made last for years."""
        now = clock.unix()
        for lease in list(self._do.shelf.leases.values()):
            if lease.expires > now + max(lease.ttl, GRACE):
                self._do.shelf.leases[lease.id] = replace(lease, expires=now + lease.ttl)
        for lease in [lease for lease in self._do.shelf.leases.values() if lease.expires <= now]:
            self._do.shelf.leases.pop(lease.id, None)
            self._do.counters.leases_expired += 1
            self._ended(lease, Kind.EXPIRED)
            self._do.changed(lease.entry)
            await self._erase(lease.id)

    async def _written(self, lease: Lease) -> bool:
        """Whether it is on the disk as well; on a full one it is not. Raises `DiskError`, `RequestError` (unknown-lease): it was ended meanwhile."""
        try:
            await self._do.disk.call(self._do.catalog.write_lease, lease)
        except SpaceError:
            kept = False
        else:
            kept = True
        if kept and (older := self._older.get(lease.id)):
            await self._remove(older)
            self._older.pop(lease.id, None)
        if lease.id not in self._do.shelf.leases:  # it must not come back with the next start
            await self._erase(lease.id)
            raise _unknown(lease.id, lease.entry)
        return kept

    async def _erase(self, lease_id: str) -> None:
        """Remove what stands for it on the disk. Raises `DiskError`."""
        await self._remove((lease_id, *self._older.pop(lease_id, ())))

    async def _remove(self, leases: tuple[str, ...]) -> None:
        for lease in leases:
            await self._do.disk.call(self._do.catalog.remove_lease, lease)

    def _ended(self, lease: Lease, kind: Kind) -> None:
        since = self._taken.pop(lease.id, None)  # None: taken before the daemon started
        self._do.timeline.note(lease.entry, kind, who=lease.holder, seconds=None if since is None else clock.monotonic() - since)

    def _ttl(self, ttl: float) -> float:
        if not TTL_MIN <= ttl <= TTL_MAX:
            raise RequestError(Code.BAD_REQUEST, f"cannot lease for {ttl:g} s: a lease lives {TTL_MIN:g} to {TTL_MAX:g} s")
        return ttl

    def _held(self, name: Ref | SlugName, lease_id: str) -> Lease:
        held = self._do.shelf.leases.get(lease_id)
        if held is None or held.expires <= clock.unix() or held.entry.slug != name.slug:
            raise _unknown(lease_id, name)
        return held

    def _status(self, lease: Lease, *, kept: bool = True) -> LeaseStatus:
        """What is told of it. Who holds one that is not `kept` on the disk should come back soon: it may be written then, or be unknown."""
        entry = self._do.shelf.entries[lease.entry]
        return LeaseStatus(
            lease=lease.id,
            entry=str(lease.entry),
            holder=lease.holder,
            path=str(self._do.layout.view(lease.entry)),
            hub_cache=str(self._do.layout.hub) if entry.hub_id else None,
            expires=clock.from_unix(lease.expires if kept else min(lease.expires, clock.unix() + GRACE)),
        )


def _unknown(lease_id: str, name: Ref | SlugName | EntryId) -> RequestError:
    return RequestError(Code.UNKNOWN_LEASE, f"cannot find lease {lease_id[:64]!r} on {name}: it was released or ran out")
