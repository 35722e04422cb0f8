"""One opened store and everything that happens in it. It parses no HTTP, and follows no stripe: `engine` opens and closes it.

Loading reads the catalog and puts half-made things right; plans, repairs, declared models and what another store had go on in the background. The end
is the reverse, and safe to be cut short: every step on the disk is. Whoever waits for an answer gets the reason at once; when `leave` is done, this
process and its workers have nothing open below the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from nvcache import __version__
from nvcache.core.evict import Marks
from nvcache.core.plan import FillPlan
from nvcache.core.ref import EntryId, Scheme, parse_entry, parse_name
from nvcache.core.space import Room
from nvcache.core.states import ModelState
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor, owned
from nvcache.engine.context import Context
from nvcache.engine.declared import Declared
from nvcache.engine.ensure import Ensurer
from nvcache.engine.evict import Evictor
from nvcache.engine.fetch import Fetcher
from nvcache.engine.hold import Hold
from nvcache.engine.jobs import Jobs
from nvcache.engine.kaito import Kaito, Links
from nvcache.engine.leases import GRACE, Leases
from nvcache.engine.ledger import Ledger
from nvcache.engine.lookup import Lookup
from nvcache.engine.mend import Mender
from nvcache.engine.otel import Spans
from nvcache.engine.refill import Known, Memory, Refiller
from nvcache.engine.remove import Remover
from nvcache.engine.repair import Repairer
from nvcache.engine.rescue import Rescue
from nvcache.engine.scrub import Scrubber
from nvcache.engine.share import Share
from nvcache.engine.shelf import Entry, Shelf
from nvcache.engine.startup import load_shelf
from nvcache.engine.status import Counters, EnsureRequest, ErrorInfo, ModelStatus, SpaceStatus
from nvcache.engine.timeline import Timeline
from nvcache.engine.turns import Limit
from nvcache.engine.watch import Bell, Watchers
from nvcache.engine.worker import transport_to_dict
from nvcache.engine.workers import Workers
from nvcache.errors import Code, NvcacheError, RequestError
from nvcache.settings import ModelSetting, Settings, azure_access, child_environment, hub_token, source_transport
from nvcache.sources.azure.source import AzureBlob
from nvcache.sources.base import Source
from nvcache.sources.directory import Directory
from nvcache.sources.huggingface import HuggingFace
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import Catalog
from nvcache.store.root import Root
from nvcache.store.timeline import Timelines
from nvcache.store.views import Views

log = logging.getLogger(__name__)
MEASURE_EVERY = 30.0  # seconds between two looks at the room and the files that nobody asked for
STANDING_READY = 2  # worker processes that are started before there is work; the others come with it
TOUCH_EVERY = 60.0  # seconds between two notes of the same entry's use


@dataclass(frozen=True, slots=True)
class Lasting:
    """What outlives every session of a daemon. `bell` rings at every change."""

    jobs: Jobs
    counters: Counters
    net: DaemonExecutor
    bell: Bell
    links: Links
    declared: Declared
    spans: Spans | None


class Session:
    """One store in use. All methods belong to one event loop. `doubt` is told of what fails in it."""

    def __init__(self, settings: Settings, hold: Hold, root: Root, lasting: Lasting, *, doubt: Callable[[NvcacheError], None]) -> None:
        self.loaded = False
        self.problems: tuple[str, ...] = ()
        self.direct_io = root.direct_io and settings.direct_io
        self._settings = settings
        self._hold = hold
        self._root = root
        jobs = self._jobs = lasting.jobs
        self._refusal: Callable[[], NvcacheError] | None = None  # makes the error that says why it takes no more calls
        self._flights: set[asyncio.Timeout] = set()
        self._ending: list[asyncio.Task[None]] = []  # what was cancelled and has not ended yet
        self._background: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None  # owns what goes on without being asked for
        self._keeping: dict[ModelSetting, asyncio.Task[None]] = {}  # declared models, also those that are ready
        self._pinned: set[EntryId] = set()  # by declaration, as it was told last
        do = self.do = self._wire(lasting, doubt)
        fetcher = Fetcher(do)
        repairer = Repairer(do, fetcher)
        self.watchers = Watchers(self._status, lasting.bell)
        self.leases = Leases(do, settings.lease_ttl, self.touch)
        self.lookup = Lookup(do, jobs, hold.checks, self._withdraw, self._doubt_bytes)
        self.ensurer = Ensurer(do, jobs, fetcher, repairer, self.lookup, settings)
        self.mender = Mender(do, jobs, repairer, self._spawn)
        self.remover = Remover(do, jobs, self.lookup, fetcher, self._forget, self.mender.keep_mending)
        self.evictor = Evictor(do, self.remover, Marks(settings.evict_high, settings.evict_low))
        do.ledger.evictor = self.evictor
        self.scrubber = Scrubber(do, self.mender.scrub, settings.scrub_days, settings.scrub_bandwidth)
        self.refiller = Refiller(do, jobs, self.ensurer)
        self.share = Share(do, hold.share)

    def _wire(self, lasting: Lasting, doubt: Callable[[NvcacheError], None]) -> Context:
        settings, layout = self._settings, self._root.layout
        transport = source_transport(settings)
        blobs, shelf = Blobs(layout), Shelf()
        views = Views(layout, blobs)
        log_level = settings.log_level if settings.log_level != "info" else "warning"  # of each try of each lane the daemon tells once for all
        hello = {
            "root": str(layout.root),
            "direct": self.direct_io,
            "transport": transport_to_dict(transport),
            "log": {"level": log_level, "style": settings.log_format},
        }
        environment = child_environment() | {"HF_XET_CACHE": str(layout.tmp / "xet")}
        limits = {
            str(Scheme.HF): Limit(settings.hf_connections, settings.hf_bandwidth),
            str(Scheme.AZ): Limit(settings.az_connections, settings.az_bandwidth),
        }
        ledger = Ledger(
            layout, blobs, self._hold.disk, max_bytes=settings.max_bytes, min_free=settings.min_free, shown=shelf.shown, broken=shelf.broken
        )
        sources: dict[Scheme, Source] = {
            Scheme.HF: HuggingFace(settings.hf_endpoint, lambda: hub_token(settings), transport),
            Scheme.AZ: AzureBlob(lambda: azure_access(settings), transport),
            Scheme.FILE: Directory(),
        }
        workers = Workers(settings.worker_count, settings.lanes, hello, environment, lasting.counters, doubt, limits)
        return Context(
            layout=layout,
            blobs=blobs,
            views=views,
            catalog=Catalog(layout),
            ledger=ledger,
            shelf=shelf,
            workers=workers,
            rescue=Rescue([each.mirror for each in settings.mirrors], workers, lasting.net, lasting.counters),
            kaito=Kaito(shelf, views, self._hold.disk, lasting.links, doubt),
            timeline=Timeline(Timelines(layout), self._hold.disk, lambda: {entry.slug for entry in list(shelf.entries)}, lasting.spans),
            declared=lasting.declared,
            sources=sources,
            disk=self._hold.disk,
            net=lasting.net,
            version=__version__,
            changed=self._changed,
            doubt=doubt,
            counters=lasting.counters,
        )

    # -- life

    async def load(self, memory: Memory, *, refill: bool) -> None:
        """Read the store and begin to serve it, with the wishes of `memory` and, if `refill`, its models. Raises `DiskError`, `SpaceError`."""
        plans = await self.do.disk.call(load_shelf, self.do, self._root, clock.unix() + GRACE)
        await self.do.disk.call(self.do.timeline.load)
        self.do.timeline.started(__version__)
        await self.do.kaito.settle()
        await self.do.ledger.measure()
        self.do.workers.prepare(STANDING_READY)
        self.do.net.submit(import_module, "nvcache.sources.hubclient")  # a tenth of a second that the first fill need not wait for
        lost = self.refiller.owe(memory.known) if refill else []
        self._background = owned(self._run(plans, memory.wishes, lost), "session")
        self.loaded = True

    def refuse(self, why: Callable[[], NvcacheError], *, jobs: bool) -> None:
        """End every call with `why()`, now and from now on, and every job, with `jobs` for that reason too. Nothing waits; `leave` does."""
        self._refusal = why
        self.do.kaito.close()
        now = asyncio.get_running_loop().time()
        for flight in self._flights:
            flight.reschedule(now)
        self._ending = self._jobs.desert(why() if jobs else None)
        if self._background is not None:
            self._background.cancel()
            self._ending.append(self._background)
        self.watchers.close(ErrorInfo.of(why()) if jobs else None)

    async def leave(self) -> None:
        """Close everything, as long as a dead disk takes: workers first, they leave at once; whoever waits for a thread; the threads; the lock."""
        assert self._refusal is not None  # noqa: S101 - `refuse` comes first
        await self.do.workers.stop()
        await asyncio.gather(*self._ending, *self.remover.under_way, return_exceptions=True)
        await self.do.timeline.close()
        await self._hold.release(self._refusal)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """One call from outside: when the session ends meanwhile, the call ends with the reason, whatever it waits for."""
        if self._refusal is not None:
            raise self._refusal()
        try:
            async with asyncio.timeout(None) as flight:
                self._flights.add(flight)
                try:
                    yield
                finally:
                    self._flights.discard(flight)
        except (NvcacheError, TimeoutError) as error:
            if self._refusal is not None:
                raise self._refusal() from error
            if isinstance(error, NvcacheError):
                self.do.doubt(error)
            raise

    # -- what goes on by itself

    async def _run(self, plans: Iterable[FillPlan], wishes: Iterable[EnsureRequest], lost: Iterable[Known]) -> None:
        """Until it is cancelled. It begins with all it was given and awaits nothing that may fail: one failure would end everything else."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._keep_measuring(), name="measure")
            if self._settings.scrub_days:
                group.create_task(self.scrubber.run(), name="scrub")
            for plan in plans:
                group.create_task(self.ensurer.resume(plan), name=f"resume-{plan.id}")
            for entry in list(self.do.shelf.entries.values()):
                if entry.broken is not None:
                    self.mender.keep_mending(entry.id)
            self.keep_declared()
            for wish in wishes:
                group.create_task(self.ensurer.again(wish), name=f"again-{wish.ref}")
            for known in lost:
                group.create_task(self.refiller.bring(known), name=f"refill-{known.id}")

    def keep_declared(self) -> None:
        """Begin on every model that is declared and was not, and try no more for those that are not any more; a fill under way goes on."""
        for model in self._keeping.keys() - set(self.do.declared.models):
            self._keeping.pop(model).cancel()
        if self._group is None or self._refusal is not None:
            return  # `_run` does it, or nobody
        for model in self.do.declared.models:
            if model not in self._keeping:
                self._keeping[model] = self._group.create_task(self.ensurer.keep(model), name=f"declared-{model.reference}")
        before, shelf = self._pinned, self.do.shelf
        self._pinned = {entry.id for entry in shelf.entries.values() if self.do.declared.pins(entry, shelf)}
        for entry_id in before ^ self._pinned:
            self.watchers.changed(entry_id)

    async def _keep_measuring(self) -> None:
        while True:
            await asyncio.sleep(MEASURE_EVERY)
            try:
                await self.evictor.look_who_reads()
                await self.evictor.keep_to_marks()
                await self.leases.expire()
                await self.lookup.check_all()
                self.problems = ()
            except NvcacheError as error:
                self.do.doubt(error)
                self.problems = (str(error),)
            await self.do.kaito.settle()

    def space(self) -> SpaceStatus:
        """The store's room as last measured, with the marks of eviction."""
        seen, settings = self.do.ledger.status, self._settings
        most = Room(seen.limit, seen.used, seen.reserved, seen.free, settings.min_free).capacity
        high, low = int(most * settings.evict_high), int(most * settings.evict_low)
        return replace(seen, min_free=settings.min_free, high_mark=high, low_mark=low)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start what ends with the session; at its end nothing is started any more."""
        if self._group is None or self._refusal is not None:
            work.close()
        else:
            self._group.create_task(work, name=name)

    # -- names and notices

    def entry_of(self, name: str) -> EntryId:
        """The entry a name means. Raises `RequestError` (bad-reference, unknown-model, ambiguous-revision)."""
        wanted = parse_name(name)
        found = self.do.shelf.find(wanted)
        return self.do.shelf.only(wanted) if found is None else found

    async def model(self, name: str) -> ModelStatus:
        """One model; asking for one that is ready is a use. Raises `RequestError` (bad-reference, unknown-model)."""
        status = await self.lookup.model(name)
        if status.state is ModelState.READY:
            self.touch(parse_entry(status.entry))
        return status

    def touch(self, entry_id: EntryId) -> None:
        """Note a use in memory, and on the disk at most once a minute, without waiting for it."""
        entry = self.do.shelf.entries.get(entry_id)
        if entry is None:
            return
        entry.last_used, now = clock.unix(), clock.monotonic()
        if now - entry.use_noted >= TOUCH_EVERY:
            entry.use_noted = now
            self.do.disk.submit(self.do.catalog.touch, entry_id, entry.last_used)

    async def pin(self, name: str, pinned: bool) -> ModelStatus:
        """Never remove a model to make room, or let it be again. Raises `RequestError` (unknown-model; pinned: it is declared so)."""
        entry_id = self.entry_of(name)
        async with self.do.entry_locks(entry_id):
            entry = self.do.shelf.entries.get(entry_id)
            if entry is None:
                raise RequestError(Code.UNKNOWN_MODEL, f"cannot pin {entry_id}: it was removed meanwhile")
            if not pinned and self.do.declared.pins(entry, self.do.shelf):
                why = f"cannot unpin {entry_id}: it is declared with pin = true"
                raise RequestError(Code.PINNED, why, hint="take pin out of its [[models]] table in the daemon's file")
            if entry.state.pin is not pinned:
                await self.do.decide(entry, lambda state: replace(state, pin=pinned))
                self.do.changed(entry_id)
                log.info("pinned" if pinned else "unpinned", extra={"facts": {"model": str(entry_id)}})
        return await self.lookup.model(str(entry_id))

    def _forget(self, entry_id: EntryId) -> None:
        self.ensurer.forget(entry_id)
        self.refiller.forget(entry_id)

    def _doubt_bytes(self, entry: Entry) -> None:
        self.mender.doubt(entry)

    def _withdraw(self, entry: Entry) -> None:
        self.mender.withdraw(entry)

    def _changed(self, entry_id: EntryId) -> None:
        self.watchers.changed(entry_id)
        self.mender.changed(entry_id)

    def _status(self, entry_id: EntryId) -> ModelStatus | None:
        return self.lookup.status(entry_id)
