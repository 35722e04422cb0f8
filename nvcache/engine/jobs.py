"""Jobs: long work that is tracked, joined by every caller that wants the same, and remembered for an hour. It does none of the work itself."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from nvcache import logs
from nvcache.core.plan import FillPlan, Priority
from nvcache.core.ref import EntryId, Ref
from nvcache.core.states import JOB_MOVES, JobState
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.status import EnsureRequest, ErrorInfo, JobStatus, Progress
from nvcache.engine.trace import Trace
from nvcache.errors import Code, Interrupted, NvcacheError, RequestError

log = logging.getLogger(__name__)
KEEP = timedelta(hours=1)
KEEP_COUNT = 1000
RATE_WINDOW = 5.0  # seconds the shown rate looks back


class Tally:
    """Bytes and files of one job: what is there, what came over the network, and how fast."""

    def __init__(self) -> None:
        self.bytes_total = 0
        self.files_total = 0
        self.files_done = 0
        self.done_bytes = 0  # of files that are complete
        self.fetched_done = 0
        self._running: dict[str, tuple[int, int]] = {}
        self._samples: deque[tuple[float, int]] = deque()

    def expect(self, files: int, size: int) -> None:
        """Set what the whole job is, in files and bytes."""
        self.files_total, self.bytes_total = files, size

    def running(self, key: str, stored: int, fetched: int) -> None:
        """A file under way: `stored` bytes are here, `fetched` of them came in this try. What is shown never goes back."""
        before = self._running.get(key, (0, 0))
        self._running[key] = (max(before[0], stored), max(before[1], fetched))

    def finished(self, key: str, size: int, fetched: int, files: int = 1) -> None:
        """`files` files of `size` bytes are done at the price of `fetched` bytes over the network."""
        self._running.pop(key, None)
        self.done_bytes += size * files
        self.fetched_done += fetched
        self.files_done += files

    def dropped(self, key: str) -> int:
        """A try ended without the file; what it fetched, which is the answer, still counts as fetched."""
        _, fetched = self._running.pop(key, (0, 0))
        self.fetched_done += fetched
        return fetched

    @property
    def fetched(self) -> int:
        """Bytes over the network so far."""
        return self.fetched_done + sum(fetched for _, fetched in self._running.values())

    def snapshot(self, now: float) -> Progress:
        """The progress as of `now` (monotonic seconds). Samples the rate on the way."""
        done = min(self.bytes_total, self.done_bytes + sum(stored for stored, _ in self._running.values()))
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_WINDOW:
            self._samples.popleft()
        began, before = self._samples[0]
        rate = (done - before) / (now - began) if now - began > 0.05 else 0.0
        left = self.bytes_total - done
        return Progress(
            bytes_total=self.bytes_total,
            bytes_done=done,
            bytes_fetched=self.fetched,
            files_total=self.files_total,
            files_done=self.files_done,
            rate=max(0.0, rate),
            eta_s=left / rate if rate > 0 else None,
        )


@dataclass(eq=False)
class Job:
    """One piece of work. Only its own task moves it on; `changed` is called after every move."""

    id: str
    kind: str
    ref: Ref
    changed: Callable[[Job], None]
    created_at: datetime
    began: float  # monotonic
    priority: Priority = Priority.DEMAND  # it only ever grows more urgent
    entry: EntryId | None = None
    state: JobState = JobState.QUEUED
    ended_at: datetime | None = None
    seconds: float = 0.0
    error: NvcacheError | None = None
    note: str | None = None
    repaired_chunks: int = 0
    bad_files: tuple[str, ...] = ()
    cached: tuple[int, int] | None = None  # bytes of what was read that were in the page cache just before and just after
    tally: Tally = field(default_factory=Tally)
    trace: Trace = field(default_factory=Trace)
    task: asyncio.Task[None] | None = None
    wish: EnsureRequest | None = None  # what it was asked for, where somebody asked
    plan: FillPlan | None = None  # of a fill, once there is one
    cancelling: bool = False  # somebody asked for it; a daemon that stops does not
    deserted: NvcacheError | None = None  # why nothing can come of it any more
    leader: Job | None = None  # the job whose work this one waits for

    def move(self, state: JobState) -> None:
        """Go on to `state`; a move the table does not allow is a defect."""
        if state is self.state:
            return
        if state not in JOB_MOVES[self.state]:
            raise AssertionError(f"job moved from {self.state} to {state}")
        self.state = state
        if state.ended:
            self.ended_at = clock.now()
            self.seconds = clock.monotonic() - self.began
            self._tell_end()
        self.changed(self)

    def _tell_end(self) -> None:
        fill = self.kind == "fill"
        note = self.note if fill else _bad(self.repaired_chunks) if self.repaired_chunks else None
        self.trace.ended(
            self.state,
            self.error,
            good=Kind.READY if fill else Kind.VERIFIED,
            cancelled=self.cancelling,
            seconds=self.seconds,
            bytes=self.tally.fetched if fill else self.tally.done_bytes,
            what=note,
        )

    def read(self, cached: Sequence[int] | None) -> None:
        """Bytes were read back of which so many were in the page cache just before and just after; None: that cannot be told."""
        if cached is not None:
            before, after = self.cached or (0, 0)
            self.cached = before + cached[0], after + cached[1]

    def read_again(self) -> None:
        """All that was read is read once more, from the start."""
        self.tally, self.cached = Tally(), None

    def fail(self, error: NvcacheError) -> None:
        """End with an error; one that has ended stays as it is."""
        if self.state.ended:
            return
        self.error = error
        self.move(JobState.CANCELLED if error.code is Code.CANCELLED else JobState.FAILED)

    def status(self) -> JobStatus:
        """The job as seen now; a job that waits for another shows that one's progress."""
        leader = self.leader if self.leader is not None and not self.leader.state.ended and not self.state.ended else None
        shown = leader or self
        now = clock.monotonic()
        return JobStatus(
            id=self.id,
            kind=self.kind,
            ref=str(self.ref),
            entry=str(self.entry) if self.entry else None,
            state=shown.state,
            created_at=self.created_at,
            ended_at=self.ended_at,
            progress=shown.tally.snapshot(now),
            error=ErrorInfo.of(self.error) if self.error else None,
            seconds=self.seconds if self.state.ended else now - self.began,
            repaired_chunks=self.repaired_chunks,
            bad_files=self.bad_files,
            cached_before=self.cached[0] if self.cached else None,
            cached_after=self.cached[1] if self.cached else None,
            note=self.note,
        )


