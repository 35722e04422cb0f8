"""Leases: holds on ready entries, on the disk and in memory. They protect from removal; they load nothing and evict nothing."""

from __future__ import annotations

import secrets
from dataclasses import replace

from nvcache.core.ref import Ref, SlugName, parse_entry
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.status import LeaseStatus, ModelStatus
from nvcache.errors import Code, NvcacheError, RequestError
from nvcache.store.catalog import Lease

TTL_MIN, TTL_MAX = 1.0, 86400.0  # seconds


class Leases:
    """The leases of one store. All methods belong to the event loop."""

    def __init__(self, context: Context, ttl: float) -> None:
        self._do = context
        self._default = ttl

    async def take(self, status: ModelStatus, holder: str, ttl_s: float | None) -> LeaseStatus:
        """Hold the entry that was just looked up. Raises `RequestError` (not-ready, bad-request), `DiskError`, `SpaceError`."""
        entry_id = parse_entry(status.entry)
        entry = self._do.shelf.entries.get(entry_id)
        if status.path is None or entry is None or entry.removing:
            raise RequestError(Code.NOT_READY, f"cannot lease {status.entry}: it is {status.state}")
        ttl = self._ttl(self._default if ttl_s is None else ttl_s)
        lease = Lease(secrets.token_hex(16), entry_id, holder, clock.unix() + ttl, ttl)
        self._do.shelf.leases[lease.id] = lease  # in memory first: from here on nobody removes the entry
        try:
            await self._do.disk.call(self._do.catalog.write_lease, lease)
        except NvcacheError:
            self._do.shelf.leases.pop(lease.id, None)
            raise
        self._do.changed(entry_id)
        return self._status(lease)

    async def renew(self, name: Ref | SlugName, lease_id: str, ttl_s: float | None) -> LeaseStatus:
        """Let a lease live `ttl_s` seconds (by default as long as it was taken for) from now. Raises `RequestError` (unknown-lease, bad-request)."""
        held = self._held(name, lease_id)
        ttl = self._ttl(held.ttl if ttl_s is None else ttl_s)
        fresh = replace(held, expires=clock.unix() + ttl, ttl=ttl)
        self._do.shelf.leases[lease_id] = fresh
        await self._do.disk.call(self._do.catalog.write_lease, fresh)
        if lease_id not in self._do.shelf.leases:  # released meanwhile: it must not come back with the next start
            await self._do.disk.call(self._do.catalog.remove_lease, lease_id)
        return self._status(fresh)

    async def release(self, name: Ref | SlugName, lease_id: str) -> None:
        """End a lease. Raises `RequestError` (unknown-lease)."""
        held = self._held(name, lease_id)
        del self._do.shelf.leases[lease_id]
        await self._do.disk.call(self._do.catalog.remove_lease, lease_id)
        self._do.changed(held.entry)

    def all(self) -> list[LeaseStatus]:
        """Every lease that has not run out."""
        now = clock.unix()
        return [self._status(lease) for lease in self._do.shelf.leases.values() if lease.expires > now]

    async def expire(self) -> None:
        """Forget the leases that have run out."""
        now = clock.unix()
        for lease in [lease for lease in self._do.shelf.leases.values() if lease.expires <= now]:
            self._do.shelf.leases.pop(lease.id, None)
            await self._do.disk.call(self._do.catalog.remove_lease, lease.id)
            self._do.changed(lease.entry)

    def _ttl(self, ttl: float) -> float:
        if not TTL_MIN <= ttl <= TTL_MAX:
            raise RequestError(Code.BAD_REQUEST, f"cannot lease for {ttl:g} s: a lease lives {TTL_MIN:g} to {TTL_MAX:g} s")
        return ttl

    def _held(self, name: Ref | SlugName, lease_id: str) -> Lease:
        held = self._do.shelf.leases.get(lease_id)
        if held is None or held.expires <= clock.unix() or held.entry.slug != name.slug:
            raise RequestError(Code.UNKNOWN_LEASE, f"cannot find lease {lease_id[:64]!r} on {name}: it was released or ran out")
        return held

    def _status(self, lease: Lease) -> LeaseStatus:
        entry = self._do.shelf.entries[lease.entry]
        return LeaseStatus(
            lease=lease.id,
            entry=str(lease.entry),
            holder=lease.holder,
            path=str(self._do.layout.view(lease.entry)),
            hub_cache=str(self._do.layout.hub) if entry.hub_id else None,
            expires=clock.from_unix(lease.expires),
        )
