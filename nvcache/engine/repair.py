"""Verifies an entry's blobs against their chunk digests and mends what went bad. It trusts nothing it has not read, and fetches only the bad chunks.

A bad blob is withdrawn from every view at once and renamed into quarantine; the repair is then an ordinary fill whose ingest is seeded with the
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
from nvcache.engine.context import Context
from nvcache.engine.fetch import Fetcher, make_plan
from nvcache.engine.jobs import Job
from nvcache.engine.messages import CheckTask, SeedTask
from nvcache.engine.shelf import Entry
from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources.base import Resolved
from nvcache.store.ingest import ingest_key

log = logging.getLogger(__name__)


class Repairer:
    """Checks and mends entries. The caller holds the entry's lock."""

    def __init__(self, context: Context, fetcher: Fetcher) -> None:
        self._do = context
        self._fetcher = fetcher

    async def verify(self, job: Job, entry: Entry) -> None:
        """Read every blob of `entry`, compare chunk by chunk, repair what is bad."""
        job.move(JobState.VERIFYING)
        files = {file.sha256: file for file in entry.manifest.files}
        job.tally.expect(len(files), sum(file.size for file in files.values()))
        bad: dict[str, list[int]] = {}
        async with asyncio.TaskGroup() as group:
            for file in files.values():
                group.create_task(self._check(job, entry, file, bad))
        if not bad:
            state = replace(entry.state, checked_at=clock.stamp())
            await self._do.disk.call(self._do.catalog.write_state, entry.id, state)
            entry.state = state
            self._do.changed(entry.id)
            log.info("verified: every byte is right", extra={"facts": {"model": str(entry.id), "job": job.id}})
            return
        job.bad_files = tuple(file.path for file in entry.manifest.files if file.sha256 in bad)
        job.repaired_chunks = sum(map(len, bad.values()))
        self._do.counters.verify_failures += len(bad)
        log.error("bytes on the disk went bad: %s", ", ".join(job.bad_files), extra={"facts": {"model": str(entry.id)}})
        await self.withdraw(entry, list(bad), f"{job.repaired_chunks} chunks went bad")
        await self.mend(job, entry)
        self._do.counters.repaired_chunks += job.repaired_chunks

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

    async def withdraw(self, entry: Entry, blobs: list[str], why: str) -> None:
        """Take every entry that shares a bad blob out of the views, then the blobs out of the store."""
        for sharer in self._do.shelf.sharing(blobs):
            sharer.broken = IntegrityError(Code.DEGRADED, f"cannot serve {sharer.id}: {why}")
            self._do.changed(sharer.id)
            await self._do.disk.call(self._do.views.withdraw, sharer.manifest, hub_id=sharer.hub_id)
        for sha256 in blobs:
            if await self._do.disk.call(self._do.layout.blob(sha256).exists):
                await self._do.disk.call(self._do.blobs.quarantine, sha256, f"{clock.stamp()} {entry.id}: {why}")

    async def recover(self, job: Job, entry: Entry) -> None:
        """Bring a withdrawn entry back: mend the blobs that are gone or short, or just show the views again."""
        job.move(JobState.VERIFYING)
        bad = [sha256 for sha256, size in entry.manifest.blobs.items() if not await self._do.disk.call(self._do.blobs.has, sha256, size)]
        if bad:
            job.bad_files = tuple(file.path for file in entry.manifest.files if file.sha256 in bad)
            await self.withdraw(entry, bad, f"{len(bad)} of its files are gone or went bad")
            await self.mend(job, entry)
            self._do.counters.repaired_chunks += job.repaired_chunks
        else:
            await self._do.disk.call(self._republish, entry)
            entry.broken = None
            self._do.changed(entry.id)

    async def mend(self, job: Job, entry: Entry) -> None:
        """Fetch the bad chunks from the pinned revision and put every entry that waited for them back."""
        plan = await self._plan(entry)
        for file in entry.manifest.files:
            await self._seed(job, plan, entry, file)
        mended = await self._fetcher.fill(job, plan)
        log.info("repaired: %s fetched", human(job.tally.fetched), extra={"facts": {"model": str(entry.id), "job": job.id}})
        for other in self._do.shelf.sharing(mended.manifest.blobs):
            if other.broken is not None and other.id != mended.id and await self._do.disk.call(self._whole, other):
                await self._do.disk.call(self._republish, other)
                other.broken = None
                self._do.changed(other.id)

    async def _plan(self, entry: Entry) -> FillPlan:
        """A plan for exactly the entry's files, with the source's own tokens. Raises `SourceError` when the source no longer has them."""
        manifest = entry.manifest
        name = next(iter(entry.state.names), None)
        resolved = Resolved(manifest.ref, name, manifest.endpoint)
        listing = await self._do.net.call(self._do.sources[manifest.ref.scheme].list, resolved)
        plan = make_plan(resolved, listing, asked=manifest.asked, selection=manifest.selection, also=manifest.by_path, priority=Priority.REPAIR)
        files = [_proven(file, manifest.by_path[file.path]) for file in plan.files if file.path in manifest.by_path]
        lost = manifest.by_path.keys() - {file.path for file in files}
        if lost:
            raise SourceError(
                Code.REVISION_NOT_FOUND, f"cannot repair {entry.id}: its source no longer has {min(lost)!r}", facts={"files": sorted(lost)}
            )
        return replace(plan, files=tuple(files), names=entry.state.names, left_out=manifest.left_out)

    async def _seed(self, job: Job, plan: FillPlan, entry: Entry, file: File) -> None:
        """Start the ingest of a quarantined blob from its good chunks."""
        source = self._do.layout.quarantine / file.sha256
        if not await self._do.disk.call(source.exists) or await self._do.disk.call(self._do.blobs.has, file.sha256, file.size):
            return
        remote = next(remote for remote in plan.files if remote.path == file.path)
        key = ingest_key(remote.token, remote.size)
        with await self._do.ledger.admit(f"the repair of {file.path}", {key: file.size}, {key}):
            task = SeedTask(key, str(source), file.size, base64.b64encode(file.chunks).decode(), entry.manifest.chunk_size)
            result = await self._do.workers.run(task, priority=Priority.REPAIR)
        if not job.repaired_chunks:
            job.repaired_chunks = len(result["bad"])

    def _whole(self, entry: Entry) -> bool:
        return all(self._do.blobs.has(sha256, size) for sha256, size in entry.manifest.blobs.items())

    def _republish(self, entry: Entry) -> None:
        self._do.views.publish(entry.manifest, hub_id=entry.hub_id, names=entry.state.names)


def _proven(listed: RemoteFile, stored: File) -> RemoteFile:
    """The file as listed now, refused if it is not the one that was stored."""
    if listed.size != stored.size or (listed.digest and stored.source and listed.digest != stored.source):
        raise SourceError(Code.SOURCE_CHANGED, f"cannot repair {stored.path}: its source has other bytes under that name now", retryable=False)
    return listed