class Jobs:
    """The registry: single flight by key, one owner for every task."""

    def __init__(self, changed: Callable[[Job], None]) -> None:
        self._changed = changed
        self._jobs: dict[str, Job] = {}
        self._flights: dict[object, Job] = {}
        self._by_entry: dict[EntryId, list[Job]] = {}
        self._numbers = itertools.count(1)

    def start(self, key: object, kind: str, ref: Ref, work: Callable[[Job], Coroutine[Any, Any, None]], priority: Priority) -> tuple[Job, bool]:
        """The running job for `key`, else a new one doing `work`. The flag tells whether it is new."""
        running = self._flights.get(key)
        # Whoever saw it end may ask again before its task is gone, and who asks anew does not mean what is being given up.
        if running is not None and not running.state.ended and not running.cancelling:
            return running, False
        self._forget_old()
        job = Job(f"{next(self._numbers)}-{secrets.token_hex(4)}", kind, ref, self._changed, clock.now(), clock.monotonic(), priority)
        self._jobs[job.id] = self._flights[key] = job
        job.task = asyncio.create_task(self._own(job, work), name=f"job-{job.id}")
        job.task.add_done_callback(lambda _: self._ended(key, job))
        return job, True

    def _ended(self, key: object, job: Job) -> None:
        """The task is over, also one that was cancelled before its first step."""
        if self._flights.get(key) is job:
            del self._flights[key]
        job.fail(_cancelled(job))

    async def _own(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
        """Run `work` to a final state, whatever happens; all that is logged meanwhile names the job and its model."""
        with logs.context(model=job.ref.slug, job=job.id):
            await self._bring_to_end(job, work)

    async def _bring_to_end(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(job)
        except NvcacheError as error:
            job.fail(job.deserted or error)
        except asyncio.CancelledError:
            job.fail(_cancelled(job))
        except Exception as error:  # a defect: its trace goes to the log, its name to whoever waits
            log.exception("job %s failed unexpectedly", job.id)
            job.fail(job.deserted or NvcacheError(Code.INTERNAL, f"cannot finish {job.ref}: {type(error).__name__}"))

    def get(self, job_id: str) -> Job:
        """The job of that id. Raises `RequestError` (unknown-job)."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise RequestError(Code.UNKNOWN_JOB, f"cannot find job {job_id[:80]!r}: it never was, or ended more than an hour ago") from None

    def bind(self, job: Job, entry: EntryId) -> None:
        """The job turned out to be about `entry`; about another one than before, where its source changed."""
        if job.entry != entry:
            if job.entry is not None:
                self._by_entry[job.entry].remove(job)
            job.entry = entry
            self._by_entry.setdefault(entry, []).append(job)

    def of(self, entry: EntryId) -> list[Job]:
        """The jobs about an entry, oldest first."""
        return self._by_entry.get(entry, [])

    def forget(self, entry: EntryId) -> None:
        """Tell of `entry` no more by jobs that ended. Who has the id of one still learns what became of it."""
        self._by_entry[entry] = [job for job in self.of(entry) if not job.state.ended]
        if not self._by_entry[entry]:
            del self._by_entry[entry]

    def _drop(self, job: Job) -> None:
        del self._jobs[job.id]
        about = self._by_entry.get(job.entry, []) if job.entry is not None else []
        if job in about:  # not of a store that is closed
            about.remove(job)
        if job.entry is not None and not about:
            self._by_entry.pop(job.entry, None)

    def entries(self) -> list[EntryId]:
        """Every entry some remembered job is about."""
        return list(self._by_entry)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def hurry(self, job: Job, priority: Priority) -> bool:
        """Make `job` as urgent as `priority` at least, and where it waits for others about the same entry, those as well. True: some were less."""
        waits_for = self.of(job.entry) if job.entry is not None and job.leader is not None else []
        late = [each for each in (job, *waits_for) if priority < each.priority]
        for each in late:
            each.priority = priority
        return bool(late)

    async def cancel(self, job: Job) -> None:
        """Cancel and wait until it has ended; harmless when it already has."""
        if job.task is not None and not job.state.ended:
            job.cancelling = True
            job.task.cancel()
            await asyncio.wait({job.task})

    def desert(self, why: NvcacheError | None) -> list[asyncio.Task[None]]:
        """The store goes: cancel every job (they fail with `why`, if given), and forget which entry they were about. The tasks may take a moment."""
        running = [job for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for job in running:
            job.deserted = why
        self._flights.clear()
        self._by_entry.clear()
        tasks = [job.task for job in running if job.task is not None]
        for task in tasks:
            task.cancel()
        return tasks

    def give_up(self) -> None:
        """End those that were deserted and whose tasks are stuck, so that nobody waits for them."""
        for job in self._jobs.values():
            if job.deserted is not None:
                job.fail(job.deserted)

    def _forget_old(self) -> None:
        horizon = clock.now() - KEEP
        ended = [job for job in self._jobs.values() if job.ended_at is not None]
        excess = len(self._jobs) - KEEP_COUNT
        for job in ended:
            if (job.ended_at is not None and job.ended_at < horizon) or excess > 0:
                self._drop(job)
                excess -= 1


def _cancelled(job: Job) -> NvcacheError:
    return job.deserted or Interrupted(Code.CANCELLED, f"cannot finish {job.ref}: the job was cancelled")


def _bad(chunks: int) -> str:
    return "1 chunk was bad" if chunks == 1 else f"{chunks} chunks were bad"
