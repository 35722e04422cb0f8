"""Turns a wish into a ready model: hit, join, or a job that resolves, plans and fills. It moves no bytes and writes no manifest.

Single flight has two levels: callers with the same wish share one job; jobs that turn out to mean the same entry take turns, and the second finds it
ready. A moving name is resolved at most once in `resolve_ttl` seconds. When its source does not answer in `STALE_WAIT` seconds and the revision
it meant last is ready, that one is served, with a note: a source that is down never takes away what is here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import replace

from nvcache.core.manifest import Check, Selection
from nvcache.core.plan import FillPlan, Priority
from nvcache.core.ref import EntryId, Ref, Scheme, parse_ref
from nvcache.core.selection import chooses
from nvcache.core.space import human
from nvcache.core.states import JobState, ModelState
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.blocking import unbroken
from nvcache.engine.context import Context
from nvcache.engine.fetch import Fetcher
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.lookup import Lookup
from nvcache.engine.persist import persist
from nvcache.engine.planning import make_plan, refuse_unproven
from nvcache.engine.repair import Repairer
from nvcache.engine.shelf import DEFAULT_NAME, Entry, hub_id
from nvcache.engine.status import DryRun, EnsureRequest, ErrorInfo, ModelStatus
from nvcache.engine.trace import SHORT, Trace
from nvcache.errors import Code, RequestError, SourceError, SpaceError
from nvcache.settings import ModelSetting, Settings
from nvcache.sources.base import Resolved
from nvcache.store.catalog import EntryState
from nvcache.store.ingest import ingest_keys

log = logging.getLogger(__name__)
STALE_WAIT = 3.0  # seconds a caller waits for a source before the last resolved revision is served
REFUSED = frozenset({Code.BAD_TOKEN, Code.SOURCE_FORBIDDEN})  # a SAS that ran out at night must not stop pods whose model is here
CHANGES = 4  # times a source is listed that is written to while it is read


class Ensurer:
    """Wishes to jobs. All methods belong to the event loop."""

    def __init__(self, context: Context, jobs: Jobs, fetcher: Fetcher, repairer: Repairer, lookup: Lookup, settings: Settings) -> None:
        self._do = context
        self._repairer = repairer
        self._jobs = jobs
        self._fetcher = fetcher
        self._lookup = lookup
        self._ttl = settings.resolve_ttl
        self._require_digest = settings.require_digest
        self._resolved: dict[Ref, tuple[Resolved, float, float]] = {}  # what, when (monotonic), when (unix)
        self.resuming: dict[EntryId, FillPlan] = {}  # plans of an earlier run that are not carried out yet, also between two tries

    async def ensure(self, wish: EnsureRequest, who: str | None = None) -> ModelStatus | Job:
        """The status of a ready model, else the job everybody with this wish shares. Raises `RequestError` (alias-conflict, bad-request)."""
        meant = self._meant(wish)
        answer = await self._ensure(meant, who)
        if meant is wish or isinstance(answer, Job):
            return answer
        note = f"on this node {meant.alias} is {meant.ref.base}"
        return replace(answer, note=f"{note}; {answer.note}" if answer.note else note)

    async def _ensure(self, wish: EnsureRequest, who: str | None) -> ModelStatus | Job:
        self._check_alias(wish)
        fresh = self._known(wish.ref)
        if fresh is not None and (entry := await self._hit(fresh, wish)) is not None and (found := await self._as_hit(entry)) is not None:
            self._do.counters.hits += 1
            self._do.timeline.hit(entry.id, who)
            return found
        stale = self._do.shelf.find(wish.ref) if not wish.ref.pinned else None
        job, new = self._start(wish, "a pod or a person waits for it" if wish.priority is Priority.DEMAND else "to have it here", who)
        self._do.counters.misses += new
        self._do.counters.joined += not new
        if stale is not None and self._good_enough(stale, wish) is not None:
            return await self._last_resort(job, stale, wish, who)
        return job

    def _meant(self, wish: EnsureRequest) -> EnsureRequest:
        """The same wish of the source that the operator has a Hub model's name from, declared or shown: pods keep the name, wherever that is.

        Declared counts before anything is here, or the first pod that asks would have the name taken by the Hub's own model.
        """
        if wish.alias is not None or wish.ref.scheme is not Scheme.HF or self._do.shelf.revisions(wish.ref.slug):
            return wish
        named = wish.ref.revision not in (None, DEFAULT_NAME)
        shown = self._do.shelf.shown_as(wish.ref)
        ref = None if named else self._do.declared.aliased.get(wish.ref.location)
        if ref is None and shown is not None:
            ref = shown.manifest.ref.at(shown.id.revision if named else None)
        return wish if ref is None else replace(wish, ref=ref, alias=wish.ref.location)

    def _good_enough(self, stale: EntryId, wish: EnsureRequest) -> Entry | None:
        """What was resolved last, if it may be served. Digests that it lacks may have been published since: the job tells."""
        try:
            return self._fitting(stale, wish)
        except RequestError as error:
            if error.code is not Code.NO_DIGEST:
                raise
            return None

    async def _last_resort(self, job: Job, stale: EntryId, wish: EnsureRequest, who: str | None) -> ModelStatus | Job:
        """Something usable is here: give the source a moment to say whether it is still what is meant. If it is not, it is left as it is."""
        if job.task is not None:
            await asyncio.wait({job.task}, timeout=STALE_WAIT)
        if job.state is JobState.DONE and job.entry is not None:
            return await self._lookup.model(str(job.entry))
        down = job.state is JobState.FAILED and job.error is not None and (job.error.retryable or job.error.code in REFUSED)
        late = job.state in (JobState.QUEUED, JobState.RESOLVING)
        if (down or late) and (entry := self._good_enough(stale, wish)) is not None:
            why = str(job.error) if job.error is not None else f"its source did not answer in {STALE_WAIT:g} s"
            if await unbroken(self._update(entry, wish, None, 0.0)) and (found := await self._as_hit(entry)) is not None:
                self._do.counters.hits += 1
                self._do.timeline.note(
                    entry.id, Kind.HIT, job=job.id, what="the revision that was resolved last: the source could not be asked", who=who
                )
                return replace(found, note=f"the last resolved revision is served: {why}")
        return job

    async def _as_hit(self, entry: Entry) -> ModelStatus | None:
        """The entry as this caller sees it: nothing was fetched for it, whatever an earlier caller's fill did. None when it is not ready any more."""
        state = await self._lookup.check(entry)
        status = self._lookup.status(entry.id, state)
        if status is None or status.state not in (ModelState.READY, ModelState.UNKNOWN):
            return None
        return replace(status, fetched_bytes=0, seconds=0.0)

    def _start(self, wish: EnsureRequest, what: str, who: str | None = None) -> tuple[Job, bool]:
        async def work(job: Job) -> None:
            await self._make_ready(job, wish)

        job, new = self._jobs.start((wish.ref, wish.selection, wish.alias, wish.pin, wish.require_digest), "fill", wish.ref, work, wish.priority)
        job.wish = job.wish or wish
        self._do.timeline.follow(job, what, who)
        self._hurry(job, wish.priority)
        return job, new

    def _hurry(self, job: Job, priority: Priority) -> None:
        """Somebody to whom it is that urgent waits for `job`, and so for those that it waits for itself."""
        if self._jobs.hurry(job, priority):
            self._do.workers.reconsider()

    async def _make_ready(self, job: Job, wish: EnsureRequest, stale: Set[str] = frozenset()) -> None:
        """Resolve, plan, fill; again when the source changes meanwhile. `stale` are ingest keys of what was fetched of it before."""
        job.move(JobState.RESOLVING)
        self._do.workers.prepare()
        for left in reversed(range(CHANGES)):
            try:
                await self._make_as_it_is_now(job, wish, stale)
                break
            except SourceError as error:
                if not _moved(error, wish.ref) or left == 0:
                    raise
                stale |= await self._start_over(job, wish.ref, error)
        job.move(JobState.DONE)

    async def ask_anew(self, job: Job, wish: EnsureRequest, error: SourceError) -> None:
        """Go on with a job whose exact revision is gone by what its wish means now. Raises `error` if it is not about that."""
        if not _moved(error, wish.ref):
            raise error
        await self._make_ready(job, wish, await self._start_over(job, wish.ref, error))

    async def _start_over(self, job: Job, ref: Ref, error: SourceError) -> set[str]:
        """The source was written to while it was read: drop the plan, so that the next one is of what is there now. Returns its ingest keys."""
        job.note = f"listed again: {error}"
        log.warning("%s is listed again: %s", ref, error, extra={"facts": {"code": error.code, "job": job.id}})
        self._resolved.pop(ref, None)
        self._do.counters.retries += 1
        plan, job.plan = job.plan, None
        if plan is not None:
            await self._do.disk.call(self._do.catalog.remove_plan, plan.id)
        job.move(JobState.RESOLVING)
        return ingest_keys(plan.files) if plan is not None else set()

    async def _make_as_it_is_now(self, job: Job, wish: EnsureRequest, stale: Set[str]) -> None:
        """Resolve, plan, fill. `stale` are ingest keys of earlier tries; those that are still wanted are gone on with, the others dropped."""
        resolved, moment = await self._resolve(wish.ref, job.trace)
        entry_id = EntryId(resolved.ref.slug, resolved.ref.revision or "")
        self._jobs.bind(job, entry_id)
        leader = job.leader = next((other for other in self._jobs.of(entry_id) if other is not job and not other.state.ended), None)
        self._hurry(job, job.priority)
        async with self._turn(job, entry_id, f"job {leader.id}, a {leader.kind} of it" if leader else "what else is done with it"):
            job.leader = None
            if leader is not None and leader.state is JobState.DONE:
                job.tally = leader.tally  # what was fetched while this one waited was fetched for it, too
            entry = self._do.shelf.entries.get(entry_id)
            if entry is not None and entry.broken is not None:
                await self._repairer.recover(job, entry)
            if await self._hit(entry_id, wish, resolved.name, moment) is None:
                plan = await self._plan(resolved, wish, moment, job.trace)
                if stale:
                    await self._do.ledger.free(stale - ingest_keys(plan.files), ())
                await self.fill(job, plan)

    async def fill(self, job: Job, plan: FillPlan) -> None:
        """Carry out a plan for a job that holds the entry's lock, and let the entry take its names."""
        job.plan = plan
        entry = await self._fetcher.fill(job, plan)
        await self._take_names(entry, entry.state.names)
        seconds = clock.monotonic() - job.began
        log.info(
            "filled: %s fetched of %s in %.1f s",
            human(job.tally.fetched),
            human(plan.size),
            seconds,
            extra={"facts": {"model": str(plan.id), "job": job.id}},
        )
        self._do.counters.filled(seconds)

    async def _take_names(self, entry: Entry, names: tuple[str, ...]) -> None:
        """A moving name belongs to the newest entry it was resolved to; take it from the others of the slug."""
        for other in list(self._do.shelf.entries.values()):
            if other.id.slug == entry.id.slug and other.id != entry.id and set(other.state.names) & set(names):
                await self._do.decide(other, lambda state: replace(state, names=tuple(name for name in state.names if name not in names)))
                self._do.changed(other.id)

    # -- resolving

    def _known(self, ref: Ref) -> EntryId | None:
        """What a reference means without asking its source: it is pinned, or was resolved a moment ago."""
        if ref.pinned:
            return EntryId(ref.slug, ref.revision or "")
        found = self._resolved.get(ref)
        if found is None or clock.monotonic() - found[1] > self._ttl:
            return None
        return EntryId(ref.slug, found[0].ref.revision or "")

    async def _resolve(self, ref: Ref, trace: Trace) -> tuple[Resolved, float]:
        """What `ref` means, and since when that is known (unix seconds)."""
        found = self._resolved.get(ref)
        if found is not None and clock.monotonic() - found[1] <= self._ttl:
            return found[0], found[2]
        moment = clock.unix()
        with trace.phase(Kind.RESOLVED, what=str(ref)) as facts:
            resolved = await self._do.ask(ref.scheme, self._do.sources[ref.scheme].resolve, ref)
            facts |= {"what": f"{ref} is {resolved.ref.revision}", "source": resolved.endpoint}
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
        entry = self._fitting(entry_id, wish)
        return entry if entry is not None and await unbroken(self._update(entry, wish, name, moment)) else None

    def _fitting(self, entry_id: EntryId, wish: EnsureRequest) -> Entry | None:
        """The entry when it is ready and has every file of the wish. Raises `RequestError` (no-digest) when one lacks a digest that is required."""
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None or entry.broken is not None or entry.removing:
            return None
        manifest = entry.manifest
        every = [*manifest.by_path, *(file.path for file in manifest.left_out)]
        wanted = chooses(wish.selection, every)
        if not wanted <= manifest.by_path.keys():
            return None
        if wish.require_digest or self._require_digest:
            refuse_unproven(manifest.ref, sorted(path for path in wanted if manifest.by_path[path].check is Check.FIRST_USE))
        return entry

    async def _update(self, entry: Entry, wish: EnsureRequest, name: str | None, moment: float) -> bool:
        """Bring an entry's pin, alias and names up to a wish that it fulfils; `name` was resolved to it at `moment` (unix seconds).

        False when it was removed or made anew before that could be done. It is not removed meanwhile.
        """
        fresh = name is not None and not self._do.shelf.newer(entry.id.slug, name, moment, entry.id)

        def wanted() -> EntryState:
            now = entry.state
            return replace(
                now,
                pin=now.pin or wish.pin,
                alias=wish.alias or now.alias,
                names=(*now.names, name) if fresh and name is not None and name not in now.names else now.names,
                resolved_at=max(now.resolved_at, moment) if fresh else now.resolved_at,
            )

        if wanted() == entry.state:
            return True
        async with self._do.state_locks(entry.id), self._do.key_locks(("hub", hub_id(entry.manifest.ref, wish.alias or entry.state.alias))):
            self._refuse_taken(wish)
            if entry.removing or self._do.shelf.entries.get(entry.id) is not entry:
                return False
            await self._put_state(entry, wanted())
        self._do.changed(entry.id)
        if fresh and name is not None:
            self._do.shelf.resolved(entry.id.slug, name, entry.id)
            await self._take_names(entry, (name,))
        await self._do.kaito.settle()
        return True

    async def _put_state(self, entry: Entry, state: EntryState) -> None:
        """Have it, in the views as well."""
        before, shown = entry.hub_id, hub_id(entry.manifest.ref, state.alias)
        entry.changing = True
        try:
            if (state.names, shown) != (entry.state.names, before):
                await self._do.disk.call(self._republish, entry, state, before)
            await self._do.disk.call(self._do.catalog.write_state, entry.id, state)
            entry.state = state
        finally:
            entry.changing = False

    def _republish(self, entry: Entry, state: EntryState, before: str | None) -> None:
        shown = hub_id(entry.manifest.ref, state.alias)
        self._do.views.publish(entry.manifest, hub_id=shown, names=state.names)
        if before not in (None, shown):
            self._do.views.withdraw_hub(entry.manifest, hub_id=before)

    # -- planning

    @asynccontextmanager
    async def _turn(self, job: Job, entry_id: EntryId, after: str) -> AsyncIterator[None]:
        """The entry's lock, for one job, which may wait for it after another."""
        with job.trace.phase(Kind.WAITED, least=SHORT, what=after):
            await self._do.entry_locks.acquire(entry_id)
        try:
            yield
        finally:
            self._do.entry_locks.release(entry_id)

    async def _plan(self, resolved: Resolved, wish: EnsureRequest, moment: float, trace: Trace) -> FillPlan:
        source = self._do.sources[resolved.ref.scheme]
        with trace.phase(Kind.LISTED, source=resolved.endpoint) as facts:
            listing = await self._do.ask(resolved.ref.scheme, source.list, resolved)
            facts["count"] = len(listing)
        have = self._do.shelf.entries.get(EntryId(resolved.ref.slug, resolved.ref.revision or ""))
        plan = make_plan(
            resolved,
            listing,
            asked=str(wish.ref),
            selection=wish.selection,
            also=have.manifest.by_path if have else (),
            require_digest=wish.require_digest or self._require_digest,
        )
        before = (self._do.shelf.entries[entry_id].state.alias for entry_id in self._do.shelf.revisions(resolved.ref.slug))
        alias = wish.alias or next(filter(None, before), None)  # a new revision takes the model's name over, and its refs with it
        plan = replace(plan, alias=alias, pin=wish.pin, resolved_at=moment)
        for file in plan.files:
            source.refuse(resolved, file)
        return plan

    async def dry_run(self, wish: EnsureRequest) -> DryRun:
        """What `ensure` would do."""
        wish = self._meant(wish)
        self._check_alias(wish)
        resolved, moment = await self._resolve(wish.ref, Trace())
        plan = await self._plan(resolved, wish, moment, Trace())
        here = await self._fetcher.here(plan)
        adopted = {file.path for files in here.adopt.values() for file in files}
        missing = {file.path for file in plan.files} - here.files.keys() - adopted
        fetch = sum(here.needs.values())
        refusal: ErrorInfo | None = None
        evicted: tuple[str, ...] = ()
        try:
            evicted = await self._do.ledger.check(str(plan.ref), here.needs, here.blobs)
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
            would_evict=evicted,
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
        self._do.shelf.refuse_taken(wish.ref, hub_id(wish.ref, wish.alias))

    # -- what goes on by itself

    async def resume(self, plan: FillPlan) -> None:
        """Carry out a plan an earlier run left, on its own revision, until it is done or cannot be."""
        asked = parse_ref(plan.asked)

        async def work(job: Job) -> None:
            try:
                await carry_out(job)
            except SourceError as error:
                await self.ask_anew(job, EnsureRequest(asked, plan.selection, plan.alias, plan.pin, plan.priority), error)

        async def carry_out(job: Job) -> None:
            self._jobs.bind(job, plan.id)
            async with self._turn(job, plan.id, "what else is done with it"):
                if plan.id not in await self._do.disk.call(self._do.catalog.plans):
                    job.move(JobState.DONE)  # somebody carried it out, or removed it, meanwhile
                    return
                entry = self._do.shelf.entries.get(plan.id)
                if entry is not None and entry.broken is None and {file.path for file in plan.files} <= entry.manifest.by_path.keys():
                    await self._fetcher.give_back(plan)
                else:
                    await self._refuse_plan(plan)
                    await self.fill(job, plan)
            job.move(JobState.DONE)

        log.info("resuming a fill", extra={"facts": {"model": str(plan.id)}})
        self.resuming[plan.id] = plan

        def start() -> Job:
            job, _ = self._jobs.start(("resume", plan.id), "fill", plan.ref, work, plan.priority)
            self._do.timeline.follow(job, "a fill that was cut short goes on")
            return job

        await persist(start, f"the fill of {plan.id}", refused=None)
        del self.resuming[plan.id]

    async def _refuse_plan(self, plan: FillPlan) -> None:
        """Raises `RequestError` (no-digest), and gives back what was fetched, if digests are required since the plan was made."""
        if self._require_digest and (unproven := [file.path for file in plan.files if file.digest is None]):
            await self._fetcher.give_back(plan)
            refuse_unproven(plan.ref, unproven)

    async def again(self, wish: EnsureRequest) -> None:
        """Go on with what somebody asked for before the store went away."""
        await persist(lambda: self._start(wish, "asked for before the disks went")[0], f"the fill of {wish.ref}", refused=None)

    async def keep(self, model: ModelSetting) -> None:
        """Make a declared model ready, and go on trying. Its pin is not written down: it ends with the declaration."""
        wish = EnsureRequest(model.reference, Selection(model.include, model.exclude), model.alias, priority=Priority.DECLARED)
        await persist(lambda: self._start(wish, "declared in the settings")[0], f"the declared model {wish.ref}")


def _moved(error: SourceError, asked: Ref) -> bool:
    """Whether to ask what the reference means now: its files were changed, and no exact revision is wanted. A Hub's commit never changes."""
    return error.code is Code.SOURCE_CHANGED and not asked.pinned and asked.scheme is not Scheme.HF
