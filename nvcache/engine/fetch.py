"""Makes an entry ready: plan, reserve, hand files to the workers, check the weights, publish. It neither resolves moving names nor decides who waits.

Order on the disk: the plan before the first byte; blobs; views, trees, refs; the manifest last; then the plan goes. A fill that stops anywhere is
resumed from its plan, on the revision it names.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import Check, File, LeftOut, Manifest, Selection
from nvcache.core.names import check_names
from nvcache.core.plan import FillPlan, RemoteFile
from nvcache.core.ref import Ref, Scheme
from nvcache.core.selection import chooses, is_safetensors
from nvcache.core.shards import is_index
from nvcache.core.states import JobState
from nvcache.engine import clock
from nvcache.engine.blocking import unbroken
from nvcache.engine.context import Context
from nvcache.engine.jobs import Job, Tally
from nvcache.engine.ledger import Promise
from nvcache.engine.messages import AdoptTask, FetchTask, WeightsTask
from nvcache.engine.shelf import Entry, hub_id
from nvcache.errors import Code, DiskError, IntegrityError, NvcacheError, RequestError
from nvcache.sources.base import Resolved, remote_to_dict
from nvcache.store.catalog import EntryState
from nvcache.store.ingest import ingest_key
from nvcache.store.receipts import drop_receipt, read_receipt

log = logging.getLogger(__name__)
MAX_FILES = 100_000
LARGE = 64 * 2**20  # bytes from which a file is worth several lanes
TRIES = 3  # of one file, where another try may help at once; waiting out a slow source is the reader's matter
TRY_AGAIN = frozenset({Code.DIGEST_MISMATCH, Code.SOURCE_CHANGED, Code.BAD_TOKEN})


@dataclass(frozen=True, slots=True)
class Here:
    """What of a plan is already on the node, and what is missing (ingest key → file)."""

    files: dict[str, File]  # path → finished file
    adopt: dict[str, list[RemoteFile]]  # SHA-256 of a blob that is here, but in no manifest that vouches for it → its files
    missing: dict[str, RemoteFile]
    keys: frozenset[str]  # of all files of the plan

    @property
    def needs(self) -> dict[str, int]:
        """Ingest key → bytes to reserve."""
        return {key: file.size for key, file in self.missing.items()}

    @property
    def blobs(self) -> set[str]:
        """The SHA-256 of what is here and counted on."""
        return {file.sha256 for file in self.files.values()} | self.adopt.keys()


def make_plan(
    resolved: Resolved,
    listing: Iterable[RemoteFile],
    *,
    asked: str,
    selection: Selection,
    also: Iterable[str] = (),
) -> FillPlan:
    """Choose the files of a listing and refuse what is unsafe, before a byte is fetched. `also` are paths an earlier fill of the entry has.

    Raises `IntegrityError` (hostile-name, listing-conflict), `RequestError` (bad-request: nothing is left to fetch).
    """
    files = list(dict.fromkeys(listing))
    if len(files) > MAX_FILES:
        raise IntegrityError(Code.LISTING_CONFLICT, f"cannot plan {resolved.ref}: it lists more than {MAX_FILES} files")
    wanted = chooses(selection, (file.path for file in files)) | set(also)
    chosen = [file for file in files if file.path in wanted]
    if not chosen:
        raise RequestError(
            Code.BAD_REQUEST,
            f"cannot plan {resolved.ref}: of its {len(files)} files none is selected",
            hint="change --include/--exclude; `nvcache warm REF --dry-run` lists the files",
        )
    check_names(file.path for file in chosen)
    for file in chosen:
        if file.size < 0:
            raise IntegrityError(Code.LISTING_CONFLICT, f"cannot plan {resolved.ref}: {file.path!r} has size {file.size}")
    return FillPlan(
        ref=resolved.ref,
        asked=asked,
        endpoint=resolved.endpoint,
        files=tuple(chosen),
        selection=selection,
        left_out=tuple(LeftOut(file.path, file.size) for file in files if file.path not in wanted),
        names=(resolved.name,) if resolved.name else (),
    )


@dataclass(frozen=True, slots=True)
class _Fill:
    """One fill under way; `large` is how many files share the lanes, `done` collects the finished files by path."""

    job: Job
    plan: FillPlan
    promise: Promise
    large: int
    done: dict[str, File]
    stored: Mapping[str, File]  # what the entry had before, by path

    def expected(self, file: RemoteFile) -> str | None:
        """The SHA-256 the file must have: as published, else as it was when the same bytes were stored before."""
        before = self.stored.get(file.path)
        return file.sha256 or (before.sha256 if before else None)


class Fetcher:
    """Carries out fill plans."""

    def __init__(self, context: Context) -> None:
        self._do = context
        self._made: set[str] = set()  # ingest keys whose blobs were proven in this daemon's life

    async def here(self, plan: FillPlan) -> Here:
        """Look each file of the plan up: by published digest, by an earlier try's receipt, by blob."""
        return await self._do.disk.call(self._here, plan)

    def _here(self, plan: FillPlan) -> Here:
        found = Here({}, {}, {}, frozenset(ingest_key(file.token, file.size) for file in plan.files))
        for file in plan.files:
            done = self._finished(plan.ref, file)
            if done is not None:
                found.files[file.path] = done
            elif (sha256 := self._lying_here(file)) is not None:
                found.adopt.setdefault(sha256, []).append(file)
            else:
                found.missing.setdefault(ingest_key(file.token, file.size), file)
        return found

    def _finished(self, ref: Ref, file: RemoteFile) -> File | None:
        """The file, where an entry or a fill of this daemon's life vouches for its blob."""
        known = self._do.shelf.known(file)
        if known is not None and known.size == file.size and self._do.blobs.has(known.sha256, known.size):
            return _file(ref, file, known.sha256, known.chunks)
        key = ingest_key(file.token, file.size)
        done = read_receipt(self._do.layout, key) if key in self._made else None
        if done is not None and file.sha256 in (None, done.sha256) and self._do.blobs.has(done.sha256, file.size):
            return _file(ref, file, done.sha256, done.chunks)
        return None

    def _lying_here(self, file: RemoteFile) -> str | None:
        """The SHA-256 of a blob that should be the file's, but has to be read first: nobody has vouched for it since the daemon started."""
        sha256 = file.sha256
        if sha256 is None and (done := read_receipt(self._do.layout, ingest_key(file.token, file.size))) is not None:
            sha256 = done.sha256
        return sha256 if sha256 is not None and self._do.blobs.has(sha256, file.size) else None

    async def fill(self, job: Job, plan: FillPlan) -> Entry:
        """Carry out `plan`; the caller holds the entry's lock. On success the plan is gone and the entry ready.

        On failure the plan stays where a later try may help, and everything is given back where the disk ran full.
        """
        job.move(JobState.FETCHING)
        job.tally = Tally()  # a repair counted what it verified before
        job.tally.expect(len(plan.files), plan.size)
        try:
            here, promise = await self._admit(plan)
            with promise:
                await self._do.disk.call(self._do.catalog.write_plan, plan)
                files = await self._gather(job, plan, here, promise)
                job.move(JobState.VERIFYING)
                warnings = await self._check_weights(plan, files)
                entry = await unbroken(self._commit(plan, files, warnings, job))
        except asyncio.CancelledError:
            if job.cancelling:  # a daemon that stops keeps its plans
                await unbroken(self._do.disk.call(self._do.catalog.remove_plan, plan.id))
            raise
        except NvcacheError as error:
            if error.code is Code.DISK_FULL:
                await self.give_back(plan)
            elif not error.retryable:
                await self._do.disk.call(self._do.catalog.remove_plan, plan.id)  # what was fetched stays until the room is needed
            with suppress(DiskError):  # the first error is the one to tell
                await self._do.ledger.measure()
            raise
        await self._do.ledger.measure()
        return entry

    async def _admit(self, plan: FillPlan) -> tuple[Here, Promise]:
        """Reserve what is missing. What was found must still be there once it is promised: a removal may have been quicker."""
        while True:
            here = await self.here(plan)
            promise = await self._do.ledger.admit(str(plan.ref), here.needs, here.keys, here.blobs)
            again = await self.here(plan)
            if again.needs.keys() <= here.needs.keys():
                return again, promise
            self._do.ledger.promises.discard(promise)

    async def _commit(self, plan: FillPlan, files: Mapping[str, File], warnings: tuple[str, ...], job: Job) -> Entry:
        """Publish and remember, as one step, alone among those that show the same Hub name."""
        old = self._do.shelf.entries.get(plan.id)
        kept = old.state if old else EntryState()
        names = tuple(name for name in plan.names if not self._do.shelf.newer(plan.id.slug, name, plan.resolved_at, plan.id))
        state = replace(
            kept,
            pin=kept.pin or plan.pin,
            alias=plan.alias or kept.alias,
            names=tuple(dict.fromkeys((*kept.names, *names))),
            resolved_at=max(kept.resolved_at, plan.resolved_at),
            fill_bytes=job.tally.fetched,
            fill_seconds=clock.monotonic() - job.began,
        )
        hub_name = hub_id(plan.ref, state.alias)
        async with self._do.key_locks(("hub", hub_name)):
            if hub_name is not None and self._do.shelf.alias_taken(hub_name, plan.id.slug):
                raise RequestError(Code.ALIAS_CONFLICT, f"cannot show {plan.ref} as {hub_name}: another source's model has that name")
            manifest = self._manifest(plan, files, warnings, old)
            if old is not None:
                old.changing = True
            try:
                await self._do.disk.call(self._publish, plan, manifest, state, old)
            finally:
                if old is not None:
                    old.changing = False
            entry = Entry(manifest, state, last_used=old.last_used if old else None)
            self._do.shelf.put(entry)
            for name in state.names:
                self._do.shelf.resolved(entry.id.slug, name, entry.id)
        self._do.changed(entry.id)
        return entry

    async def give_back(self, plan: FillPlan) -> None:
        """Drop a plan that nobody carries out, and what was fetched for it alone."""
        keys = {ingest_key(file.token, file.size) for file in plan.files}
        await self._do.ledger.free(keys, (), lambda: self._do.catalog.remove_plan(plan.id))

    async def _gather(self, job: Job, plan: FillPlan, here: Here, promise: Promise) -> dict[str, File]:
        """Every file of the plan, fetched or found. Small files first, so that a broken index is seen before the shards are fetched."""
        for path, reused in here.files.items():
            job.tally.finished(path, reused.size, 0)
            self._do.counters.reused_bytes += reused.size
        done = dict(here.files)
        adopted = {file.path for files in here.adopt.values() for file in files}
        copies = _by_key(file for file in plan.files if file.path not in here.files and file.path not in adopted)
        weights = {key: file for key, file in here.missing.items() if is_safetensors(file.path)}
        others = {key: file for key, file in here.missing.items() if key not in weights}
        old = self._do.shelf.entries.get(plan.id)
        fill = _Fill(job, plan, promise, sum(file.size >= LARGE for file in here.missing.values()), done, old.manifest.by_path if old else {})
        try:
            async with asyncio.TaskGroup() as group:
                for sha256, lying in here.adopt.items():
                    group.create_task(self._adopt(fill, sha256, lying))
                for key in others:
                    group.create_task(self._make(fill, key, copies[key]))
            await self._check_weights(plan, done)
            async with asyncio.TaskGroup() as group:
                for key in weights:
                    group.create_task(self._make(fill, key, copies[key]))
        except BaseExceptionGroup as group_error:
            raise first_of(group_error) from group_error
        return done

    async def _adopt(self, fill: _Fill, sha256: str, files: list[RemoteFile]) -> None:
        """Take a blob that is here but vouched for by nobody; when its bytes went bad it goes to quarantine and is fetched."""
        first = files[0]
        try:
            result = await self._do.workers.run(
                AdoptTask(sha256, first.size),
                priority=fill.plan.priority,
                progress=lambda stored, _: fill.job.tally.running(sha256, stored, 0),
            )
        except IntegrityError as error:
            self._do.counters.verify_failures += 1
            await self._do.disk.call(self._do.blobs.quarantine, sha256, f"{clock.stamp()} {fill.plan.id}: {error}")
            fill.job.tally.dropped(sha256)
            for key, copies in _by_key(files).items():
                with await self._do.ledger.admit(str(fill.plan.ref), {key: first.size}, {key}):
                    await self._make(fill, key, copies)
            return
        chunks = base64.b64decode(result["chunks"])
        for file in files:
            fill.done[file.path] = _file(fill.plan.ref, file, sha256, chunks)
            self._made.add(ingest_key(file.token, file.size))
        fill.job.tally.finished(sha256, first.size, 0, len(files))
        self._do.counters.reused_bytes += first.size

    async def _make(self, fill: _Fill, key: str, copies: list[RemoteFile]) -> None:
        """Fetch one blob and note it for every path that has this content. Another fill of the same content is waited for and shared."""
        first = copies[0]
        async with self._do.key_locks(key):
            found = await self._do.disk.call(self._finished, fill.plan.ref, first)
            if found is not None:
                sha256, chunks, fetched = found.sha256, found.chunks, 0
                self._do.counters.reused_bytes += first.size
            else:
                sha256, chunks, fetched = await self._fetch(fill, key, first)
            fill.promise.settle(key, sha256)
        for file in copies:
            if file.sha256 not in (None, sha256):  # a directory may list one file under two names with two digests
                raise _mismatch(file, sha256)
            fill.done[file.path] = _file(fill.plan.ref, file, sha256, chunks)
        fill.job.tally.finished(key, first.size, fetched, len(copies))
        fill.job.changed(fill.job)

    async def _fetch(self, fill: _Fill, key: str, file: RemoteFile) -> tuple[str, bytes, int]:
        def progress(stored: int, fetched: int) -> None:
            fill.job.tally.running(key, stored, fetched)
            fill.job.changed(fill.job)

        for attempt in range(1, TRIES + 1):
            try:
                task = await self._task(fill, key, file)
                result = await self._do.workers.run(task, priority=fill.plan.priority, progress=progress)
            except NvcacheError as error:
                self._do.counters.fetched_bytes += fill.job.tally.dropped(key)
                if error.code is Code.DIGEST_MISMATCH:
                    self._do.counters.verify_failures += 1
                last = 2 if isinstance(error, IntegrityError) else TRIES
                if error.code not in TRY_AGAIN or attempt >= last:
                    raise
                self._do.counters.retries += 1
                log.warning("trying %s again: %s", file.path, error, extra={"facts": {"code": error.code}})
            else:
                self._do.counters.fetched_bytes += result["fetched"]
                self._made.add(key)
                return result["sha256"], base64.b64decode(result["chunks"]), result["fetched"]
        raise AssertionError("unreachable")

    async def _task(self, fill: _Fill, key: str, file: RemoteFile) -> FetchTask:
        plan = fill.plan
        resolved = Resolved(plan.ref, next(iter(plan.names), None), plan.endpoint)
        remote = await self._do.net.call(self._do.sources[plan.ref.scheme].locate, resolved, file)
        return FetchTask(
            key=key,
            size=file.size,
            name=file.path,
            lanes=self._do.workers.lanes_for(fill.large) if file.size >= LARGE else 1,
            remote=remote_to_dict(remote),
            sha256=fill.expected(file),
            git_sha1=file.digest.hex if file.digest and file.digest.algorithm is Algorithm.GIT_SHA1 else None,
        )

    async def _check_weights(self, plan: FillPlan, done: Mapping[str, File]) -> tuple[str, ...]:
        """Have the safetensors headers and indexes among `done` judged; a file that is not here yet only counts as being listed."""
        judged = {file.path: ("", file.size) for file in plan.files} | {file.path: ("", file.size) for file in plan.left_out}
        judged |= {path: (str(self._do.layout.blob(file.sha256)), file.size) for path, file in done.items()}
        if not any(blob and (is_safetensors(path) or is_index(path)) for path, (blob, _) in judged.items()):
            return ()
        return tuple((await self._do.workers.run(WeightsTask(judged), priority=plan.priority))["warnings"])

    def _manifest(self, plan: FillPlan, files: Mapping[str, File], warnings: tuple[str, ...], old: Entry | None) -> Manifest:
        return Manifest(
            ref=plan.ref,
            asked=plan.asked,
            endpoint=plan.endpoint,
            files=tuple(_as_before(files[file.path], old) for file in plan.files),
            verified_at=clock.stamp(),
            version=self._do.version,
            selection=plan.selection,
            left_out=plan.left_out,
            warnings=warnings,
            parsed=any(is_safetensors(path) for path in files),
        )

    def _publish(self, plan: FillPlan, manifest: Manifest, state: EntryState, old: Entry | None) -> None:
        """Views, state, manifest, in that order; then the plan and its receipts go. Blocks."""
        name = hub_id(plan.ref, state.alias)
        self._do.views.publish(manifest, hub_id=name, names=state.names)
        if old is not None and old.hub_id not in (None, name):
            self._do.views.withdraw_hub(old.manifest, hub_id=old.hub_id)
        self._do.catalog.write_state(plan.id, state)
        self._do.catalog.write_manifest(manifest)
        self._do.catalog.remove_plan(plan.id)
        for file in plan.files:
            drop_receipt(self._do.layout, ingest_key(file.token, file.size))


