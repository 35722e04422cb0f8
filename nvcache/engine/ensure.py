"""Turns a wish into a ready model: hit, join, or a job that resolves, plans and fills. It moves no bytes and writes no manifest.

Single flight has two levels: callers with the same wish share one job; jobs that turn out to mean the same entry take turns, and the second finds it
ready. A moving name is resolved at most once in `resolve_ttl` seconds. When its source does not answer in `STALE_WAIT` seconds and the revision
it meant last is ready, that one is served, with a note: a source that is down never takes away what is here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from nvcache.core.manifest import Selection
from nvcache.core.plan import FillPlan, Priority
from nvcache.core.ref import EntryId, Ref, Scheme
from nvcache.core.selection import chooses
from nvcache.core.space import human
from nvcache.core.states import JobState
from nvcache.engine import clock
from nvcache.engine.blocking import unbroken
from nvcache.engine.context import Context
from nvcache.engine.fetch import Fetcher, make_plan
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.lookup import Lookup
from nvcache.engine.repair import Repairer
from nvcache.engine.shelf import DEFAULT_NAME, Entry, hub_id
from nvcache.engine.status import DryRun, EnsureRequest, ErrorInfo, ModelStatus
from nvcache.errors import Code, RequestError, SpaceError
from nvcache.settings import ModelSetting
from nvcache.sources.base import Resolved
from nvcache.store.catalog import EntryState

log = logging.getLogger(__name__)
STALE_WAIT = 3.0  # seconds a caller waits for a source before the last resolved revision is served
RETRY_FIRST, RETRY_MOST = 5.0, 300.0  # seconds between tries of what nobody waits for
RETRY_REFUSED = 600.0  # the same where the error says that trying again is no use: the world may still change


class Ensurer:
    """Wishes to jobs. All methods belong to the event loop."""

    def __init__(self, context: Context, jobs: Jobs, fetcher: Fetcher, repairer: Repairer, lookup: Lookup, resolve_ttl: float) -> None:
        self._do = context
        self._repairer = repairer
        self._jobs = jobs
        self._fetcher = fetcher
        self._lookup = lookup
        self._ttl = resolve_ttl
        self._resolved: dict[Ref, tuple[Resolved, float, float]] = {}  # what, when (monotonic), when (unix)

    async def ensure(self, wish: EnsureRequest) -> ModelStatus | Job:
        """The status of a ready model, else the job everybody with this wish shares. Raises `RequestError` (alias-conflict, bad-request)."""
        self._check_alias(wish)
        fresh = self._known(wish.ref)
        if fresh is not None and (entry := await self._hit(fresh, wish)) is not None:
            self._do.counters.hits += 1
            return await self._as_hit(entry)
        stale = self._do.shelf.find(wish.ref) if not wish.ref.pinned else None
        job, new = self._start(wish)
        self._do.counters.misses += new
        self._do.counters.joined += not new
        if stale is not None and (entry := await self._hit(stale, wish)) is not None:
            return await self._last_resort(job, entry)
        return job

    async def _last_resort(self, job: Job, entry: Entry) -> ModelStatus | Job:
        """Something usable is here: give the source a moment to say whether it is still what is meant."""
        if job.task is not None:
            await asyncio.wait({job.task}, timeout=STALE_WAIT)
        if job.state is JobState.DONE and job.entry is not None:
            return await self._lookup.model(str(job.entry))
        down = job.state is JobState.FAILED and job.error is not None and job.error.retryable
        if down or job.state in (JobState.QUEUED, JobState.RESOLVING):
            why = str(job.error) if job.error is not None else f"its source did not answer in {STALE_WAIT:g} s"
            self._do.counters.hits += 1
            return replace(await self._as_hit(entry), note=f"the last resolved revision is served: {why}")
        return job

    async def _as_hit(self, entry: Entry) -> ModelStatus:
        """The entry as this caller sees it: nothing was fetched for it, whatever an earlier caller's fill did."""
        return replace(await self._lookup.model(str(entry.id)), fetched_bytes=0, seconds=0.0)

    def _start(self, wish: EnsureRequest) -> tuple[Job, bool]:
        async def work(job: Job) -> None:
            await self._make_ready(job, wish)

        return self._jobs.start((wish.ref, wish.selection, wish.alias, wish.pin), "fill", wish.ref, work)

    async def _make_ready(self, job: Job, wish: EnsureRequest) -> None:
        job.move(JobState.RESOLVING)
        self._do.workers.prepare()
        resolved, moment = await self._resolve(wish.ref)
        entry_id = EntryId(resolved.ref.slug, resolved.ref.revision or "")
        self._jobs.bind(job, entry_id)
        leader = job.leader = next((other for other in self._jobs.of(entry_id) if other is not job and not other.state.ended), None)
        async with self._do.entry_locks(entry_id):
            job.leader = None
            if leader is not None and leader.state is JobState.DONE:
                job.tally = leader.tally  # what was fetched while this one waited was fetched for it, too
            entry = self._do.shelf.entries.get(entry_id)
            if entry is not None and entry.broken is not None:
                await self._repairer.recover(job, entry)
            if await self._hit(entry_id, wish, resolved.name, moment) is None:
                await self._fill(job, await self._plan(resolved, wish, moment))
        job.move(JobState.DONE)

    async def _fill(self, job: Job, plan: FillPlan) -> None:
        job.plan = plan
        entry = await self._fetcher.fill(job, plan)
        await self._take_names(entry, entry.state.names)
        log.info(
            "filled: %s fetched of %s in %.1f s",
            human(job.tally.fetched),
            human(plan.size),
            clock.monotonic() - job.began,
            extra={"facts": {"model": str(plan.id), "job": job.id}},
        )
        self._do.counters.fills += 1
        self._do.counters.fill_seconds_sum += clock.monotonic() - job.began

    async def _take_names(self, entry: Entry, names: tuple[str, ...]) -> None:
        """A moving name belongs to the newest entry it was resolved to; take it from the others of the slug."""
        for other in list(self._do.shelf.entries.values()):
            if other.id.slug == entry.id.slug and other.id != entry.id and set(other.state.names) & set(names):
                other.state = replace(other.state, names=tuple(name for name in other.state.names if name not in names))
                await self._do.disk.call(self._do.catalog.write_state, other.id, other.state)

    # -- resolving

    def _known(self, ref: Ref) -> EntryId | None:
        """What a reference means without asking its source: it is pinned, or was resolved a moment ago."""
        if ref.pinned:
            return EntryId(ref.slug, ref.revision or "")
        found = self._resolved.get(ref)
        if found is None or clock.monotonic() - found[1] > self._ttl:
            return None
        return EntryId(ref.slug, found[0].ref.revision or "")

    async def _resolve(self, ref: Ref) -> tuple[Resolved, float]:
        """What `ref` means, and since when that is known (unix seconds)."""
        found = self._resolved.get(ref)
        if found is not None and clock.monotonic() - found[1] <= self._ttl:
            return found[0], found[2]
        moment = clock.unix()
        resolved = await self._do.net.call(self._do.sources[ref.scheme].resolve, ref)
        if not ref.pinned:
            resolved = replace(resolved, name=resolved.name or DEFAULT_NAME)
            self._resolved[ref] = (resolved, clock.monotonic(), moment)
        return resolved, moment

    def forget(self, entry_id: EntryId) -> None:
        """An entry was removed: what was resolved to it is asked anew."""
        self._resolved = {ref: found for ref, found in self._resolved.items() if found[0].ref.revision != entry_id.revision}

    # -- hits

    async def _hit(self, entry_id: EntryId, wish: EnsureRequest, name: str | None = None, moment: float = 0.0) -> Entry | None:
        """The entry when it is ready and has every file of the wish; its pin, alias and names are brought up to the wish."""
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None or entry.broken is not None or entry.removing:
            return None
        manifest = entry.manifest
        every = [*manifest.by_path, *(file.path for file in manifest.left_out)]
        if not chooses(wish.selection, every) <= manifest.by_path.keys():
            return None
        await unbroken(self._update(entry, wish, name, moment))
        return entry

    async def _update(self, entry: Entry, wish: EnsureRequest, name: str | None, moment: float) -> None:
        """Bring an entry's pin, alias and names up to a wish that it fulfils; `name` was resolved to it at `moment` (unix seconds)."""
        fresh = name is not None and not self._do.shelf.newer(entry.id.slug, name, moment, entry.id)
        state = replace(
            entry.state,
            pin=entry.state.pin or wish.pin,
            alias=wish.alias or entry.state.alias,
            names=(*entry.state.names, name) if fresh and name is not None and name not in entry.state.names else entry.state.names,
            resolved_at=max(entry.state.resolved_at, moment) if fresh else entry.state.resolved_at,
        )
        if state == entry.state:
            return
        before, shown = entry.hub_id, hub_id(entry.manifest.ref, state.alias)
        async with self._do.key_locks(("hub", shown)):
            self._refuse_taken(wish)
            if (state.names, shown) != (entry.state.names, before):
                entry.changing = True
                try:
                    await self._do.disk.call(self._republish, entry, state, before)
                finally:
                    entry.changing = False
            await self._do.disk.call(self._do.catalog.write_state, entry.id, state)
            entry.state = state
        if fresh and name is not None:
            self._do.shelf.resolved(entry.id.slug, name, entry.id)
            await self._take_names(entry, (name,))

    def _republish(self, entry: Entry, state: EntryState, before: str | None) -> None:
        shown = hub_id(entry.manifest.ref, state.alias)
        self._do.views.publish(entry.manifest, hub_id=shown, names=state.names)
        if before not in (None, shown):
            self._do.views.withdraw_hub(entry.manifest, hub_id=before)

    # -- planning

    async def _plan(self, resolved: Resolved, wish: EnsureRequest, moment: float) -> FillPlan:
        source = self._do.sources[resolved.ref.scheme]
        listing = await self._do.net.call(source.list, resolved)
        have = self._do.shelf.entries.get(EntryId(resolved.ref.slug, resolved.ref.revision or ""))
        plan = make_plan(
            resolved,
            listing,
            asked=str(wish.ref),
            selection=wish.selection,
            also=have.manifest.by_path if have else (),
        )
        plan = replace(plan, alias=wish.alias, pin=wish.pin, priority=wish.priority, resolved_at=moment)
        for file in plan.files:
            source.refuse(resolved, file)
        return plan

    async def dry_run(self, wish: EnsureRequest) -> DryRun:
        """What `ensure` would do."""
        self._check_alias(wish)
        resolved, moment = await self._resolve(wish.ref)
        plan = await self._plan(resolved, wish, moment)
        here = await self._fetcher.here(plan)
        adopted = {file.path for files in here.adopt.values() for file in files}
        missing = {file.path for file in plan.files} - here.files.keys() - adopted
        fetch = sum(here.needs.values())
        refusal: ErrorInfo | None = None
        try:
            await self._do.ledger.check(str(plan.ref), here.needs)
        except SpaceError as error:
            refusal = ErrorInfo.of(error)
        rate = self._last_rate()
        return DryRun(
            entry=str(plan.id),
            ref=str(plan.ref),
            revision=plan.id.revision,
            files=len(plan.files),
            bytes=plan.size,
            bytes_here=sum(file.size for file in plan.files if file.path not in missing),
            bytes_to_fetch=fetch,
            left_out=tuple((file.path, file.size) for file in plan.left_out),
            seconds=fetch / rate if rate else None,
            fits=refusal is None,
            refusal=refusal,
            paths=tuple((file.path, file.size, file.path not in missing) for file in plan.files),
        )

    def _last_rate(self) -> float | None:
        """Bytes per second of the newest fill that fetched enough to tell."""
        fills = [entry.state for entry in self._do.shelf.entries.values() if entry.state.fill_seconds > 0 and entry.state.fill_bytes > 2**20]
        newest = max(fills, key=lambda state: state.resolved_at, default=None)
        return newest.fill_bytes / newest.fill_seconds if newest else None

    def _check_alias(self, wish: EnsureRequest) -> None:
        if wish.alias is not None:
            if wish.ref.scheme is Scheme.HF and wish.alias != wish.ref.location:
                raise RequestError(Code.BAD_REQUEST, f"cannot show {wish.ref} as {wish.alias}: a Hub model is shown under its own name")
            self._do.layout.hub_repo(wish.alias)
        self._refuse_taken(wish)

    def _refuse_taken(self, wish: EnsureRequest) -> None:
        name = hub_id(wish.ref, wish.alias)
        if name is not None and self._do.shelf.alias_taken(name, wish.ref.slug):
            raise RequestError(Code.ALIAS_CONFLICT, f"cannot show {wish.ref} as {name}: another source's model has that name")

    # -- what goes on by itself

    async def resume(self, plan: FillPlan) -> None:
        """Carry out a plan an earlier run left, on its own revision, until it is done or cannot be."""

        async def work(job: Job) -> None:
            self._jobs.bind(job, plan.id)
            async with self._do.entry_locks(plan.id):
                if plan.id not in await self._do.disk.call(self._do.catalog.plans):
                    job.move(JobState.DONE)  # somebody carried it out, or removed it, meanwhile
                    return
                entry = self._do.shelf.entries.get(plan.id)
                if entry is not None and entry.broken is None and {file.path for file in plan.files} <= entry.manifest.by_path.keys():
                    await self._do.disk.call(self._do.catalog.remove_plan, plan.id)
                else:
                    await self._fill(job, plan)
            job.move(JobState.DONE)

        log.info("resuming a fill", extra={"facts": {"model": str(plan.id)}})
        await self.persist(lambda: self._jobs.start(("resume", plan.id), "fill", plan.ref, work)[0], f"the fill of {plan.id}", refused=None)

    async def keep(self, ref: Ref, model: ModelSetting) -> None:
        """Make a declared model ready, and go on trying."""
        wish = EnsureRequest(ref, Selection(model.include, model.exclude), model.alias, model.pin, Priority.DECLARED)
        await self.persist(lambda: self._start(wish)[0], f"the declared model {ref}")

    async def persist(self, start: Callable[[], Job | None], what: str, *, refused: float | None = RETRY_REFUSED) -> None:
        """Run a job again, ever less often, until it succeeds or there is none to start.

        `refused` is the pause in seconds after an error that says that trying again is no use; None gives up then.
        """
        pause = RETRY_FIRST
        while True:
            job = start()
            if job is None:
                return
            if job.task is not None:
                await asyncio.wait({job.task})
            if job.state in (JobState.DONE, JobState.CANCELLED) or job.error is None:
                return
            if not job.error.retryable and refused is None:
                return
            wait = pause if job.error.retryable else refused or pause
            log.warning("%s failed and is tried again in %g s: %s", what, wait, job.error, extra={"facts": {"code": job.error.code}})
            await asyncio.sleep(max(wait, job.error.retry_after_s or 0))
            pause = min(RETRY_MOST, pause * 2)
