"""Brings the files of a plan: proves what lies here, fetches what is missing, shares what another fill fetches. It neither reserves nor publishes."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from nvcache.core.digest import Algorithm
from nvcache.core.manifest import CHUNK, File
from nvcache.core.plan import FillPlan, Priority, RemoteFile
from nvcache.core.ref import Scheme, parse_ref
from nvcache.core.selection import is_safetensors
from nvcache.core.shards import is_index
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.here import Finder, Here, as_file
from nvcache.engine.jobs import Job
from nvcache.engine.ledger import Promise
from nvcache.engine.messages import AdoptTask, FetchTask, WeightsTask
from nvcache.engine.process import ProgressCallback
from nvcache.engine.trace import SHORT, Fetching
from nvcache.errors import SPENT, Code, DiskError, IntegrityError, NvcacheError, SourceError
from nvcache.sources.base import Resolved, remote_to_dict
from nvcache.store.ingest import ingest_key

log = logging.getLogger(__name__)
LARGE = 64 * 2**20  # bytes from which a file is worth several lanes
TRIES = 3  # of one file, where another try may help at once; waiting out a slow source is the reader's matter
MIRROR = "mirror"  # among the schemes of sources, in counts
TRY_AGAIN = frozenset({Code.DIGEST_MISMATCH, Code.SOURCE_CHANGED, Code.BAD_TOKEN})


@dataclass(frozen=True, slots=True)
class _Fill:
    """One fill under way; `large` is how many files share the lanes, `done` collects the finished files by path."""

    job: Job
    plan: FillPlan
    promise: Promise
    large: int
    done: dict[str, File]
    stored: Mapping[str, File]  # what the entry had before, by path
    down: SourceError | None  # why the source need not be asked
    fetching: Fetching

    def expected(self, file: RemoteFile) -> str | None:
        """The SHA-256 the file must have: as published, else as it was when the same bytes were stored before."""
        before = self.stored.get(file.path)
        return file.sha256 or (before.sha256 if before else None)


class Gatherer:
    """Fetches for all fills of one session."""

    def __init__(self, context: Context, finder: Finder) -> None:
        self._do = context
        self._finder = finder
        self._wanting_jobs: dict[str, list[Job]] = {}  # ingest key → who wants the blob made

    async def gather(self, job: Job, plan: FillPlan, here: Here, promise: Promise, down: SourceError | None, fetching: Fetching) -> dict[str, File]:
        """Every file of the plan, fetched or found. Small files first, so that a broken index is seen before the shards are fetched."""
        for path, reused in here.files.items():
            job.tally.finished(path, reused.size, 0)
            self._do.counters.reused_bytes += reused.size
            fetching.reused(reused.size)
        done = dict(here.files)
        adopted = {file.path for files in here.adopt.values() for file in files}
        copies = _by_key(file for file in plan.files if file.path not in here.files and file.path not in adopted)
        weights = {key: file for key, file in here.missing.items() if is_safetensors(file.path)}
        others = {key: file for key, file in here.missing.items() if key not in weights}
        old = self._do.shelf.entries.get(plan.id)
        large = sum(file.size >= LARGE for file in here.missing.values())
        fill = _Fill(job, plan, promise, large, done, old.manifest.by_path if old else {}, down, fetching)
        try:
            async with asyncio.TaskGroup() as group:
                for sha256, lying in here.adopt.items():
                    group.create_task(self._adopt(fill, sha256, lying))
                for key in others:
                    group.create_task(self._make(fill, key, copies[key]))
            await self.check_weights(job, plan, done)
            async with asyncio.TaskGroup() as group:
                for key in weights:
                    group.create_task(self._make(fill, key, copies[key]))
        except BaseExceptionGroup as group_error:
            raise first_of(group_error) from group_error
        return done

    async def _adopt(self, fill: _Fill, sha256: str, files: list[RemoteFile]) -> None:
        """Take a blob that is here but vouched for by nobody; when its bytes went bad or cannot be read it goes to quarantine and is fetched."""
        first = files[0]
        try:
            with fill.fetching.file(None, first.path) as watch:
                result = await self._do.workers.run(
                    AdoptTask(sha256, first.size),
                    priority=lambda: fill.job.priority,
                    progress=lambda stored, _: fill.job.tally.running(sha256, stored, 0),
                    watch=watch,
                )
                watch.came(first.size, whole=True)
        except (IntegrityError, DiskError) as error:
            if isinstance(error, DiskError) and (error.code is not Code.DISK_IO or error.facts.get("errno") in SPENT):
                raise  # that says nothing about the blob
            self._do.counters.verify_failures += 1
            await self._do.disk.call(self._do.blobs.quarantine, sha256, f"{clock.stamp()} {fill.plan.id}: {error}")
            fill.job.tally.dropped(sha256)
            for key, copies in _by_key(files).items():
                with await self._do.ledger.admit(str(fill.plan.ref), {key: first.size}, {key}):
                    await self._make(fill, key, copies)
            return
        chunks = base64.b64decode(result["chunks"])
        for file in files:
            fill.done[file.path] = as_file(fill.plan.ref, file, sha256, chunks)
            self._finder.vouch(ingest_key(file.token, file.size))
        fill.job.tally.finished(sha256, first.size, 0, len(files))
        self._do.counters.reused_bytes += first.size

    async def _make(self, fill: _Fill, key: str, copies: list[RemoteFile]) -> None:
        """Fetch one blob and note it for every path that has this content. Another fill of the same content is waited for and shared."""
        first = copies[0]
        with self._wanting(key, fill.job):
            sha256, chunks, fetched = await self._blob(fill, key, first)
        for file in copies:
            if file.sha256 not in (None, sha256):  # a directory may list one file under two names with two digests
                raise _mismatch(file, sha256)
            fill.done[file.path] = as_file(fill.plan.ref, file, sha256, chunks)
        fill.job.tally.finished(key, first.size, fetched, len(copies))
        fill.job.changed(fill.job)

    @contextmanager
    def _wanting(self, key: str, job: Job) -> Iterator[None]:
        """Note that `job` wants the blob: it may be the one that makes it, or wait for a less urgent one that does."""
        wanting = self._wanting_jobs.setdefault(key, [])
        if any(job.priority < other.priority for other in wanting):
            self._do.workers.reconsider()
        wanting.append(job)
        try:
            yield
        finally:
            wanting.remove(job)
            if not wanting:
                del self._wanting_jobs[key]

    def _urgency(self, key: str) -> Priority:
        """That of the most urgent job that wants the blob, as of now."""
        return min(job.priority for job in self._wanting_jobs[key])

    async def _blob(self, fill: _Fill, key: str, file: RemoteFile) -> tuple[str, bytes, int]:
        """The blob's SHA-256, its chunk digests and what it cost in bytes fetched, once it is here."""
        with fill.fetching.blocked() if self._do.key_locks.held(key) else nullcontext():
            await self._do.key_locks.acquire(key)
        try:
            found = await self._do.disk.call(self._finder.finished, fill.plan.ref, file)
            if found is not None:
                self._do.counters.reused_bytes += file.size
                fill.fetching.reused(file.size)
                made = found.sha256, found.chunks, 0
            else:
                made = await self._fetch(fill, key, file)
            fill.promise.settle(key, made[0])
        finally:
            self._do.key_locks.release(key)
        return made

    async def _fetch(self, fill: _Fill, key: str, file: RemoteFile) -> tuple[str, bytes, int]:
        """From a mirror if one has it, else from the source."""

        def progress(stored: int, fetched: int) -> None:
            fill.job.tally.running(key, stored, fetched)
            fill.job.changed(fill.job)

        def urgency() -> Priority:
            return self._urgency(key)

        task = self._task(fill, key, file)
        dropped = partial(self._dropped, fill, key, MIRROR)
        loan = await self._do.rescue.borrow(task, fill.plan.ref, file, priority=urgency, progress=progress, dropped=dropped, fetching=fill.fetching)
        if loan.result is not None:
            return self._proven(key, loan.result, MIRROR)
        if fill.down is not None:
            raise fill.down
        result = await self._from_source(fill, key, file, task, progress)
        self._do.rescue.settle(result, loan.lenders)
        return self._proven(key, result, task.source)

    def _dropped(self, fill: _Fill, key: str, source: str) -> int:
        """A try of a file failed: count what it fetched, which is the answer."""
        fetched = fill.job.tally.dropped(key)
        self._do.counters.came(source, fetched)
        return fetched

    async def _from_source(self, fill: _Fill, key: str, file: RemoteFile, task: FetchTask, progress: ProgressCallback) -> dict[str, Any]:
        """The worker's result. Tried again where another try may help at once."""

        async def locate() -> dict[str, Any]:
            resolved = Resolved(fill.plan.ref, next(iter(fill.plan.names), None), fill.plan.endpoint)
            return remote_to_dict(await self._do.net.call(self._do.sources[fill.plan.ref.scheme].locate, resolved, file))

        attempt, origin = 0, fill.plan.endpoint
        while True:
            attempt += 1
            try:
                with fill.fetching.file(origin, file.path) as watch:
                    result = await self._do.workers.run(task, priority=lambda: self._urgency(key), locate=locate, progress=progress, watch=watch)
                    watch.came(result["fetched"], whole=True)
                    return result
            except NvcacheError as error:
                fetched = self._dropped(fill, key, task.source)
                fill.fetching.came(origin, fetched)
                if isinstance(error, SourceError):
                    self._do.counters.source_failed(task.source, str(error.code))
                if error.code is Code.BAD_TOKEN and fetched >= task.lanes * CHUNK:  # so much that a chunk of it was kept
                    attempt = 0  # the token was good and ran out; a large file outlives several
                if error.code is Code.DIGEST_MISMATCH:
                    self._do.counters.verify_failures += 1
                last = 2 if isinstance(error, IntegrityError) else TRIES
                moved = error.code is Code.SOURCE_CHANGED and fill.plan.ref.scheme is not Scheme.HF  # its listing is another one now
                if moved and parse_ref(fill.plan.asked).pinned:
                    error.retryable = False  # what was named exactly does not come back
                if error.code not in TRY_AGAIN or attempt >= last or moved:
                    raise
                self._do.counters.retries += 1
                fill.fetching.trouble(origin, str(error.code), 0.0, str(error))
                log.warning("trying %s again: %s", file.path, error, extra={"facts": {"code": error.code}})

    def _proven(self, key: str, result: Mapping[str, Any], source: str) -> tuple[str, bytes, int]:
        """A worker made the blob: count it."""
        self._do.counters.came(source, result["fetched"])
        self._finder.vouch(key)
        return result["sha256"], base64.b64decode(result["chunks"]), result["fetched"]

    def _task(self, fill: _Fill, key: str, file: RemoteFile) -> FetchTask:
        return FetchTask(
            key=key,
            size=file.size,
            name=file.path,
            lanes=self._do.workers.lanes_for(fill.large) if file.size >= LARGE else 1,
            source=str(fill.plan.ref.scheme),
            sha256=fill.expected(file),
            also=str(file.digest) if file.digest and file.digest.algorithm is not Algorithm.SHA256 else None,
        )

    async def check_weights(self, job: Job, plan: FillPlan, done: Mapping[str, File]) -> tuple[str, ...]:
        """Have the safetensors headers and indexes among `done` judged; a file that is not here yet only counts as being listed."""
        judged = {file.path: ("", file.size) for file in plan.files} | {file.path: ("", file.size) for file in plan.left_out}
        judged |= {path: (str(self._do.layout.blob(file.sha256)), file.size) for path, file in done.items()}
        if not any(blob and (is_safetensors(path) or is_index(path)) for path, (blob, _) in judged.items()):
            return ()
        with job.trace.phase(Kind.CHECKED, least=SHORT, what="safetensors headers and indexes"):
            return tuple((await self._do.workers.run(WeightsTask(judged), priority=lambda: job.priority))["warnings"])


def _by_key(files: Iterable[RemoteFile]) -> dict[str, list[RemoteFile]]:
    found: dict[str, list[RemoteFile]] = {}
    for file in files:
        found.setdefault(ingest_key(file.token, file.size), []).append(file)
    return found


def _mismatch(file: RemoteFile, actual: str) -> IntegrityError:
    facts: dict[str, object] = {"file": file.path, "expected": file.sha256, "actual": actual}
    why = f"its sha256 is {actual}, the source published {file.sha256}"
    return IntegrityError(Code.DIGEST_MISMATCH, f"cannot accept {file.path}: {why}", facts=facts)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that made the others stop: a TaskGroup cancels its siblings, so the first leaf is the cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
