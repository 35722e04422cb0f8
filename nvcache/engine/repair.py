"""Verifies an entry's blobs against their chunk digests and mends what went bad. It trusts nothing it has not read, and fetches only the bad chunks.

A bad blob is renamed into quarantine and its entries are withdrawn; the repair is then an ordinary fill whose ingest is seeded with the
chunks that are still right, from the entry's own pinned revision, proven by the SHA-256 of the whole file. A crash in between leaves a manifest
whose blob is in quarantine: the next start takes the repair up again.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import DIGEST_BYTES, File
from nvcache.core.plan import FillPlan, RemoteFile
from nvcache.core.ref import EntryId
from nvcache.core.space import human
from nvcache.core.states import JobState
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.blocking import unbroken
from nvcache.engine.context import Context
from nvcache.engine.fetch import Fetcher, first_of
from nvcache.engine.jobs import Job
from nvcache.engine.ledger import Promise
from nvcache.engine.messages import CheckTask, SeedTask
from nvcache.engine.shelf import Entry
from nvcache.errors import Code, IntegrityError, SourceError, SpaceError
from nvcache.sources.base import Resolved
from nvcache.store.catalog import EntryState
from nvcache.store.condemn import condemn
from nvcache.store.ingest import ingest_key, ingest_keys

log = logging.getLogger(__name__)


class Repairer:
    """Checks and mends entries. The caller holds the entry's lock."""

    def __init__(self, context: Context, fetcher: Fetcher) -> None:
        self._do = context
        self._fetcher = fetcher
        self._condemning = asyncio.Lock()
        self.wake: Callable[[EntryId], None] = lambda _: None  # told who waits for a blob that is here now; the mender's

    async def verify(self, job: Job, entry: Entry, first: str | None = None) -> None:
        """Read every blob of `entry`, `first` before all others, compare chunk by chunk, repair what is bad.

        What is bad is withdrawn as soon as it is known, while the rest is still read.
        """
        job.move(JobState.VERIFYING)
        bad = await self._read_all(job, entry, first)
        entry.suspect = False  # what is bad is known and out of the way: another try need not read again
        if bad:
            await self.mend(job, entry)
        else:
            await self.proven(job, entry)

    async def proven(self, job: Job, entry: Entry) -> None:
        """Every byte was read and is right: say so, and make sure that the views show the blobs."""
        await unbroken(self._show(entry, lambda state: replace(state, checked_at=clock.stamp(), scrubbed=0, scrub_began=0.0)))
        log.info("verified: every byte is right", extra={"facts": {"model": str(entry.id), "job": job.id}})

    async def recover(self, job: Job, entry: Entry) -> None:
        """Bring a withdrawn entry back: mend what is gone or went bad, or just show it again. One whose bytes went bad is read whole first."""
        job.move(JobState.VERIFYING)
        if entry.suspect:
            bad = await self._read_all(job, entry)
        else:
            gone = [f for f in entry.manifest.files if not await self._do.disk.call(self._do.blobs.has, f.sha256, f.size)]
            bad = {file.sha256: _chunks(file) for file in gone}
            if bad:
                await self._condemn(job, entry, bad, lacking=True)
        entry.suspect = False
        if bad:
            await self.mend(job, entry)
        else:
            await unbroken(self._show(entry))

    async def _show(self, entry: Entry, change: Callable[[EntryState], EntryState] = lambda state: state) -> None:
        """Publish a whole entry and remember what `change` makes of its state."""
        async with self._do.state_locks(entry.id):
            state = change(entry.state)
            await self._do.disk.call(self._publish, entry, state)
            entry.state, entry.broken, entry.suspect = state, None, False
        await self._do.kaito.settle()
        self._do.changed(entry.id)

    def _publish(self, entry: Entry, state: EntryState) -> None:
        """Blocks."""
        self._do.views.publish(entry.manifest, hub_id=entry.hub_id, names=entry.state.names)
        self._do.catalog.write_state(entry.id, state)
        self._do.catalog.keep_manifest(entry.manifest)

    async def _read_all(self, job: Job, entry: Entry, first: str | None = None) -> dict[str, list[int]]:
        """SHA-256 → bad chunks, of every blob that has some; they are condemned."""
        files = {file.sha256: file for file in entry.manifest.files}
        job.tally.expect(len(files), sum(file.size for file in files.values()))
        bad: dict[str, list[int]] = {}
        try:
            with job.trace.phase(Kind.READ, bytes=job.tally.bytes_total, count=len(files), what="from the disk, and compared"):
                if first in files:
                    await self._check(job, entry, files.pop(first), bad)
                async with asyncio.TaskGroup() as group:
                    for file in files.values():
                        group.create_task(self._check(job, entry, file, bad))
        except BaseExceptionGroup as error:
            raise first_of(error) from error
        return bad

    async def _check(self, job: Job, entry: Entry, file: File, bad: dict[str, list[int]]) -> None:
        if not await self._do.disk.call(self._do.blobs.has, file.sha256, file.size):
            bad[file.sha256] = _chunks(file)
            self._do.counters.verify_failures += 1
            await self._condemn(job, entry, {file.sha256: bad[file.sha256]}, lacking=True)
            return
        task = CheckTask(str(self._do.layout.blob(file.sha256)), file.size, base64.b64encode(file.chunks).decode(), entry.manifest.chunk_size)
        result = await self._do.workers.run(task, priority=lambda: job.priority, progress=lambda seen, _: job.tally.running(file.sha256, seen, 0))
        job.tally.finished(file.sha256, file.size, 0)
        job.read(result["cached"])
        job.changed(job)
        if result["bad"]:
            bad[file.sha256] = result["bad"]
            self._do.counters.verify_failures += 1
            await self._condemn(job, entry, {file.sha256: result["bad"]})

    async def _condemn(self, job: Job, entry: Entry, bad: dict[str, list[int]], *, lacking: bool = False) -> None:
        """Take bad blobs out of the store, then every entry that has one out of the views. `lacking`: they were not there, or not whole.

        From the first line on nothing of them is served by the daemon; that they are condemned is on the disk before the first is moved, so that a
        crash in between cannot bring one back.
        """
        paths, chunks = [file.path for file in entry.manifest.files if file.sha256 in bad], sum(map(len, bad.values()))
        job.bad_files = tuple(file.path for file in entry.manifest.files if file.path in {*job.bad_files, *paths})
        job.repaired_chunks += chunks
        why = f"{chunks} chunks are gone or went bad" if chunks != 1 else "1 chunk is gone or went bad"
        log.error("bytes on the disk went bad: %s", ", ".join(paths), extra={"facts": {"model": str(entry.id), "job": job.id}})
        told = f"{why}: {', '.join(paths)}"
        entry.suspect = True  # of the others just this is bad, and known
        for sharer in self._do.shelf.sharing(bad):
            if sharer is entry or sharer.broken is None:
                self._mark(sharer, why, told, len(bad))
        sizes = {sha256: entry.manifest.blobs[sha256] for sha256 in bad} if lacking else {}

        async def take_out() -> None:
            left: Collection[str] = bad
            async with self._condemning:  # there is one list
                await self._do.kaito.settle()
                try:
                    left = await self._do.disk.call(self._condemn_what_is_left, sorted(bad), sizes, f"{clock.stamp()} {entry.id}: {why}")
                finally:
                    for sharer in self._do.shelf.sharing(left):
                        if sharer.broken is None:  # it was made anew meanwhile, with one of them
                            self._mark(sharer, why, told, len(bad))
                    for sharer in self._do.shelf.sharing(bad):
                        await self._withdraw(sharer)

        await unbroken(take_out())

    def _mark(self, entry: Entry, why: str, told: str, count: int) -> None:
        """From now on it is not served."""
        entry.broken = IntegrityError(Code.DEGRADED, f"cannot serve {entry.id}: {why}")
        self._do.timeline.note(entry.id, Kind.WITHDRAWN, what=told, count=count, code=str(Code.DEGRADED))
        self._do.changed(entry.id)

    def _condemn_what_is_left(self, bad: Sequence[str], lacking: Mapping[str, int], note: str) -> list[str]:
        """Condemn what is bad; not what was `lacking` (with its size) and is there now: another repair made it anew. Blocks."""
        left = [sha256 for sha256 in bad if sha256 not in lacking or not self._do.blobs.has(sha256, lacking[sha256])]
        condemn(self._do.layout, self._do.blobs, left, note)
        return left

    async def _withdraw(self, entry: Entry) -> None:
        async with self._do.state_locks(entry.id):  # nobody shows it meanwhile
            if entry.broken is not None and self._do.shelf.entries.get(entry.id) is entry:
                await self._do.disk.call(self._do.views.withdraw, entry.manifest, hub_id=entry.hub_id)

    async def mend(self, job: Job, entry: Entry) -> None:
        """Fetch the bad chunks from the pinned revision and put every entry that waited for them back.

        Where the source does not list it any more, or not now, mirrors may have the same bytes.
        """
        down: SourceError | None = None
        try:
            plan = await self._plan(entry)
        except SourceError as error:
            if not self._do.rescue.may_help(entry.manifest.ref):
                raise
            plan, down = await self._plan_of(entry, {file.path: _remembered(file) for file in entry.manifest.files}), error
        with Promise(self._do.ledger, {}, ingest_keys(plan.files), ()):  # what is seeded is not for others to tidy away
            for file in entry.manifest.files:
                await self._seed(job, plan, entry, file, at_all_costs=down is not None)
        mended = await self._fetcher.fill(job, plan, down)
        self._do.counters.repaired_chunks += job.repaired_chunks
        self._do.counters.repairs += 1
        log.info("repaired: %s fetched", human(job.tally.fetched), extra={"facts": {"model": str(entry.id), "job": job.id}})
        for other in self._do.shelf.sharing(mended.manifest.blobs):
            await self._show_again(other)

    async def _show_again(self, entry: Entry) -> None:
        """Show an entry that waited for a blob, if that was all. One that is to be read first, or that somebody works on, is tried again at once."""
        if entry.broken is not None:
            self.wake(entry.id)
        if self._do.entry_locks.held(entry.id):
            return
        async with self._do.entry_locks(entry.id):
            waits = entry.broken is not None and not entry.suspect and self._do.shelf.entries.get(entry.id) is entry
            if waits and await self._do.disk.call(self._whole, entry):
                await unbroken(self._show(entry))

    async def _plan(self, entry: Entry) -> FillPlan:
        """A plan for exactly the entry's files; what is not here comes as the source lists it. Raises `SourceError` when it no longer has that."""
        manifest = entry.manifest
        listing = await self._do.ask(
            manifest.ref.scheme, self._listing, Resolved(manifest.ref, next(iter(entry.state.names), None), manifest.endpoint)
        )
        return await self._plan_of(entry, {file.path: file for file in listing})

    async def _plan_of(self, entry: Entry, listed: Mapping[str, RemoteFile]) -> FillPlan:
        manifest = entry.manifest
        here = await self._do.disk.call(lambda: {file.path for file in manifest.files if self._do.blobs.has(file.sha256, file.size)})
        lost = manifest.by_path.keys() - here - listed.keys()
        if lost:
            raise SourceError(
                Code.REVISION_NOT_FOUND, f"cannot repair {entry.id}: its source no longer has {min(lost)!r}", facts={"files": sorted(lost)}
            )
        files = (_kept(file, listed.get(file.path)) if file.path in here else _proven(listed[file.path], file) for file in manifest.files)
        return FillPlan(
            ref=manifest.ref,
            asked=manifest.asked,
            endpoint=manifest.endpoint,
            files=tuple(files),
            selection=manifest.selection,
            left_out=manifest.left_out,
            names=entry.state.names,
            resolved_at=entry.state.resolved_at,
        )

    def _listing(self, resolved: Resolved) -> tuple[RemoteFile, ...]:
        """The revision's files, or where it is gone those that are there now: a file is taken only with the SHA-256 that it had. Blocks."""
        source = self._do.sources[resolved.ref.scheme]
        try:
            return source.list(resolved)
        except SourceError as error:
            if error.code is not Code.SOURCE_CHANGED:
                raise
            return source.list(source.resolve(resolved.ref.at(None)))

    async def _seed(self, job: Job, plan: FillPlan, entry: Entry, file: File, *, at_all_costs: bool) -> None:
        """Start the ingest of a quarantined blob from its good chunks, unless some fill makes or made the blob meanwhile.

        Where there is no room for both the bad one goes, and all of it is fetched; not `at_all_costs`, when nobody may have the rest of it.
        """
        source = self._do.layout.quarantine / file.sha256
        remote = next(remote for remote in plan.files if remote.path == file.path)
        key = ingest_key(remote.token, remote.size)
        async with self._do.key_locks(key):
            if not await self._do.disk.call(source.exists) or await self._do.disk.call(self._do.blobs.has, file.sha256, file.size):
                return
            try:
                promise = await self._do.ledger.admit(f"the repair of {file.path}", {key: file.size}, {key})
            except SpaceError as error:
                if error.code is not Code.FULL or at_all_costs:
                    raise
                log.warning("a bad file makes room for the one that takes its place: %s", error, extra={"facts": {"model": str(entry.id)}})
                await self._do.disk.call(self._do.blobs.drop_from_quarantine, file.sha256)
                return
            with promise:
                task = SeedTask(key, str(source), file.size, base64.b64encode(file.chunks).decode(), entry.manifest.chunk_size)
                await self._do.workers.run(task, priority=lambda: job.priority)

    def _whole(self, entry: Entry) -> bool:
        return all(self._do.blobs.has(sha256, size) for sha256, size in entry.manifest.blobs.items())


def _chunks(file: File) -> list[int]:
    return list(range(len(file.chunks) // DIGEST_BYTES))


def _kept(stored: File, listed: RemoteFile | None) -> RemoteFile:
    """A file whose blob is here, whatever its source has under that name by now."""
    return RemoteFile(stored.path, stored.size, listed.token if listed else f"sha256:{stored.sha256}", Digest(Algorithm.SHA256, stored.sha256))


def _remembered(stored: File) -> RemoteFile:
    """The file as its source listed it, from memory."""
    token = stored.token or (stored.source.hex if stored.source else f"sha256:{stored.sha256}")
    return RemoteFile(stored.path, stored.size, token, stored.source or Digest(Algorithm.SHA256, stored.sha256))


def _proven(listed: RemoteFile, stored: File) -> RemoteFile:
    """The file as listed now, refused if it is not the one that was stored."""
    if listed.size != stored.size or (listed.digest and stored.source and listed.digest != stored.source):
        raise SourceError(Code.SOURCE_CHANGED, f"cannot repair {stored.path}: its source has other bytes under that name now", retryable=False)
    return listed
