"""Jobs: long work that is tracked, joined by every caller that wants the same, and remembered for an hour. It does none of the work itself."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from nvcache.core.plan import FillPlan
from nvcache.core.ref import EntryId, Ref
from nvcache.core.states import JOB_MOVES, JobState
from nvcache.engine import clock
from nvcache.engine.status import ErrorInfo, JobStatus, Progress
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
    entry: EntryId | None = None
    state: JobState = JobState.QUEUED
    ended_at: datetime | None = None
    seconds: float = 0.0
    error: NvcacheError | None = None
    note: str | None = None
    repaired_chunks: int = 0
    bad_files: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)
    task: asyncio.Task[None] | None = None
    plan: FillPlan | None = None  # of a fill, once there is one
    cancelling: bool = False  # somebody asked for it; a daemon that stops does not
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
        self.changed(self)

    def fail(self, error: NvcacheError) -> None:
        """End with an error."""
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
        )


class Jobs:
    """The registry: single flight by key, one owner for every task."""

    def __init__(self, changed: Callable[[Job], None]) -> None:
        self._changed = changed
        self._jobs: dict[str, Job] = {}
        self._flights: dict[object, Job] = {}
        self._by_entry: dict[EntryId, list[Job]] = {}
        self._numbers = itertools.count(1)

    def start(self, key: object, kind: str, ref: Ref, work: Callable[[Job], Coroutine[Any, Any, None]]) -> tuple[Job, bool]:
        """The running job for `key`, else a new one doing `work`. The flag tells whether it is new."""
        running = self._flights.get(key)
        if running is not None:
            return running, False
        self._forget_old()
        job = Job(f"{next(self._numbers)}-{secrets.token_hex(4)}", kind, ref, self._changed, clock.now(), clock.monotonic())
        self._jobs[job.id] = self._flights[key] = job
        job.task = asyncio.create_task(self._own(job, work), name=f"job-{job.id}")
        job.task.add_done_callback(lambda _: self._ended(key, job))
        return job, True

    def _ended(self, key: object, job: Job) -> None:
        """The task is over, also one that was cancelled before its first step."""
        if self._flights.get(key) is job:
            del self._flights[key]
        if not job.state.ended:
            job.fail(_cancelled(job))

    async def _own(self, job: Job, work: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
        """Run `work` to a final state, whatever happens."""
        try:
            await work(job)
        except NvcacheError as error:
            job.fail(error)
        except asyncio.CancelledError:
            job.fail(_cancelled(job))
        except Exception as error:  # a defect: its trace goes to the log, its name to whoever waits
            log.exception("job %s failed unexpectedly", job.id)
            job.fail(NvcacheError(Code.INTERNAL, f"cannot finish {job.ref}: {type(error).__name__}"))

    def get(self, job_id: str) -> Job:
        """The job of that id. Raises `RequestError` (unknown-job)."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise RequestError(Code.UNKNOWN_JOB, f"cannot find job {job_id[:80]!r}: it never was, or ended more than an hour ago") from None

    def bind(self, job: Job, entry: EntryId) -> None:
        """The job turned out to be about `entry`."""
        if job.entry != entry:
            job.entry = entry
            self._by_entry.setdefault(entry, []).append(job)

    def of(self, entry: EntryId) -> list[Job]:
        """The jobs about an entry, oldest first."""
        return self._by_entry.get(entry, [])

    def forget(self, entry: EntryId) -> None:
        """Drop the ended jobs about `entry` from memory."""
        for job in [job for job in self._by_entry.get(entry, []) if job.state.ended]:
            self._drop(job)

    def _drop(self, job: Job) -> None:
        del self._jobs[job.id]
        if job.entry is not None:
            self._by_entry[job.entry].remove(job)
            if not self._by_entry[job.entry]:
                del self._by_entry[job.entry]

    def entries(self) -> list[EntryId]:
        """Every entry some remembered job is about."""
        return list(self._by_entry)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    async def cancel(self, job: Job) -> None:
        """Cancel and wait until it has ended; harmless when it already has."""
        if job.task is not None and not job.state.ended:
            job.cancelling = True
            job.task.cancel()
            await asyncio.wait({job.task})

    async def stop(self) -> None:
        """Cancel every job and wait for their ends."""
        tasks = {job.task for job in self._jobs.values() if job.task is not None and not job.task.done()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _forget_old(self) -> None:
        horizon = clock.now() - KEEP
        ended = [job for job in self._jobs.values() if job.ended_at is not None]
        excess = len(self._jobs) - KEEP_COUNT
        for job in ended:
            if (job.ended_at is not None and job.ended_at < horizon) or excess > 0:
                self._drop(job)
                excess -= 1


def _cancelled(job: Job) -> Interrupted:
    return Interrupted(Code.CANCELLED, f"cannot finish {job.ref}: the job was cancelled")
