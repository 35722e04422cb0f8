"""Verifies an entry's blobs against their chunk digests and mends what went bad. It trusts nothing it has not read, and fetches only the bad chunks.

A bad blob is renamed into quarantine and its entries are withdrawn; the repair is then an ordinary fill whose ingest is seeded with the
chunks that are still right, from the entry's own pinned revision, proven by the SHA-256 of the whole file. A crash in between leaves a manifest
whose blob is in quarantine: the next start takes the repair up again.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from dataclasses import replace

from nvcache.core.manifest import File
from nvcache.core.plan import FillPlan, Priority, RemoteFile
from nvcache.core.space import human
from nvcache.core.states import JobState
from nvcache.engine import clock
from nvcache.engine.blocking import unbroken
from nvcache.engine.context import Context
from nvcache.engine.fetch import Fetcher, first_of, make_plan
from nvcache.engine.jobs import Job
from nvcache.engine.messages import CheckTask, SeedTask
from nvcache.engine.shelf import Entry
from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources.base import Resolved
from nvcache.store.catalog import EntryState
from nvcache.store.condemn import condemn
from nvcache.store.ingest import ingest_key

log = logging.getLogger(__name__)


class Repairer:
    """Checks and mends entries. The caller holds the entry's lock."""

    def __init__(self, context: Context, fetcher: Fetcher) -> None:
        self._do = context
        self._fetcher = fetcher

    async def verify(self, job: Job, entry: Entry) -> None:
        """Read every blob of `entry`, compare chunk by chunk, repair what is bad; then make sure that the views show the blobs."""
        job.move(JobState.VERIFYING)
        bad = await self._read_all(job, entry)
        if bad:
            await self._condemn(job, entry, bad)
            await self.mend(job, entry)
            return
        state = replace(entry.state, checked_at=clock.stamp())
        await unbroken(self._show(entry, state))
        log.info("verified: every byte is right", extra={"facts": {"model": str(entry.id), "job": job.id}})

    async def recover(self, job: Job, entry: Entry) -> None:
        """Bring a withdrawn entry back: mend what is gone or went bad, or just show it again. One whose bytes went bad is read whole first."""
        job.move(JobState.VERIFYING)
        if entry.suspect:
            bad = await self._read_all(job, entry)
        else:
            gone = [f for f in entry.manifest.files if not await self._do.disk.call(self._do.blobs.has, f.sha256, f.size)]
            bad = {file.sha256: list(range(len(file.chunks) // 8)) for file in gone}
        if bad:
            await self._condemn(job, entry, bad)
            await self.mend(job, entry)
        else:
            await unbroken(self._show(entry, entry.state))

    async def _show(self, entry: Entry, state: EntryState) -> None:
        """Publish a whole entry and remember `state`."""

        def work() -> None:
            self._do.views.publish(entry.manifest, hub_id=entry.hub_id, names=entry.state.names)
            self._do.catalog.write_state(entry.id, state)

        await self._do.disk.call(work)
        entry.state, entry.broken, entry.suspect = state, None, False
        self._do.changed(entry.id)

    async def _read_all(self, job: Job, entry: Entry) -> dict[str, list[int]]:
        """SHA-256 → bad chunks, of every blob that has some."""
        files = {file.sha256: file for file in entry.manifest.files}
        job.tally.expect(len(files), sum(file.size for file in files.values()))
        bad: dict[str, list[int]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for file in files.values():
                    group.create_task(self._check(job, entry, file, bad))
        except BaseExceptionGroup as error:
            raise first_of(error) from error
        return bad

    async def _check(self, job: Job, entry: Entry, file: File, bad: dict[str, list[int]]) -> None:
        if not await self._do.disk.call(self._do.blobs.has, file.sha256, file.size):
            bad[file.sha256] = list(range(len(file.chunks) // 8))
            return
        task = CheckTask(str(self._do.layout.blob(file.sha256)), file.size, base64.b64encode(file.chunks).decode(), entry.manifest.chunk_size)
        result = await self._do.workers.run(task, priority=Priority.REPAIR, progress=lambda seen, _: job.tally.running(file.sha256, seen, 0))
        job.tally.finished(file.sha256, file.size, 0)
        job.changed(job)
        if result["bad"]:
            bad[file.sha256] = result["bad"]

    async def _condemn(self, job: Job, entry: Entry, bad: dict[str, list[int]]) -> None:
        """Take bad blobs out of the store, then every entry that has one out of the views.

        From the first line on nothing of them is served by the daemon; that they are condemned is on the disk before the first is moved, so that a
        crash in between cannot bring one back.
        """
        job.bad_files = tuple(file.path for file in entry.manifest.files if file.sha256 in bad)
        job.repaired_chunks = sum(map(len, bad.values()))
        self._do.counters.verify_failures += len(bad)
        why = f"{job.repaired_chunks} chunks are gone or went bad"
        log.error("bytes on the disk went bad: %s", ", ".join(job.bad_files), extra={"facts": {"model": str(entry.id), "job": job.id}})
        sharers = self._do.shelf.sharing(bad)
        for sharer in sharers:
            sharer.broken, sharer.suspect = IntegrityError(Code.DEGRADED, f"cannot serve {sharer.id}: {why}"), True
            self._do.changed(sharer.id)
        try:
            await self._do.disk.call(condemn, self._do.layout, self._do.blobs, sorted(bad), f"{clock.stamp()} {entry.id}: {why}")
        finally:
            for sharer in sharers:
                await self._do.disk.call(self._do.views.withdraw, sharer.manifest, hub_id=sharer.hub_id)

    async def mend(self, job: Job, entry: Entry) -> None:
        """Fetch the bad chunks from the pinned revision and put every entry that waited for them back."""
        plan = await self._plan(entry)
        for file in entry.manifest.files:
            await self._seed(job, plan, entry, file)
        mended = await self._fetcher.fill(job, plan)
        self._do.counters.repaired_chunks += job.repaired_chunks
        log.info("repaired: %s fetched", human(job.tally.fetched), extra={"facts": {"model": str(entry.id), "job": job.id}})
        for other in self._do.shelf.sharing(mended.manifest.blobs):
            if other.broken is not None and other.id != mended.id and await self._do.disk.call(self._whole, other):
                await unbroken(self._show(other, other.state))

    async def _plan(self, entry: Entry) -> FillPlan:
        """A plan for exactly the entry's files, with the source's own tokens. Raises `SourceError` when the source no longer has them."""
        manifest = entry.manifest
        name = next(iter(entry.state.names), None)
        resolved = Resolved(manifest.ref, name, manifest.endpoint)
        listing = await self._do.net.call(self._do.sources[manifest.ref.scheme].list, resolved)
        plan = make_plan(resolved, listing, asked=manifest.asked, selection=manifest.selection, also=manifest.by_path)
        files = [_proven(file, manifest.by_path[file.path]) for file in plan.files if file.path in manifest.by_path]
        lost = manifest.by_path.keys() - {file.path for file in files}
        if lost:
            raise SourceError(
                Code.REVISION_NOT_FOUND, f"cannot repair {entry.id}: its source no longer has {min(lost)!r}", facts={"files": sorted(lost)}
            )
        return replace(
            plan,
            files=tuple(files),
            names=entry.state.names,
            left_out=manifest.left_out,
            priority=Priority.REPAIR,
            resolved_at=entry.state.resolved_at,
        )

    async def _seed(self, job: Job, plan: FillPlan, entry: Entry, file: File) -> None:
        """Start the ingest of a quarantined blob from its good chunks, unless some fill makes or made the blob meanwhile."""
        source = self._do.layout.quarantine / file.sha256
        remote = next(remote for remote in plan.files if remote.path == file.path)
        key = ingest_key(remote.token, remote.size)
        async with self._do.key_locks(key):
            if not await self._do.disk.call(source.exists) or await self._do.disk.call(self._do.blobs.has, file.sha256, file.size):
                return
            with await self._do.ledger.admit(f"the repair of {file.path}", {key: file.size}, {key}):
                task = SeedTask(key, str(source), file.size, base64.b64encode(file.chunks).decode(), entry.manifest.chunk_size)
                await self._do.workers.run(task, priority=Priority.REPAIR)

    def _whole(self, entry: Entry) -> bool:
        return all(self._do.blobs.has(sha256, size) for sha256, size in entry.manifest.blobs.items())


def _proven(listed: RemoteFile, stored: File) -> RemoteFile:
    """The file as listed now, refused if it is not the one that was stored."""
    if listed.size != stored.size or (listed.digest and stored.source and listed.digest != stored.source):
        raise SourceError(Code.SOURCE_CHANGED, f"cannot repair {stored.path}: its source has other bytes under that name now", retryable=False)
    return listed
