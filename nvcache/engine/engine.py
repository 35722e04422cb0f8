"""The engine: what the API asks, with or without a store. It parses no HTTP, formats nothing for people, and touches no file of the store itself.

A call that needs a store is handed to the session that is open on the stripe (`follow`). Counters and jobs outlive the sessions.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from nvcache import __version__
from nvcache.core.manifest import Manifest
from nvcache.core.ref import Ref, Scheme, parse_entry, parse_name
from nvcache.core.states import JobState, ModelState
from nvcache.core.timeline import Event, of_revision
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.declared import Declared
from nvcache.engine.follow import Follower
from nvcache.engine.handover import PlainDirectory, StripeLink
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.otel import Spans
from nvcache.engine.session import Session
from nvcache.engine.share import Share
from nvcache.engine.shelf import unknown
from nvcache.engine.status import Counters, DryRun, EnsureRequest, EvictionStatus, JobStatus, LeaseStatus, ModelStatus, SpaceStatus
from nvcache.engine.watch import Bell, Changes, Watcher
from nvcache.errors import Code, RequestError
from nvcache.settings import LIVE, Settings, azure_access, hub_token, proxies, proxy_hosts
from nvcache.sources.huggingface import xet_available

log = logging.getLogger(__name__)
NO_SPACE = SpaceStatus(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Sharing:
    """One blob, on its way to another node. `size` in bytes."""

    _share: Share
    _sha256: str
    size: int

    async def send(self, sock: socket.socket, offset: int, count: int) -> None:
        """See `Share.send`."""
        await self._share.send(self._sha256, sock, offset, count)


class Engine:
    """One daemon's engine. All methods belong to one event loop. Calls that need a store raise `DiskError` (no-stripe) while there is none."""

    def __init__(self, settings: Settings, link: StripeLink | None = None, spans: Spans | None = None) -> None:
        """Over the stripe that `link` tells of; without one, over the directory `settings.store`. `spans` hear of jobs; the caller closes them."""
        self.settings = settings
        self.config_failure: str | None = None  # why the file cannot be used as it is now
        self.version = __version__
        self.counters = Counters()
        self._net = DaemonExecutor("net", 8)
        self._jobs = Jobs(self._job_changed)
        self._follower = Follower(settings, link or PlainDirectory(settings.store), self._jobs, self.counters, self._net, spans)

    # -- life

    async def start(self) -> None:
        """Begin to follow the stripe.

        A plain directory is opened before this returns, unless the disk does not answer. Raises `ConfigError` (store-*) and `DiskError` then: nobody
        else will put it right. Anything later, and everything about a stripe that somebody looks after, is told by `problems`.
        """
        await self._follower.start()

    async def stop(self) -> None:
        """End jobs, workers and watchers; plans stay for the next start."""
        await self._follower.stop()

    @property
    def changes(self) -> Bell:
        """Rings when something changed that the engine tells: a model, a job, the stripe."""
        return self._follower.bell

    @property
    def session(self) -> Session | None:
        """What goes on in the store, while one is open."""
        session = self._follower.session
        return session if session is not None and session.loaded else None

    @property
    def declared(self) -> Declared:
        """The models that the operator wants kept ready."""
        return self._follower.declared

    def converge(self, settings: Settings) -> None:
        """Take over what may change while it runs: the declared models are begun on, those that are declared no more may be evicted."""
        self.settings = self.settings.model_copy(update={name: getattr(settings, name) for name in LIVE})
        self.declared.put(settings.models)
        if self.session is not None:
            self.session.keep_declared()
        self.changes.ring()

    # -- what is here

    def problems(self) -> tuple[str, ...]:
        """Why the node should not be asked, in words; empty when it may be. Never blocks."""
        return self._follower.problems

    def causes(self) -> tuple[str, ...]:
        """`problems` in words that name no model."""
        return self._follower.causes

    def degraded(self) -> int:
        """How many models are withdrawn because their files are not what they should be. Never blocks."""
        return sum(entry.broken is not None for entry in self.session.do.shelf.entries.values()) if self.session is not None else 0

    def models(self, state: ModelState | None = None) -> list[ModelStatus]:
        """Every model the node has or is making, by name, from memory; none while there is no store."""
        return self.session.lookup.all(state) if self.session is not None else []

    async def model(self, name: str, *, use: bool = True) -> ModelStatus:
        """One model by reference, slug or entry; `use`: eviction takes it for used. Raises `RequestError` (bad-reference, unknown-model)."""
        async with self._follower.serving() as session:
            return await (session.model(name) if use else session.lookup.model(name))

    def known_as(self, entry: str) -> list[Ref]:
        """Every reference that means an entry just now; none while there is no store, or without the entry."""
        shelf = self.session.do.shelf if self.session is not None else None
        found = shelf.entries.get(parse_entry(entry)) if shelf is not None else None
        return shelf.known_as(found) if shelf is not None and found is not None else []

    async def look(self) -> None:
        """Look whether the files of every ready model are there, as a look-up does, but as no use of it. Raises `DiskError` (no-stripe)."""
        async with self._follower.serving() as session:
            for entry in list(session.do.shelf.entries.values()):
                if entry.broken is None:
                    await session.lookup.check(entry)

    def manifest(self, entry: str) -> Manifest | None:
        """The manifest of an entry, once it has one."""
        found = self._follower.ready().do.shelf.entries.get(parse_entry(entry))
        return found.manifest if found else None

    def space(self) -> SpaceStatus:
        """The store's room as last measured; nothing while there is no store."""
        return self.session.space() if self.session is not None else NO_SPACE

    def stripe(self) -> dict[str, object]:
        """What the store lies on, as whoever looks after the disks tells it, and what the store makes of it."""
        state, room, problems = self._follower.state, self.space(), self.problems()
        return {
            **state.details,
            "backend": state.details.get("backend") or self.settings.backend,
            "state": state.state,
            "code": state.code,
            "reason": state.reason,
            "generation": state.generation,
            "fs_uuid": state.fs_uuid,
            "path": state.store,
            "direct_io": self.session is not None and self.session.direct_io,
            "space": {"total": room.total, "free": room.free, "used": room.used, "limit": room.limit},
            "health": "ok" if not problems else "; ".join(problems),
        }

    async def sources(self) -> list[dict[str, object]]:
        """Where models come from, as this daemon is set up; no secret is part of it."""
        token = await self._net.call(hub_token, self.settings)  # it reads a file
        azure = await self._net.call(azure_access, self.settings)
        through = proxies()
        hub: dict[str, object] = {"scheme": str(Scheme.HF), "endpoint": self.settings.hf_endpoint, "token": token is not None, "xet": xet_available()}
        has = bool(azure.connection_string or azure.key or azure.sas)
        blobs: dict[str, object] = {"scheme": str(Scheme.AZ), "endpoint": f"https://*.blob.{azure.suffix}", "token": has, "xet": False}
        directory: dict[str, object] = {"scheme": str(Scheme.FILE), "endpoint": None, "token": False, "xet": False}
        by = {"proxies": proxy_hosts(through), "no_proxy": "no" in through}
        return [hub | by, blobs | by, directory | {"proxies": {}, "no_proxy": False}]

    def watch(self, entry: str) -> AbstractAsyncContextManager[Watcher]:
        """A queue of an entry's statuses: the one now, then every change; None or an error ends it."""
        return self._follower.ready().watchers.watch(parse_entry(entry))

    @asynccontextmanager
    async def share(self, sha256: str) -> AsyncIterator[Sharing]:
        """A blob that a ready model shows, to be sent while this is open. Raises `RequestError` (unknown-blob), `DiskError`."""
        async with self._follower.serving() as session:
            yield Sharing(session.share, sha256, await session.share.size_of(sha256))

    def watch_all(self) -> AbstractAsyncContextManager[Changes]:
        """Every model, then the changes of all from now on. Raises `DiskError` (no-stripe)."""
        session = self._follower.ready()
        return session.watchers.watch_all(session.lookup.ids())

    async def timeline(self, name: str) -> list[Event]:
        """What happened to a model, or with a revision to that one; also when it is gone. Raises `RequestError` (bad-reference, unknown-model)."""
        wanted = parse_name(name)
        async with self._follower.serving() as session:
            found = session.do.shelf.find(wanted)
            events = await session.do.timeline.of(found.slug if found is not None else wanted.slug)
        if wanted.revision is not None and (found is not None or not isinstance(wanted, Ref) or wanted.pinned):
            events = of_revision(events, found.revision if found is not None else wanted.revision)
        if not events and found is None:
            raise unknown(wanted)
        return events

    # -- making ready

    async def ensure(self, wish: EnsureRequest, who: str | None = None) -> ModelStatus | JobStatus:
        """Make a model ready: its status if it is, else the job that everybody with the same wish shares. `who` asks is noted."""
        async with self._follower.serving() as session:
            answer = await session.ensurer.ensure(wish, who)
            if isinstance(answer, Job):
                return answer.status()
            session.touch(parse_entry(answer.entry))
            return answer

    async def dry_run(self, wish: EnsureRequest) -> DryRun:
        """What making a model ready would fetch, and whether it fits. Raises what resolving raises."""
        async with self._follower.serving() as session:
            return await session.ensurer.dry_run(wish)

    async def verify(self, name: str, bandwidth: int | None = None) -> JobStatus:
        """Read every byte of a model back, at most `bandwidth` a second, and repair what is bad. Raises `RequestError` (unknown-model)."""
        session = self._follower.ready()
        return session.mender.verify(session.entry_of(name), bandwidth).status()

    # -- keeping and removing

    async def remove(self, name: str) -> ModelStatus:
        """Withdraw a model and free its blobs. Raises `RequestError` (unknown-model, ambiguous-revision, pinned, leased, in-use)."""
        async with self._follower.serving() as session:
            return await session.remover.remove(name)

    async def evict(self, need: int, *, dry_run: bool) -> EvictionStatus:
        """Make room for `need` bytes by removing models, or say which. Raises `SpaceError` (too-large, full) when that much cannot be had."""
        async with self._follower.serving() as session:
            return await session.evictor.evict(need, dry_run=dry_run)

    async def pin(self, name: str, pinned: bool) -> ModelStatus:
        """Never remove a model to make room, or let it be again. Raises `RequestError` (unknown-model)."""
        async with self._follower.serving() as session:
            return await session.pin(name, pinned)

    # -- leases

    async def lease(self, name: str, holder: str, ttl_s: float | None, adopts: Callable[[str], bool] | None = None) -> LeaseStatus:
        """Hold a ready model while loading. A live lease on it whose holder `adopts` accepts is renewed and handed over instead of a new one.

        A slug with `adopts` only adopts: which revision its holder was given is not known here. Raises `RequestError` (unknown-model, not-ready,
        unknown-lease, bad-request).
        """
        wanted = parse_name(name)
        async with self._follower.serving() as session:
            if adopts is not None:
                if (adopted := await session.leases.adopt(wanted, adopts, holder, ttl_s)) is not None:
                    return adopted
                if wanted.revision is None:
                    raise RequestError(Code.UNKNOWN_LEASE, f"cannot adopt a lease on {name}: no live one is held under that name")
            return await session.leases.take(await session.model(name), holder, ttl_s)

    async def renew(self, name: str, lease: str, ttl_s: float | None) -> LeaseStatus:
        """Hold on to a lease. Raises `RequestError` (unknown-lease, bad-request)."""
        async with self._follower.serving() as session:
            return await session.leases.renew(parse_name(name), lease, ttl_s)

    async def release(self, name: str, lease: str) -> None:
        """Let go. Raises `RequestError` (unknown-lease)."""
        async with self._follower.serving() as session:
            await session.leases.release(parse_name(name), lease)

    def leases(self) -> list[LeaseStatus]:
        """Every lease that has not run out; those of a store that is gone are gone."""
        return self.session.leases.all() if self.session is not None else []

    # -- jobs

    def jobs(self) -> list[JobStatus]:
        """Jobs under way and those that ended within the last hour, also on a store that is gone."""
        return [job.status() for job in self._jobs]

    def job(self, job_id: str) -> JobStatus:
        """One job. Raises `RequestError` (unknown-job)."""
        return self._jobs.get(job_id).status()

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop a job; what it fetched stays until the room is needed or the daemon restarts. Raises `RequestError` (unknown-job)."""
        job = self._jobs.get(job_id)
        async with self._follower.serving() as session:
            await self._jobs.cancel(job)
            await session.do.ledger.measure()
        return job.status()

    def _job_changed(self, job: Job) -> None:
        if job.state is JobState.FAILED and job.error is not None:
            code = str(job.error.code)
            self.counters.fill_failures[code] = self.counters.fill_failures.get(code, 0) + 1
            facts = {"model": str(job.entry or job.ref.slug), "job": job.id, "code": code}
            log.error("%s of %s failed: %s", job.kind, job.ref, job.error, extra={"facts": facts})
            self._follower.doubt(job.error)
        self.changes.ring()
        if job.entry is not None and self.session is not None:
            self.session.watchers.changed(job.entry)
