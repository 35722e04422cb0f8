"""Answers what the node has: entries by name, their status, and the cheap check that their files are still there. It changes nothing on the disk.

An answer comes from memory. The cheap check (every file of every view exists with its size) runs on a thread, at most once a second for an entry and
for at most `CHECK_TIMEOUT` seconds; an entry whose disk does not answer in that time is `unknown`, not ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from nvcache.core.ref import EntryId, Ref, SlugName, parse_name, shortened
from nvcache.core.states import MODEL_STATE_OF_JOB, JobState, ModelState
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.context import Context
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.shelf import Entry, hub_id, unknown
from nvcache.engine.status import ErrorInfo, ModelStatus
from nvcache.errors import DiskError, IntegrityError

CHECK_EVERY = 1.0  # seconds an answer about the files stays good
CHECK_TIMEOUT = 0.5  # seconds a look-up waits for the disk


class Lookup:
    """Statuses of entries, ready or in the making. `doubt` is told of an entry whose files are not what they should be."""

    def __init__(self, context: Context, jobs: Jobs, doubt: Callable[[Entry], None]) -> None:
        self._do = context
        self._jobs = jobs
        self._doubt = doubt
        self._checks = DaemonExecutor("check", 4)
        self._checking: dict[EntryId, asyncio.Task[bool]] = {}

    async def model(self, name: str) -> ModelStatus:
        """The entry a name means, checked. Raises `RequestError` (bad-reference, unknown-model)."""
        wanted = parse_name(name)
        entry_id = self._do.shelf.find(wanted) or self._in_making(wanted)
        if entry_id is None:
            raise unknown(wanted)
        entry = self._do.shelf.entries.get(entry_id)
        state = None
        if entry is not None and entry.broken is None:
            state = await self.check(entry)
        status = self.status(entry_id, state)  # says degraded when the check just found it so
        if status is None:
            raise unknown(wanted)
        return status

    async def check(self, entry: Entry) -> ModelState | None:
        """Look whether the entry's files are there, unless that was done a moment ago. None is as good as ready."""
        shown = entry.hub_id
        since, good = entry.checked
        if clock.monotonic() - since < CHECK_EVERY:
            return None if good else ModelState.UNKNOWN
        task = self._checking.get(entry.id)
        if task is None:
            task = asyncio.create_task(self._checks.call(self._do.views.complete, entry.manifest, entry.hub_id), name=f"check-{entry.id}")
            self._checking[entry.id] = task
            task.add_done_callback(lambda _: self._checking.pop(entry.id, None))
        done, _ = await asyncio.wait({task}, timeout=CHECK_TIMEOUT)
        if not done:
            entry.checked = (clock.monotonic(), False)
            return ModelState.UNKNOWN
        try:
            whole = task.result()
        except (DiskError, IntegrityError):
            whole = False
        entry.checked = (clock.monotonic(), True)
        replaced = self._do.shelf.entries.get(entry.id) is not entry or entry.hub_id != shown  # it was looked at while a fill changed it
        if not whole and entry.broken is None and not entry.removing and not replaced and not entry.changing:
            self._doubt(entry)
        return None

    def all(self, state: ModelState | None) -> list[ModelStatus]:
        """Every entry, ready or in the making, by name."""
        ids = sorted({*self._do.shelf.entries, *(entry_id for entry_id in self._jobs.entries() if self._tells(entry_id))})
        found = [status for entry_id in ids if (status := self.status(entry_id)) is not None]
        return [status for status in found if state is None or status.state is state]

    def status(self, entry_id: EntryId, checked: ModelState | None = None) -> ModelStatus | None:
        """One entry from memory; `checked` is what the cheap check found where that is not ready. None when nothing is known of it."""
        entry = self._do.shelf.entries.get(entry_id)
        job = self._job_of(entry_id)
        if entry is None:
            return self._of_job(entry_id, job) if job is not None else None
        manifest = entry.manifest
        state = self._state(entry, job, checked)
        ready = state is ModelState.READY
        active = job is not None and not job.state.ended
        error = entry.broken or (job.error if job is not None and not ready else None)
        return ModelStatus(
            entry=str(entry_id),
            ref=str(manifest.ref),
            revision=entry_id.revision,
            state=state,
            files=len(manifest.files),
            bytes=manifest.size,
            path=str(self._do.layout.view(entry_id)) if ready else None,
            hub_cache=str(self._do.layout.hub) if ready and entry.hub_id else None,
            hub_id=entry.hub_id,
            pinned=entry.state.pin,
            leases=len(self._do.shelf.holders(entry_id, clock.unix())),
            verified_at=manifest.verified_at,
            checked_at=entry.state.checked_at,
            last_used=datetime.fromtimestamp(entry.last_used, UTC) if entry.last_used else None,
            warnings=manifest.warnings,
            progress=job.status().progress if job is not None and active else None,
            job=job.id if job is not None and active else None,
            error=ErrorInfo.of(error) if error else None,
            fetched_bytes=job.tally.fetched if job is not None and job.kind == "fill" else 0,
            seconds=job.status().seconds if job is not None and job.kind == "fill" else 0.0,
            note=job.note if job is not None else None,
        )

    def _state(self, entry: Entry, job: Job | None, checked: ModelState | None) -> ModelState:
        if entry.removing:
            return ModelState.EVICTING
        if entry.broken is None:
            return checked or ModelState.READY
        if job is not None and job.state is JobState.FETCHING:
            return ModelState.FETCHING
        return ModelState.DEGRADED

    def _of_job(self, entry_id: EntryId, job: Job) -> ModelStatus:
        shown = job.status()
        plan = job.plan
        return ModelStatus(
            entry=str(entry_id),
            ref=str(plan.ref if plan else job.ref.at(entry_id.revision)),
            revision=entry_id.revision,
            state=MODEL_STATE_OF_JOB[shown.state],
            files=shown.progress.files_total,
            bytes=shown.progress.bytes_total,
            hub_id=hub_id(job.ref, plan.alias if plan else None),
            pinned=plan.pin if plan else False,
            progress=shown.progress,
            job=job.id,
            error=shown.error,
            fetched_bytes=job.tally.fetched,
            seconds=shown.seconds,
            note=job.note,
        )

    def _job_of(self, entry_id: EntryId) -> Job | None:
        """The job to show for an entry: the one that does the work, else the last that ended."""
        jobs = self._jobs.of(entry_id)
        active = [job for job in jobs if not job.state.ended and job.leader is None]
        chosen = active or jobs
        return chosen[-1] if chosen else None

    def _tells(self, entry_id: EntryId) -> bool:
        """Whether an entry without manifest is worth a line: under way, or failed and not forgotten."""
        job = self._job_of(entry_id)
        return job is not None and job.state not in (JobState.CANCELLED, JobState.DONE)

    def unfinished(self, name: Ref | SlugName) -> Job | None:
        """The job of an entry that has no manifest: under way, failed or cancelled."""
        slug, digits = shortened(name) or (name.slug, None)
        for entry_id in reversed(self._jobs.entries()):
            if entry_id.slug == slug and entry_id not in self._do.shelf.entries:
                revisions = (None, entry_id.revision, *(job.ref.revision for job in self._jobs.of(entry_id)))
                if name.revision in revisions or (digits is not None and entry_id.revision.startswith(digits)):
                    return self._job_of(entry_id)
        return None

    def _in_making(self, name: Ref | SlugName) -> EntryId | None:
        job = self.unfinished(name)
        return job.entry if job is not None and job.entry is not None and self._tells(job.entry) else None
