"""Keeps the story of every model: what happens is noted in memory and written soon, in order, by one call at a time. It decides nothing by it.

A note never waits, never fails what it tells of, and holds no secret: texts are masked and cut. A disk that takes no notes costs the oldest of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from nvcache.core.ref import EntryId
from nvcache.core.timeline import Event, Kind, cut, fold, with_starts
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor, owned
from nvcache.engine.jobs import Job
from nvcache.engine.otel import JobSpans, Spans
from nvcache.engine.trace import Trace
from nvcache.errors import NvcacheError
from nvcache.logs import mask
from nvcache.store.timeline import DAEMON, Timelines

log = logging.getLogger(__name__)
BEHIND = 2000  # notes that may wait for the disk
GONE = 256  # stories that are kept of models that are not here
HIT_EVERY = 60.0  # seconds between two notes that a ready model was asked for
LAST = 1.0  # seconds that the last notes of a session may take
READ_TIMEOUT = 5.0  # seconds a story may take to be read


class Timeline:
    """The stories of one store. All methods but `at_start` belong to the event loop; `here` tells the slugs of the models that are here.

    `spans`, if there are any, hear the same.
    """

    def __init__(self, files: Timelines, disk: DaemonExecutor, here: Callable[[], set[str]], spans: Spans | None = None) -> None:
        self._files = files
        self._disk = disk
        self._here = here
        self._spans = spans
        self._due: deque[tuple[str, Event]] = deque(maxlen=BEHIND)
        self._writer: asyncio.Task[None] | None = None
        self._failing = self._closed = False
        self._known: dict[str, None] = {}  # slugs that have a story, the one that went on last at the end
        self._hits: dict[EntryId, float] = {}  # monotonic
        self._traces: dict[str, tuple[Job, Trace]] = {}

    # -- noting

    def note(self, about: EntryId, kind: Kind, **facts: Any) -> None:
        """Something happened to an entry just now; `facts` are fields of `Event`."""
        told = self._put(about.slug, Event(clock.unix(), kind, revision=about.revision, **facts))
        if self._spans is not None and kind in (Kind.RELEASED, Kind.EXPIRED):
            self._spans.lease(about, told)

    def hit(self, entry: EntryId, who: str | None) -> None:
        """A ready model was asked for; noted once a minute."""
        now = clock.monotonic()
        if now - self._hits.get(entry, float("-inf")) >= HIT_EVERY:
            self._hits[entry] = now
            self.note(entry, Kind.HIT, who=who)

    def follow(self, job: Job, what: str | None = None, who: str | None = None) -> None:
        """Note what becomes of a job; `what` says how it was asked for, None for one that nobody asks for."""
        if job.id not in self._traces:
            spans = self._spans.job(job.kind) if self._spans is not None else None
            hit = None if what is None else partial(self._hit_of, job)
            job.trace = Trace(partial(self._of_job, job, spans), hit, None if spans is None else lambda event: spans.file(_clean(event)))
            self._traces[job.id] = job, job.trace
            if job.task is not None:
                job.task.add_done_callback(lambda _: self._traces.pop(job.id, None))
            if what is not None:
                job.trace.happened(Kind.ASKED, what=what, who=who)
        elif what is not None:
            job.trace.joined(who)

    def started(self, version: str) -> None:
        """The daemon opened the store."""
        self._put(DAEMON, Event(clock.unix(), Kind.STARTED, what=f"the daemon opened the store (nvcache {version})"))

    def at_start(self, about: EntryId, kind: Kind, **facts: Any) -> None:
        """Like `note`, while the store is being opened: blocks, for a thread."""
        with self._forgiven():
            self._files.append(about.slug, [_clean(Event(clock.unix(), kind, revision=about.revision, **facts))])

    def load(self) -> None:
        """See which stories there are, and drop the oldest of models that are not here. Blocks."""
        with self._forgiven():
            here, names = self._here(), self._files.names()
            gone = [name for name in names if name not in here]
            for name in gone[: max(0, len(gone) - GONE)]:
                self._files.remove(name)
            self._known = dict.fromkeys(names)

    # -- telling

    async def of(self, slug: str) -> list[Event]:
        """The story of a model in order, with the starts of the daemon in between and, at the end, what is under way. Raises `DiskError`."""
        if self._writer is not None and not self._writer.done():
            await asyncio.wait({self._writer}, timeout=LAST)
        noted = [event for name, event in self._due if name == slug]
        events, starts = await self._disk.bounded(READ_TIMEOUT, f"read what happened to {slug}", self._read, slug)
        going = [
            _clean(_about(job, event))
            for job, trace in self._traces.values()
            if _slug(job) == slug and not job.state.ended
            for event in trace.going()
        ]
        told = with_starts(fold([*events, *noted]), starts)
        return [*told, *sorted(going, key=lambda event: event.at)]

    def _read(self, slug: str) -> tuple[list[Event], list[Event]]:
        return self._files.read(slug), self._files.read(DAEMON)

    async def close(self) -> None:
        """Give the last notes a second to be written."""
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=LAST)
            self._writer.cancel()
        self._closed = True

    # -- writing

    def _hit_of(self, job: Job, who: str | None) -> None:
        if job.entry is not None:
            self.hit(job.entry, who)

    def _of_job(self, job: Job, spans: JobSpans | None, event: Event) -> None:
        told = self._put(_slug(job), _about(job, event))
        if spans is not None:
            spans.heard(_slug(job), told)

    def _put(self, slug: str, event: Event) -> Event:
        event = _clean(event)
        if not self._closed:
            self._due.append((slug, event))
            if self._writer is None or self._writer.done():
                self._writer = owned(self._write(), "timeline")
        return event

    async def _write(self) -> None:
        while self._due:
            batch: dict[str, list[Event]] = {}
            for slug, event in self._due:
                batch.setdefault(slug, []).append(event)
            self._due.clear()
            with self._forgiven():
                await self._disk.call(self._append, batch, self._excess(batch))

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """A disk that takes no notes is told of once, until it takes one."""
        try:
            yield
        except NvcacheError as error:
            if not self._failing:
                log.warning("what happens is not noted for `nvcache why`: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _append(self, batch: dict[str, list[Event]], excess: list[str]) -> None:
        for slug in excess:
            self._files.remove(slug)
        failed: list[NvcacheError] = []
        for slug, events in batch.items():
            try:
                self._files.append(slug, events)
            except NvcacheError as error:
                failed.append(error)
        if failed:  # the others are written all the same
            raise failed[0]

    def _excess(self, batch: dict[str, list[Event]]) -> list[str]:
        """Put the slugs of a batch last among those that have a story; the stories of models that are gone which are too many now."""
        slugs = [slug for slug in batch if slug != DAEMON]
        more = any(slug not in self._known for slug in slugs)
        for slug in slugs:
            self._known.pop(slug, None)
            self._known[slug] = None
        if not more or len(self._known) <= GONE:
            return []
        here = self._here()
        gone = [slug for slug in self._known if slug not in here]
        excess = gone[: max(0, len(gone) - GONE)]
        for slug in excess:
            del self._known[slug]
        return excess


def _slug(job: Job) -> str:
    return job.entry.slug if job.entry is not None else job.ref.slug


def _about(job: Job, event: Event) -> Event:
    return replace(event, job=job.id, revision=job.entry.revision if job.entry is not None else None)


def _clean(event: Event) -> Event:
    """The event as it may be told: texts without credentials, and short; times to the millisecond."""
    words: dict[str, Any] = {name: cut(mask(value)) for name in ("source", "what", "who") if (value := getattr(event, name)) is not None}
    seconds = None if event.seconds is None else round(max(0.0, event.seconds), 3)
    return replace(event, at=round(event.at, 3), seconds=seconds, **words)
