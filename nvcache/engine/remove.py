"""Removes entries, and what fills that came to nothing left behind; refuses what somebody holds. It chooses nothing to remove by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from nvcache.core.ref import EntryId, parse_name
from nvcache.core.states import ModelState
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.fetch import Fetcher
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.lookup import Lookup
from nvcache.engine.shelf import Entry
from nvcache.engine.status import ModelStatus
from nvcache.errors import Code, NvcacheError, RequestError

log = logging.getLogger(__name__)


class Remover:
    """Removal from one store. `forget` is told of an entry that is gone or given up, `mend` of one that could not be taken away whole."""

    def __init__(
        self,
        context: Context,
        jobs: Jobs,
        lookup: Lookup,
        fetcher: Fetcher,
        forget: Callable[[EntryId], None],
        mend: Callable[[EntryId], None],
    ) -> None:
        self._do = context
        self._jobs = jobs
        self._lookup = lookup
        self._fetcher = fetcher
        self._forget_wishes = forget
        self._mend = mend
        self.under_way: set[asyncio.Task[None]] = set()

    async def remove(self, name: str) -> ModelStatus:
        """Withdraw a model and free its blobs. Raises `RequestError` (unknown-model, ambiguous-revision, pinned, leased, in-use)."""
        wanted = parse_name(name)
        if self._do.shelf.find(wanted) is None and (unfinished := self._lookup.unfinished(wanted)) is not None:
            return await self._forget(unfinished)
        return await self._remove(self._do.shelf.only(wanted))

    async def evict(self, entry_id: EntryId, why: str) -> None:
        """Remove it to make room, also when a process has files of it open: they stay whole for that process.

        Raises `RequestError` (unknown-model, pinned, leased, and in-use while somebody fetches or repairs it: he may be waiting for room himself).
        """
        if self._do.entry_locks.held(entry_id):
            raise RequestError(Code.IN_USE, f"cannot evict {entry_id}: it is being fetched, repaired or removed")
        await self._remove(entry_id, even_in_use=True, why=why)

    async def _remove(self, entry_id: EntryId, *, even_in_use: bool = False, why: str | None = None) -> ModelStatus:
        await self._do.entry_locks.acquire(entry_id)
        try:
            entry = await self._removable(entry_id, even_in_use=even_in_use)
        except BaseException:
            self._do.entry_locks.release(entry_id)
            raise
        entry.removing = True  # since the last look at its leases nothing waited
        self._do.changed(entry_id)
        removal = asyncio.create_task(self._take_away(entry, why), name=f"remove-{entry_id}")
        self.under_way.add(removal)
        removal.add_done_callback(self._removed)
        await asyncio.shield(removal)  # once begun it goes on, also when the caller gives up
        return ModelStatus(
            entry=str(entry_id),
            ref=str(entry.manifest.ref),
            revision=entry_id.revision,
            state=ModelState.ABSENT,
            files=len(entry.manifest.files),
            bytes=entry.manifest.size,
        )

    async def _removable(self, entry_id: EntryId, *, even_in_use: bool) -> Entry:
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None:
            raise RequestError(Code.UNKNOWN_MODEL, f"cannot remove {entry_id}: it was removed meanwhile")
        self._check_held(entry)
        if not even_in_use and await self._do.reads.beside(lambda: self._do.disk.call(self._in_use, entry)):
            raise RequestError(Code.IN_USE, f"cannot remove {entry_id}: a process on this node has its files open")
        self._check_held(entry)  # a lease may have come meanwhile
        return entry

    def _removed(self, removal: asyncio.Task[None]) -> None:
        self.under_way.discard(removal)
        if not removal.cancelled() and (error := removal.exception()) is not None:
            log.error("a model could not be removed: %s", error)

    async def _take_away(self, entry: Entry, why: str | None) -> None:
        """Views, manifest, state, leases, and the blobs nobody else wants; the entry's lock is given back at the end."""
        try:
            await self._withdraw(entry, why)
        finally:
            self._do.entry_locks.release(entry.id)

    async def _withdraw(self, entry: Entry, why: str | None) -> None:
        leases = [lease.id for lease in self._do.shelf.leases.of(entry.id)]

        def work() -> None:
            self._do.views.withdraw(entry.manifest, hub_id=entry.hub_id)
            self._do.catalog.remove_manifest(entry.id)
            self._do.catalog.remove_plan(entry.id)
            self._do.catalog.remove_state(entry.id)
            for lease in leases:
                self._do.catalog.remove_lease(lease)

        await self._do.kaito.settle()
        try:
            await self._do.disk.call(work)
        except NvcacheError as error:
            entry.removing, entry.broken = False, error
            self._do.changed(entry.id)
            self._mend(entry.id)
            raise
        self._do.shelf.drop(entry.id)
        self._forget_wishes(entry.id)
        self._jobs.forget(entry.id)
        self._do.timeline.note(entry.id, Kind.EVICTED if why else Kind.REMOVED, bytes=entry.manifest.size, what=why)
        self._do.changed(entry.id)
        log.info("removed", extra={"facts": {"model": str(entry.id)}})
        await self._do.kaito.settle()  # its name may mean another revision now
        await self._do.ledger.free((), entry.manifest.blobs)

    async def _forget(self, job: Job) -> ModelStatus:
        """Drop what a fill that failed or was cancelled left behind. Raises `RequestError` (in-use) for one that is under way."""
        assert job.entry is not None  # noqa: S101 - it is looked up by entry
        if not job.state.ended:
            raise RequestError(
                Code.IN_USE,
                f"cannot remove {job.entry}: it is being fetched by job {job.id}",
                hint=f"stop it first: nvcache jobs --cancel {job.id}",
            )
        status = self._lookup.status(job.entry)
        if job.plan is not None:
            await self._fetcher.give_back(job.plan)
        self._forget_wishes(job.entry)
        self._jobs.forget(job.entry)
        self._do.changed(job.entry)
        found = status or ModelStatus(str(job.entry), str(job.ref), job.entry.revision, ModelState.ABSENT, 0, 0)
        return replace(found, state=ModelState.ABSENT, path=None, hub_cache=None, error=None)

    def _check_held(self, entry: Entry) -> None:
        if entry.changing:
            raise RequestError(Code.IN_USE, f"cannot remove {entry.id}: somebody asks for it just now", hint="try again in a moment")
        if entry.state.pin:
            raise RequestError(Code.PINNED, f"cannot remove {entry.id}: it is pinned")
        if self._do.declared.pins(entry, self._do.shelf):
            why = f"cannot remove {entry.id}: it is declared with pin = true"
            raise RequestError(Code.PINNED, why, hint="take its [[models]] table, or pin in it, out of the daemon's file")
        holders = self._do.shelf.holders(entry.id, clock.unix())
        if holders:
            facts: dict[str, object] = {
                "holders": [
                    {"lease": lease.id, "holder": lease.holder, "expires": clock.from_unix(lease.expires).isoformat(timespec="seconds")}
                    for lease in holders
                ]
            }
            raise RequestError(Code.LEASED, f"cannot remove {entry.id}: {', '.join(lease.holder for lease in holders)} holds it", facts=facts)

    def _in_use(self, entry: Entry) -> bool:
        """Whether the kernel says that any of its blobs is open or mapped, with or without a lease; one that other entries show counts as well."""
        return any(self._do.blobs.in_use(sha256) for sha256 in entry.manifest.blobs)
