"""Makes an entry ready by a plan: reserve, have the files brought, check the weights, publish. It neither makes plans nor decides who waits.

Order on the disk: the plan before the first byte; blobs; views, trees, refs; the manifest last; then the plan goes. A fill that stops anywhere is
resumed from its plan, on the revision it names.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace

from nvcache.core.manifest import File, Manifest
from nvcache.core.plan import FillPlan
from nvcache.core.selection import is_safetensors
from nvcache.core.states import JobState
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.blocking import unbroken
from nvcache.engine.context import Context
from nvcache.engine.gather import TRIES, Gatherer, first_of
from nvcache.engine.here import Finder, Here
from nvcache.engine.jobs import Job, Tally
from nvcache.engine.ledger import Promise
from nvcache.engine.shelf import Entry, hub_id
from nvcache.engine.trace import SHORT
from nvcache.errors import Code, DiskError, NvcacheError, SourceError, SpaceError
from nvcache.store.catalog import EntryState
from nvcache.store.ingest import discard, ingest_keys
from nvcache.store.receipts import drop_receipt

log = logging.getLogger(__name__)

__all__ = ["TRIES", "Fetcher", "first_of"]


class Fetcher:
    """Carries out fill plans."""

    def __init__(self, context: Context) -> None:
        self._do = context
        self._finder = Finder(context)
        self._gatherer = Gatherer(context, self._finder)

    async def here(self, plan: FillPlan) -> Here:
        """Look each file of the plan up: by published digest, by an earlier try's receipt, by blob."""
        return await self._do.disk.call(self._finder.here, plan)

    async def fill(self, job: Job, plan: FillPlan, down: SourceError | None = None) -> Entry:
        """Carry out `plan`; the caller holds the entry's lock. On success the plan is gone and the entry ready.

        On failure the plan stays where a later try may help, and everything is given back where the disk ran full. With `down` it is a plan of what
        mirrors may have, which the source did not list: that is raised, and the plan goes, where they lack something.
        """
        plan = plan.with_priority(job.priority)
        job.move(JobState.FETCHING)
        job.tally = Tally()  # a repair counted what it verified before
        job.tally.expect(len(plan.files), plan.size)
        try:
            with job.trace.phase(Kind.WAITED, least=SHORT, what="room in the store"):
                here, promise = await self._admit(plan)
            with promise:
                await self._do.disk.call(self._do.catalog.write_plan, plan)
                with job.trace.fetching() as fetching:
                    files = await self._gatherer.gather(job, plan, here, promise, down, fetching)
                job.move(JobState.VERIFYING)
                warnings = await self._gatherer.check_weights(job, plan, files)
                with job.trace.phase(Kind.PUBLISHED, bytes=plan.size, count=len(files)):
                    entry = await unbroken(self._commit(plan, files, warnings, job))
        except asyncio.CancelledError:
            if job.cancelling:  # a daemon that stops keeps its plans
                await unbroken(self._do.disk.call(self._do.catalog.remove_plan, plan.id))
            raise
        except NvcacheError as error:
            with suppress(DiskError, SpaceError):  # the first error is the one to tell
                if error.code is Code.DISK_FULL:
                    await self.give_back(plan)
                elif not error.retryable or error is down:
                    await self._do.disk.call(self._do.catalog.remove_plan, plan.id)  # what was fetched stays until the room is needed
            with suppress(DiskError):
                await self._do.ledger.measure()
            raise
        await self._do.ledger.measure()
        return entry

    async def _admit(self, plan: FillPlan) -> tuple[Here, Promise]:
        """Reserve what is missing. What was found must still be there once it is promised: a removal may have been quicker."""
        while True:
            here = await self.here(plan)
            promise = await self._do.ledger.admit(str(plan.ref), here.needs, here.keys, here.blobs)
            with ExitStack() as until_kept:
                until_kept.enter_context(promise)
                again = await self.here(plan)
                if again.needs.keys() <= here.needs.keys():
                    until_kept.pop_all()
                    return again, promise

    async def _commit(self, plan: FillPlan, files: Mapping[str, File], warnings: tuple[str, ...], job: Job) -> Entry:
        """Publish and remember, as one step, alone among those that show the same Hub name."""
        async with self._do.state_locks(plan.id):
            old = self._do.shelf.entries.get(plan.id)
            kept = old.state if old else EntryState()
            names = tuple(name for name in plan.names if not self._do.shelf.newer(plan.id.slug, name, plan.resolved_at, plan.id))
            state = replace(
                kept,
                pin=kept.pin or plan.pin,
                alias=plan.alias or kept.alias,
                names=tuple(dict.fromkeys((*kept.names, *names))),
                resolved_at=max(kept.resolved_at, plan.resolved_at),
                fill_bytes=job.tally.fetched,
                fill_seconds=clock.monotonic() - job.began,
            )
            hub_name = hub_id(plan.ref, state.alias)
            async with self._do.key_locks(("hub", hub_name)):
                self._do.shelf.refuse_taken(plan.ref, hub_name)
                manifest = self._manifest(plan, files, warnings, old)
                if old is not None:
                    old.changing = True
                try:
                    await self._do.disk.call(self._publish, plan, manifest, state, old)
                except NvcacheError:
                    if old is None:
                        await self._undo(manifest, hub_name)
                    raise
                finally:
                    if old is not None:
                        old.changing = False
                entry = Entry(manifest, state, last_used=old.last_used if old else clock.unix())  # who asked for it is about to use it
                self._do.shelf.put(entry)
                for name in state.names:
                    self._do.shelf.resolved(entry.id.slug, name, entry.id)
        await self._do.kaito.settle()
        self._do.changed(entry.id)
        return entry

    async def give_back(self, plan: FillPlan) -> None:
        """Drop a plan that nobody carries out, and what was fetched for it alone."""
        await self._do.ledger.free(ingest_keys(plan.files), (), lambda: self._do.catalog.remove_plan(plan.id))

    def _manifest(self, plan: FillPlan, files: Mapping[str, File], warnings: tuple[str, ...], old: Entry | None) -> Manifest:
        return Manifest(
            ref=plan.ref,
            commit=self._commit_of(plan, old),
            asked=plan.asked,
            endpoint=plan.endpoint,
            files=tuple(_as_before(files[file.path], old) for file in plan.files),
            verified_at=clock.stamp(),
            version=self._do.version,
            selection=plan.selection,
            left_out=plan.left_out,
            warnings=warnings,
            parsed=any(is_safetensors(path) for path in files),
        )

    def _commit_of(self, plan: FillPlan, old: Entry | None) -> str | None:
        """The commit to show the entry at; of two listings of one mirror the first has it. It stays what it was when files are added."""
        if old is not None:
            return old.manifest.commit
        return None if plan.commit is None or self._do.shelf.shows_commit(plan.commit, plan.id) else plan.commit

    def _publish(self, plan: FillPlan, manifest: Manifest, state: EntryState, old: Entry | None) -> None:
        """Views, state, manifest, in that order; then what was kept for the fill goes. Blocks."""
        name = hub_id(plan.ref, state.alias)
        self._do.views.publish(manifest, hub_id=name, names=state.names)
        if old is not None and old.hub_id not in (None, name):
            self._do.views.withdraw_hub(old.manifest, hub_id=old.hub_id)
        self._do.catalog.write_state(plan.id, state)
        self._do.catalog.write_manifest(manifest)
        try:
            if old is None:
                self._do.catalog.touch(plan.id, clock.unix())
            self._do.catalog.remove_plan(plan.id)
            for key in ingest_keys(plan.files):
                discard(self._do.layout, key)  # a commit may have failed after its blob was there
                drop_receipt(self._do.layout, key)
        except (DiskError, SpaceError) as error:  # the entry is ready all the same
            log.warning("what is left of a fill stays until the next start: %s", error, extra={"facts": {"model": str(plan.id)}})

    async def _undo(self, manifest: Manifest, hub_name: str | None) -> None:
        """Hide what could not be published whole, so that its room can be given back; the names it took mean again what they meant."""
        beside = [entry for entry in self._do.shelf.entries.values() if entry.broken is None and hub_name is not None and entry.hub_id == hub_name]

        def work() -> None:
            self._do.catalog.remove_manifest(manifest.id)
            self._do.views.withdraw(manifest, hub_id=hub_name)
            for entry in beside:
                self._do.views.publish(entry.manifest, hub_id=hub_name, names=entry.state.names)

        with suppress(DiskError, SpaceError):  # the first error is the one to tell
            await self._do.disk.call(work)


def _as_before(file: File, old: Entry | None) -> File:
    """A file the entry already had keeps what it was once checked against; a repair knows more than its source publishes."""
    before = old.manifest.by_path.get(file.path) if old else None
    return before if before is not None and before.sha256 == file.sha256 else file
