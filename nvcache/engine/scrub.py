"""Reads ready models back on a slow clock: the one that was read longest ago first, one at a time, behind all other work. It mends nothing itself.

A model is read in small pieces with pauses between them that keep to a bandwidth. No lock is held meanwhile: whoever removes it need not wait, and
where it is changed or withdrawn the reading ends. What looks wrong is for `mend` to judge, which reads it again alone. How far a reading is gets
written now and then, so that a restart costs little.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import replace

from nvcache.core.plan import Priority
from nvcache.core.ref import EntryId
from nvcache.core.scrub import Piece, Reading, known_right, next_due, pieces
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.jobs import Job
from nvcache.engine.messages import CheckTask
from nvcache.engine.shelf import Entry

LOOK_EVERY = 60.0  # seconds between two looks whether one is due
SAVE_EVERY = 60.0  # seconds between two notes of how far a reading is
AGAIN = 3600.0  # seconds until a model whose reading came to nothing is tried again
DAY = 86400.0


class Scrubber:
    """Begins the readings of one store, for ever. `start` makes the job that reads one model, as `Mender.scrub`."""

    def __init__(self, context: Context, start: Callable[[EntryId, int, float], Job], days: int, bandwidth: int) -> None:
        self._do = context
        self._start = start
        self._period = days * DAY
        self._bandwidth = bandwidth
        self._later: dict[EntryId, float] = {}  # monotonic: not before

    async def run(self) -> None:
        """Read what is due, when it is due."""
        while True:
            due = next_due(self._readings(), clock.unix(), self._period, self._bandwidth)
            if due is None or due[1] > clock.unix():
                await asyncio.sleep(LOOK_EVERY)
                continue
            job = self._start(due[0], self._bandwidth, self._period)
            if job.task is not None:
                await asyncio.wait({job.task})
            if job.error is not None:
                self._later[due[0]] = clock.monotonic() + AGAIN

    def _readings(self) -> list[Reading]:
        """The models that are ready, but for those that are to be let alone for a while."""
        now, entries = clock.monotonic(), self._do.shelf.entries
        self._later = {entry_id: until for entry_id, until in self._later.items() if until > now and entry_id in entries}
        return [
            Reading(entry.id, _last(entry), sum(entry.manifest.blobs.values()))
            for entry in entries.values()
            if entry.broken is None and not entry.removing and entry.id not in self._later
        ]


async def survey(do: Context, job: Job, entry: Entry, bandwidth: int, fresh: float = 0.0) -> str | None:
    """Read a ready model at `bandwidth` bytes a second at most: the SHA-256 of the first blob that looks wrong, None when none does.

    It ends early when the model is not what it was any more. A reading that was cut short less than `fresh` seconds after it began is gone on with,
    and notes are made for the next; 0: neither. Raises `DiskError`, `Interrupted`.
    """
    plan = pieces(entry.manifest)
    began, done = _cut_short(entry, fresh)
    priority = job.priority  # it stays: a reading that holds no lock is in nobody's way
    job.tally.expect(len({piece.sha256 for piece in plan}), sum(entry.manifest.blobs.values()))
    saved = due = clock.monotonic()
    with job.trace.phase(Kind.READ, bytes=job.tally.bytes_total - done, what="from the disk, slowly, and compared"):
        for piece in plan:
            if piece.at >= done:
                if entry.broken is not None or do.shelf.entries.get(entry.id) is not entry:
                    return None
                due = max(due, clock.monotonic()) + piece.length / bandwidth
                if await _looks_wrong(do, job, entry, piece, priority):
                    return piece.sha256
                if fresh and clock.monotonic() - saved >= SAVE_EVERY:
                    saved = clock.monotonic()
                    await _save(do, entry, piece.at + piece.length, began)
                await asyncio.sleep(max(0.0, due - clock.monotonic()))
            _tell(job, entry, piece)
    return None


async def _looks_wrong(do: Context, job: Job, entry: Entry, piece: Piece, priority: Priority) -> bool:
    size, chunks = entry.manifest.blobs[piece.sha256], base64.b64encode(piece.chunks).decode()
    task = CheckTask(str(do.layout.blob(piece.sha256)), size, chunks, entry.manifest.chunk_size, piece.first)
    async with do.reads.piece() as watch:
        found = await do.workers.run(task, priority=lambda: priority, watch=watch)
    job.read(found["cached"])
    do.counters.scrubbed_bytes += piece.length
    return bool(found["bad"])


def _tell(job: Job, entry: Entry, piece: Piece) -> None:
    size, read = entry.manifest.blobs[piece.sha256], piece.first * entry.manifest.chunk_size + piece.length
    if read < size:
        job.tally.running(piece.sha256, read, 0)
    else:
        job.tally.finished(piece.sha256, size, 0)
        job.changed(job)


def _cut_short(entry: Entry, fresh: float) -> tuple[float, int]:
    """When the reading began that is gone on with (unix seconds), and the bytes it had read; now and none where there is none."""
    began, now = entry.state.scrub_began, clock.unix()
    if max(_last(entry), now - fresh) < began <= now:
        return began, entry.state.scrubbed
    return now, 0


def _last(entry: Entry) -> float:
    return known_right(entry.manifest.verified_at, entry.state.checked_at, now=clock.unix())


async def _save(do: Context, entry: Entry, done: int, began: float) -> None:
    """Note how far the reading is, unless somebody changes the entry just now: the next note will do."""
    if do.entry_locks.held(entry.id):
        return
    async with do.entry_locks(entry.id):
        await do.decide(entry, lambda state: replace(state, scrubbed=done, scrub_began=began))