def _by_key(files: Iterable[RemoteFile]) -> dict[str, list[RemoteFile]]:
    found: dict[str, list[RemoteFile]] = {}
    for file in files:
        found.setdefault(ingest_key(file.token, file.size), []).append(file)
    return found


def _mismatch(file: RemoteFile, actual: str) -> IntegrityError:
    facts: dict[str, object] = {"file": file.path, "expected": file.sha256, "actual": actual}
    why = f"its sha256 is {actual}, the source published {file.sha256}"
    return IntegrityError(Code.DIGEST_MISMATCH, f"cannot accept {file.path}: {why}", facts=facts)


def _file(ref: Ref, file: RemoteFile, sha256: str, chunks: bytes) -> File:
    return File(file.path, file.size, sha256, _check(ref.scheme, file.digest), file.digest, chunks)


def _as_before(file: File, old: Entry | None) -> File:
    """A file the entry already had keeps what it was once checked against; a repair knows more than its source publishes."""
    before = old.manifest.by_path.get(file.path) if old else None
    return before if before is not None and before.sha256 == file.sha256 else file


def _check(scheme: Scheme, digest: Digest | None) -> Check:
    if digest is None:
        return Check.FIRST_USE
    match digest.algorithm:
        case Algorithm.GIT_SHA1:
            return Check.GIT_SHA1
        case Algorithm.MD5:
            return Check.CONTENT_MD5
        case Algorithm.SHA256:
            return Check.LFS_SHA256 if scheme is Scheme.HF else Check.MANIFEST_SHA256


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that made the others stop: a TaskGroup cancels its siblings, so the first leaf is the cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
