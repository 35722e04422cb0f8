"""What a store held and was about to hold, remembered when it goes, and brought to the store that takes its place. It decides nothing about when.

An entry comes back on the revision it had, with its selection, alias, pin and moving names, under the same path. Nothing of this is on a disk: after
a restart of the daemon on new disks, what is declared is fetched and what pods ask for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

from nvcache.core.manifest import Selection
from nvcache.core.plan import FillPlan, Priority
from nvcache.core.ref import EntryId, Ref, parse_ref
from nvcache.core.states import JobState
from nvcache.core.timeline import Kind
from nvcache.engine.context import Context
from nvcache.engine.ensure import Ensurer
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.persist import persist
from nvcache.engine.planning import make_plan
from nvcache.engine.shelf import Entry
from nvcache.engine.status import EnsureRequest
from nvcache.errors import SourceError
from nvcache.sources.base import Resolved

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """One entry worth having again. `ref` carries the pinned revision, `paths` are the files it had."""

    ref: Ref
    asked: str
    endpoint: str
    selection: Selection
    paths: tuple[str, ...]
    alias: str | None
    pin: bool
    names: tuple[str, ...]
    resolved_at: float

    @classmethod
    def entry(cls, entry: Entry) -> Known:
        """What the store has a manifest of."""
        manifest, state = entry.manifest, entry.state
        paths = tuple(manifest.by_path)
        return cls(manifest.ref, manifest.asked, manifest.endpoint, manifest.selection, paths, state.alias, state.pin, state.names, state.resolved_at)

    @classmethod
    def plan(cls, plan: FillPlan) -> Known:
        """What was being made."""
        paths = tuple(file.path for file in plan.files)
        return cls(plan.ref, plan.asked, plan.endpoint, plan.selection, paths, plan.alias, plan.pin, plan.names, plan.resolved_at)

    @property
    def id(self) -> EntryId:
        """The entry."""
        return EntryId(self.ref.slug, self.ref.revision or "")

    @property
    def wish(self) -> EnsureRequest:
        """To have it as it was asked for, at whatever revision that means now."""
        return EnsureRequest(parse_ref(self.asked), self.selection, self.alias, self.pin, Priority.DECLARED)


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the contents `fs_uuid`: `known` is lost with them, `wishes` had no plan yet and are asked again in any case."""

    fs_uuid: str | None
    known: tuple[Known, ...] = ()
    wishes: tuple[EnsureRequest, ...] = ()


class Refiller:
    """Remembers one store, and fills one from the memory of another."""

    def __init__(self, context: Context, jobs: Jobs, ensurer: Ensurer) -> None:
        self._do = context
        self._jobs = jobs
        self._ensurer = ensurer
        self._owed: dict[EntryId, Known] = {}  # what is still to be brought here, also between two tries

    def remember(self, fs_uuid: str | None) -> Memory:
        """What is here or under way; to be asked before the jobs are ended."""
        running = [job for job in self._jobs if not job.state.ended and job.kind == "fill"]
        planned = [*self._ensurer.resuming.values(), *(job.plan for job in running if job.plan is not None)]
        owed = dict(self._owed)
        owed |= {plan.id: Known.plan(plan) for plan in planned}
        owed |= {entry.id: Known.entry(entry) for entry in self._do.shelf.entries.values() if not entry.removing}
        wishes = [replace(job.wish, priority=job.priority) for job in running if job.plan is None and job.wish is not None]
        return Memory(fs_uuid, tuple(owed.values()), tuple(wishes))

    def owe(self, known: Iterable[Known]) -> list[Known]:
        """Take over what another store had and this one lacks, to be brought; each is forgotten when it is here or cannot be had."""
        self._owed = {each.id: each for each in known if each.id not in self._do.shelf.entries}
        return list(self._owed.values())

    def forget(self, entry_id: EntryId) -> None:
        """Nobody wants it any more: it is not brought, also not by the next try."""
        self._owed.pop(entry_id, None)

    async def bring(self, known: Known) -> None:
        """Fetch what another store had, or what its source has in its place by now, until it is here or cannot be."""

        async def work(job: Job) -> None:
            try:
                await carry_out(job)
            except SourceError as error:
                await self._ensurer.ask_anew(job, known.wish, error)

        async def carry_out(job: Job) -> None:
            self._jobs.bind(job, known.id)
            async with self._do.entry_locks(known.id):
                if known.id not in self._do.shelf.entries:
                    job.move(JobState.RESOLVING)
                    await self._ensurer.fill(job, await self._plan(job, known))
            job.move(JobState.DONE)

        log.info("fetching again what was lost", extra={"facts": {"model": str(known.id)}})
        await persist(lambda: self._start(known, work) if known.id in self._owed else None, f"the fill of {known.id}", refused=None)
        self._owed.pop(known.id, None)

    def _start(self, known: Known, work: Callable[[Job], Coroutine[Any, Any, None]]) -> Job:
        job, _ = self._jobs.start(("refill", known.id), "fill", known.ref, work, Priority.DECLARED)
        self._do.timeline.follow(job, "lost with its disks")
        return job

    async def _plan(self, job: Job, known: Known) -> FillPlan:
        """A plan for the files the entry had, as its source lists them now. Raises `NvcacheError`."""
        source = self._do.sources[known.ref.scheme]
        resolved = Resolved(known.ref, next(iter(known.names), None), known.endpoint)
        with job.trace.phase(Kind.LISTED, source=known.endpoint) as facts:
            listing = await self._do.ask(known.ref.scheme, source.list, resolved)
            facts["count"] = len(listing)
        plan = make_plan(resolved, listing, asked=known.asked, selection=known.selection, also=known.paths)
        for file in plan.files:
            source.refuse(resolved, file)
        return replace(plan, alias=known.alias, pin=known.pin, names=known.names, resolved_at=known.resolved_at)
