"""The engine: wires store, sources and workers together and is what the API asks. It parses no HTTP and formats nothing for people.

Start order: lock and recognise the store, read the catalog, put half-made things right; plans, repairs and declared models go on in the background.
Stop is the reverse, bounded, and safe to be cut short: every step on the disk is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from nvcache import __version__
from nvcache.core.manifest import Manifest
from nvcache.core.ref import EntryId, Ref, Scheme, SlugName, parse_entry, parse_name, parse_ref
from nvcache.core.states import JobState, ModelState
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.context import Context
from nvcache.engine.ensure import Ensurer
from nvcache.engine.fetch import Fetcher
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.leases import Leases
from nvcache.engine.ledger import Ledger
from nvcache.engine.lookup import Lookup
from nvcache.engine.repair import Repairer
from nvcache.engine.shelf import Entry, Shelf
from nvcache.engine.startup import load_shelf
from nvcache.engine.status import (
    Counters,
    DryRun,
    EnsureRequest,
    JobStatus,
    LeaseStatus,
    ModelStatus,
    SpaceStatus,
)
from nvcache.engine.watch import Watcher, Watchers
from nvcache.engine.worker import transport_to_dict
from nvcache.engine.workers import Workers
from nvcache.errors import Code, IntegrityError, NvcacheError, RequestError
from nvcache.settings import Settings, child_environment, hub_token, proxies, proxy_hosts
from nvcache.sources.base import Source
from nvcache.sources.directory import Directory
from nvcache.sources.huggingface import HuggingFace, xet_available
from nvcache.sources.ranges import Transport
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import Catalog
from nvcache.store.root import Root
from nvcache.store.views import Views

log = logging.getLogger(__name__)
OPEN_TIMEOUT = 60.0  # seconds opening and reading the store may take before the disk counts as stalled
MEASURE_EVERY = 30.0  # seconds between two looks at the room that nobody asked for
LEASE_GRACE = 120.0  # seconds every lease lives on after a restart, so that its holder can find us again
STANDING_READY = 2  # worker processes that are started before there is work; the others come with it
TOUCH_EVERY = 60.0  # seconds between two notes of the same entry's use


class Engine:
    """One store and everything that happens in it. All methods belong to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.version = __version__
        self.counters = Counters()
        self._root: Root | None = None
        self._disk = DaemonExecutor("disk", 8)
        self._net = DaemonExecutor("net", 8)
        self._problems: tuple[str, ...] = ("the daemon is starting",)
        self._background: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None  # owns what goes on without being asked for
        self._mending: set[EntryId] = set()
        self._removals: set[asyncio.Task[None]] = set()
        self._jobs = Jobs(self._job_changed)
        self._do: Context
        self._leases: Leases
        self._lookup: Lookup
        self._ensurer: Ensurer
        self._fetcher: Fetcher
        self._repairer: Repairer
        self._watchers: Watchers

    # -- life

    async def start(self) -> None:
        """Take the store into use. Raises `ConfigError` (store-*) and `DiskError`; anything later is told by `problems`."""
        self._root = await self._disk.bounded(OPEN_TIMEOUT, f"open the store {self.settings.store}", Root.open, self.settings.store)
        self._do = self._wire(self._root)
        self._watchers = Watchers(self._status)
        self._fetcher = Fetcher(self._do)
        self._repairer = Repairer(self._do, self._fetcher)
        self._leases = Leases(self._do, self.settings.lease_ttl)
        self._lookup = Lookup(self._do, self._jobs, self._doubt)
        self._ensurer = Ensurer(self._do, self._jobs, self._fetcher, self._repairer, self._lookup, self.settings.resolve_ttl)
        await self._disk.bounded(OPEN_TIMEOUT, "read the store", load_shelf, self._do, self._root, clock.unix() + LEASE_GRACE)
        await self._do.ledger.measure()
        self._problems = ()
        self._do.workers.prepare(STANDING_READY)
        self._net.submit(import_module, "nvcache.sources.hubclient")  # a tenth of a second that the first fill need not wait for
        self._background = asyncio.create_task(self._run(), name="engine")

    async def stop(self) -> None:
        """End jobs, workers and watchers, in that order; plans stay for the next start."""
        self._problems = ("the daemon is stopping",)
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait({self._background})
        await self._jobs.stop()
        if self._removals:
            await asyncio.wait(self._removals)
        if self._root is not None:
            await self._do.workers.stop()
            self._watchers.close()
            self._root.close()

    def _wire(self, root: Root) -> Context:
        settings = self.settings
        transport = Transport(
            connect_timeout=settings.connect_timeout,
            stall_timeout=settings.stall_timeout,
            deadline=settings.fetch_deadline,
            ca_file=str(settings.ca_file) if settings.ca_file else None,
            proxies=proxies(),
        )
        blobs, shelf = Blobs(root.layout), Shelf()
        hello = {"root": str(settings.store), "direct": root.direct_io and settings.direct_io, "transport": transport_to_dict(transport)}
        sources: dict[Scheme, Source] = {
            Scheme.HF: HuggingFace(settings.hf_endpoint, lambda: hub_token(settings), transport),
            Scheme.FILE: Directory(),
        }
        return Context(
            layout=root.layout,
            blobs=blobs,
            views=Views(root.layout, blobs),
            catalog=Catalog(root.layout),
            ledger=Ledger(
                root.layout,
                blobs,
                self._disk,
                max_bytes=settings.max_bytes,
                min_free=settings.min_free,
                shown=shelf.shown,
                broken=shelf.broken,
            ),
            shelf=shelf,
            workers=Workers(settings.worker_count, settings.lanes, hello, child_environment() | {"HF_XET_CACHE": str(root.layout.tmp / "xet")}),
            sources=sources,
            disk=self._disk,
            net=self._net,
            version=self.version,
            changed=self._entry_changed,
            counters=self.counters,
        )

    async def _run(self) -> None:
        """Own everything that goes on without being asked for."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._keep_measuring(), name="measure")
            for plan in (await self._disk.call(self._do.catalog.plans)).values():
                group.create_task(self._ensurer.resume(plan), name=f"resume-{plan.id}")
            for entry in list(self._do.shelf.entries.values()):
                if entry.broken is not None:
                    self._keep_mending(entry.id)
            for model in self.settings.models:
                ref = parse_ref(model.ref if model.revision is None else f"{model.ref}@{model.revision}")
                group.create_task(self._ensurer.keep(ref, model), name=f"declared-{ref}")

    async def _keep_measuring(self) -> None:
        while True:
            await asyncio.sleep(MEASURE_EVERY)
            try:
                await self._do.ledger.measure()
                self._problems = ()
            except NvcacheError as error:
                self._problems = (str(error),)
            await self._leases.expire()

    # -- what is here

    def problems(self) -> tuple[str, ...]:
        """Why the node should not be asked, in words; empty when it may be. Never blocks."""
        return self._problems

    def models(self, state: ModelState | None = None) -> list[ModelStatus]:
        """Every model the node has or is making, by name, from memory."""
        return self._lookup.all(state)

    async def model(self, name: str) -> ModelStatus:
        """One model by reference, slug or entry. Raises `RequestError` (bad-reference, unknown-model)."""
        status = await self._lookup.model(name)
        if status.state is ModelState.READY:
            self._touch(parse_entry(status.entry))
        return status

    def manifest(self, entry: str) -> Manifest | None:
        """The manifest of an entry, once it has one."""
        found = self._do.shelf.entries.get(parse_entry(entry))
        return found.manifest if found else None

    def space(self) -> SpaceStatus:
        """The store's room as last measured."""
        return self._do.ledger.status

    def stripe(self) -> dict[str, object]:
        """What the store lies on. A directory for now: the disks below it are somebody else's."""
        room = self.space()
        return {
            "backend": "directory",
            "path": str(self.settings.store),
            "direct_io": bool(self._root and self._root.direct_io and self.settings.direct_io),
            "space": {"total": room.total, "free": room.free, "used": room.used, "limit": room.limit},
            "health": "ok" if not self._problems else "; ".join(self._problems),
        }

    async def sources(self) -> list[dict[str, object]]:
        """Where models come from, as this daemon is set up; no secret is part of it."""
        token = await self._net.call(hub_token, self.settings)  # it reads a file
        through = proxies()
        hub: dict[str, object] = {"scheme": str(Scheme.HF), "endpoint": self.settings.hf_endpoint, "token": token is not None, "xet": xet_available()}
        directory: dict[str, object] = {"scheme": str(Scheme.FILE), "endpoint": None, "token": False, "xet": False}
        return [hub | {"proxies": proxy_hosts(through), "no_proxy": "no" in through}, directory | {"proxies": {}, "no_proxy": False}]

    def watch(self, entry: str) -> AbstractAsyncContextManager[Watcher]:
        """A queue of an entry's statuses: the one now, then every change; None ends it."""
        return self._watchers.watch(parse_entry(entry))

    # -- making ready

    async def ensure(self, wish: EnsureRequest) -> ModelStatus | JobStatus:
        """Make a model ready: its status if it is, else the job that everybody with the same wish shares."""
        answer = await self._ensurer.ensure(wish)
        if isinstance(answer, Job):
            return answer.status()
        self._touch(parse_entry(answer.entry))
        return answer

    async def dry_run(self, wish: EnsureRequest) -> DryRun:
        """What making a model ready would fetch, and whether it fits. Raises what resolving raises."""
        return await self._ensurer.dry_run(wish)

    async def verify(self, name: str) -> JobStatus:
        """Read every byte of a model back and repair what is bad. Raises `RequestError` (unknown-model)."""
        entry_id = self._lookup_entry(parse_name(name))
        return self._start_verify(entry_id).status()

    def _lookup_entry(self, name: Ref | SlugName) -> EntryId:
        entry_id = self._do.shelf.find(name)
        return self._do.shelf.only(name) if entry_id is None else entry_id

    def _start_verify(self, entry_id: EntryId) -> Job:
        entry = self._do.shelf.entries[entry_id]

        async def work(job: Job) -> None:
            try:
                async with self._do.entry_locks(entry_id):
                    found = self._do.shelf.entries.get(entry_id)
                    if found is None:
                        raise RequestError(Code.UNKNOWN_MODEL, f"cannot verify {entry_id}: it was removed meanwhile")
                    if found.broken is None:
                        await self._repairer.verify(job, found)
                    if found.broken is not None:  # also when a look-up found files gone meanwhile
                        await self._repairer.recover(job, found)
            except NvcacheError as error:
                if error.retryable and error.code is not Code.STOPPING:
                    self._keep_mending(entry_id)
                raise
            job.move(JobState.DONE)

        return self._start_job(entry, "verify", work)

    def _start_repair(self, entry_id: EntryId) -> Job | None:
        """A job that brings a withdrawn entry back; None when there is nothing to bring back any more."""
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None or entry.broken is None:
            return None

        async def work(job: Job) -> None:
            async with self._do.entry_locks(entry_id):
                found = self._do.shelf.entries.get(entry_id)
                if found is not None and found.broken is not None:
                    await self._repairer.recover(job, found)
            job.move(JobState.DONE)

        return self._start_job(entry, "repair", work)

    def _start_job(self, entry: Entry, kind: str, work: Callable[[Job], Coroutine[Any, Any, None]]) -> Job:
        """Verification and repair of one entry share a flight: each does the other's work where that is needed."""
        job, _ = self._jobs.start(("verify", entry.id), kind, entry.manifest.ref, work)
        self._jobs.bind(job, entry.id)
        return job

    def _keep_mending(self, entry_id: EntryId) -> None:
        """Repair a withdrawn entry, again and again until it is whole or removed; one such task for an entry."""
        if entry_id in self._mending or self._group is None:
            return

        async def mend() -> None:
            try:
                await self._ensurer.persist(partial(self._start_repair, entry_id), f"the repair of {entry_id}")
            finally:
                self._mending.discard(entry_id)

        self._mending.add(entry_id)
        self._group.create_task(mend(), name=f"mend-{entry_id}")

    def _doubt(self, entry: Entry) -> None:
        """A look-up found files missing or of another size: from now on the entry is not served, until it is whole again."""
        log.error("files of a model are gone or short; it is withdrawn and repaired", extra={"facts": {"model": str(entry.id)}})
        entry.broken = IntegrityError(Code.DEGRADED, f"cannot serve {entry.id}: files of it are gone or short")
        self._entry_changed(entry.id)
        self._keep_mending(entry.id)

    # -- keeping and removing

    async def remove(self, name: str) -> ModelStatus:
        """Withdraw a model and free its blobs. Raises `RequestError` (unknown-model, ambiguous-revision, pinned, leased, in-use)."""
        wanted = parse_name(name)
        if self._do.shelf.find(wanted) is None and (unfinished := self._lookup.unfinished(wanted)) is not None:
            return await self._forget(unfinished)
        entry_id = self._do.shelf.only(wanted)
        await self._do.entry_locks.acquire(entry_id)
        try:
            entry = await self._removable(entry_id)
        except BaseException:
            self._do.entry_locks.release(entry_id)
            raise
        entry.removing = True  # since the last look at its leases nothing waited
        self._do.changed(entry_id)
        removal = asyncio.create_task(self._take_away(entry), name=f"remove-{entry_id}")
        self._removals.add(removal)
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

    async def _removable(self, entry_id: EntryId) -> Entry:
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None:
            raise RequestError(Code.UNKNOWN_MODEL, f"cannot remove {entry_id}: it was removed meanwhile")
        self._check_held(entry)
        if await self._disk.call(self._in_use, entry):
            raise RequestError(Code.IN_USE, f"cannot remove {entry_id}: a process on this node has its files open")
        self._check_held(entry)  # a lease may have come meanwhile
        return entry

    def _removed(self, removal: asyncio.Task[None]) -> None:
        self._removals.discard(removal)
        if not removal.cancelled() and (error := removal.exception()) is not None:
            log.error("a model could not be removed: %s", error)

    async def _take_away(self, entry: Entry) -> None:
        """Views, manifest, state, leases, and the blobs nobody else wants; the entry's lock is given back at the end."""
        try:
            await self._withdraw(entry)
        finally:
            self._do.entry_locks.release(entry.id)

    async def _withdraw(self, entry: Entry) -> None:
        leases = [lease.id for lease in self._do.shelf.leases.values() if lease.entry == entry.id]

        def work() -> None:
            self._do.views.withdraw(entry.manifest, hub_id=entry.hub_id)
            self._do.catalog.remove_manifest(entry.id)
            self._do.catalog.remove_plan(entry.id)
            self._do.catalog.remove_state(entry.id)
            for lease in leases:
                self._do.catalog.remove_lease(lease)

        try:
            await self._disk.call(work)
        except NvcacheError as error:
            entry.removing, entry.broken = False, error
            self._keep_mending(entry.id)
            raise
        self._do.shelf.drop(entry.id)
        self._ensurer.forget(entry.id)
        self._jobs.forget(entry.id)
        self._do.changed(entry.id)
        log.info("removed", extra={"facts": {"model": str(entry.id)}})
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
        self._jobs.forget(job.entry)
        self._do.changed(job.entry)
        found = status or ModelStatus(str(job.entry), str(job.ref), job.entry.revision, ModelState.ABSENT, 0, 0)
        return replace(found, state=ModelState.ABSENT, path=None, hub_cache=None, error=None)

    def _check_held(self, entry: Entry) -> None:
        if entry.state.pin:
            raise RequestError(Code.PINNED, f"cannot remove {entry.id}: it is pinned")
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

    async def pin(self, name: str, pinned: bool) -> ModelStatus:
        """Never remove a model to make room, or let it be again. Raises `RequestError` (unknown-model)."""
        entry_id = self._lookup_entry(parse_name(name))
        async with self._do.entry_locks(entry_id):
            entry = self._do.shelf.entries.get(entry_id)
            if entry is None:
                raise RequestError(Code.UNKNOWN_MODEL, f"cannot pin {entry_id}: it was removed meanwhile")
            if entry.state.pin is not pinned:
                state = replace(entry.state, pin=pinned)
                await self._disk.call(self._do.catalog.write_state, entry_id, state)
                entry.state = state
                self._do.changed(entry_id)
                log.info("pinned" if pinned else "unpinned", extra={"facts": {"model": str(entry_id)}})
        return await self.model(str(entry_id))

    # -- leases

    async def lease(self, name: str, holder: str, ttl_s: float | None) -> LeaseStatus:
        """Hold a ready model while loading. Raises `RequestError` (unknown-model, not-ready, bad-request)."""
        status = await self.model(name)
        return await self._leases.take(status, holder, ttl_s)

    async def renew(self, name: str, lease: str, ttl_s: float | None) -> LeaseStatus:
        """Hold on to a lease. Raises `RequestError` (unknown-lease, bad-request)."""
        return await self._leases.renew(parse_name(name), lease, ttl_s)

    async def release(self, name: str, lease: str) -> None:
        """Let go. Raises `RequestError` (unknown-lease)."""
        await self._leases.release(parse_name(name), lease)

    def leases(self) -> list[LeaseStatus]:
        """Every lease that has not run out."""
        return self._leases.all()

    # -- jobs

    def jobs(self) -> list[JobStatus]:
        """Jobs under way and those that ended within the last hour."""
        return [job.status() for job in self._jobs]

    def job(self, job_id: str) -> JobStatus:
        """One job. Raises `RequestError` (unknown-job)."""
        return self._jobs.get(job_id).status()

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop a job; what it fetched stays until the room is needed or the daemon restarts. Raises `RequestError` (unknown-job)."""
        job = self._jobs.get(job_id)
        await self._jobs.cancel(job)
        await self._do.ledger.measure()
        return job.status()

    def _job_changed(self, job: Job) -> None:
        if job.state is JobState.FAILED and job.error is not None:
            code = str(job.error.code)
            self.counters.fill_failures[code] = self.counters.fill_failures.get(code, 0) + 1
            log.error("%s of %s failed: %s", job.kind, job.ref, job.error, extra={"facts": {"job": job.id, "code": code}})
        if job.entry is not None:
            self._watchers.changed(job.entry)

    # -- helpers

    def _entry_changed(self, entry_id: EntryId) -> None:
        self._watchers.changed(entry_id)

    def _status(self, entry_id: EntryId) -> ModelStatus | None:
        return self._lookup.status(entry_id)

    def _touch(self, entry_id: EntryId) -> None:
        """Note a use in memory, and on the disk at most once a minute, without waiting for it."""
        entry = self._do.shelf.entries.get(entry_id)
        now = clock.unix()
        if entry is not None and now - (entry.last_used or 0) >= TOUCH_EVERY:
            entry.last_used = now
            self._disk.submit(self._do.catalog.touch, entry_id, now)
