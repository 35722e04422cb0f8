"""Answers what the node has: entries by name, their status, and the cheap check that their files are still there. It changes nothing on the disk.

An answer comes from memory. The cheap check (every file of every view exists with its size, is the blob, and was not written to since the check
before) runs on a thread, at most once a second for an entry and for at most `CHECK_TIMEOUT` seconds; an entry whose disk does not answer in that time
is `unknown`, not ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime

from nvcache.core.manifest import Manifest
from nvcache.core.ref import EntryId, Ref, SlugName, parse_name, shortened
from nvcache.core.states import MODEL_STATE_OF_JOB, JobState, ModelState
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.context import Context
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.shelf import Entry, hub_id, unknown
from nvcache.engine.status import ErrorInfo, ModelStatus
from nvcache.errors import SPENT, DiskError, IntegrityError, NvcacheError

Stamps = dict[str, tuple[int, int]]  # SHA-256 → inode, mtime in ns
CHECK_EVERY = 1.0  # seconds an answer about the files stays good
CHECK_TIMEOUT = 0.5  # seconds a look-up waits for the disk
GIVE_UP = "it is tried again by itself; if its source will not have it again: `nvcache rm` it, and warm what the source has now"


class Lookup:
    """Statuses of entries, ready or in the making.

    `checks` are threads of its own: a disk that does not answer must not hold up other work. `withdraw` is told of an entry whose files are not what
    they should be, `doubt` of one whose files somebody wrote to.
    """

    def __init__(
        self, context: Context, jobs: Jobs, checks: DaemonExecutor, withdraw: Callable[[Entry], None], doubt: Callable[[Entry], None]
    ) -> None:
        self._do = context
        self._jobs = jobs
        self._withdraw = withdraw
        self._doubt = doubt
        self._checks = checks
        self._checking: dict[EntryId, Future[tuple[bool, Stamps]]] = {}

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

    async def check_all(self) -> None:
        """The same for every model that is ready, one after the other: what nobody asks for goes bad too. It ends where a disk does not answer."""
        for entry in list(self._do.shelf.entries.values()):
            if entry.broken is None and not entry.removing and await self.check(entry) is not None:
                return

    async def check(self, entry: Entry) -> ModelState | None:
        """Look whether the entry's files are there, unless that was done a moment ago. None is as good as ready."""
        shown, kaito = entry.hub_id, self._do.kaito.shown_as(entry)
        since, good = entry.checked
        if clock.monotonic() - since < CHECK_EVERY:
            return None if good else ModelState.UNKNOWN
        check = self._checking.get(entry.id)
        if check is None:
            check = self._checking[entry.id] = self._checks.submit(self._look, entry.manifest, shown, kaito)
            check.add_done_callback(lambda _: self._checking.pop(entry.id, None))
        ended = asyncio.wrap_future(check)
        ended.add_done_callback(lambda each: each.cancelled() or each.exception())  # seen: it is told below, from `check`
        await asyncio.wait({ended}, timeout=CHECK_TIMEOUT)
        if not check.done():  # the thread is asked, not the loop: where the loop is late, the disk was not
            entry.checked = (clock.monotonic(), False)
            return ModelState.UNKNOWN
        try:
            whole, stamps = check.result()
        except (DiskError, IntegrityError) as error:
            if error.facts.get("errno") in SPENT:
                entry.checked = (clock.monotonic(), False)
                return ModelState.UNKNOWN
            self._do.doubt(error)
            whole, stamps = False, {}
        entry.checked = (clock.monotonic(), True)
        now = entry.hub_id, self._do.kaito.shown_as(entry)
        replaced = self._do.shelf.entries.get(entry.id) is not entry or now != (shown, kaito)  # it was looked at while somebody changed it
        before, entry.stamps = entry.stamps, stamps
        if not whole and entry.broken is None and not entry.removing and not replaced and not entry.changing:
            entry.suspect = _other_files(before, stamps)
            self._withdraw(entry)
        if entry.broken is None and not entry.removing and _written_to(before, stamps):
            self._doubt(entry)
        return None

    def _look(self, manifest: Manifest, shown: str | None, kaito: str | None) -> tuple[bool, Stamps]:
        """Whether the files are there, and the stamps of the blobs. Blocks. Raises `DiskError`, `IntegrityError`."""
        return self._do.views.complete(manifest, shown, kaito), self._do.blobs.stamps(manifest.blobs)

    def all(self, state: ModelState | None) -> list[ModelStatus]:
        """Every entry, ready or in the making, by name."""
        found = [status for entry_id in self.ids() if (status := self.status(entry_id)) is not None]
        return [status for status in found if state is None or status.state is state]

    def ids(self) -> list[EntryId]:
        """Every entry, ready or in the making, by name."""
        return sorted({*self._do.shelf.entries, *(entry_id for entry_id in self._jobs.entries() if self._tells(entry_id))})

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
        error = self._why_withdrawn(entry) or (job.error if job is not None and not ready else None)
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
            pinned=entry.state.pin or self._do.declared.pins(entry, self._do.shelf),
            leases=len(self._do.shelf.holders(entry_id, clock.unix())),
            in_use=entry.in_use,
            verified_at=manifest.verified_at,
            checked_at=entry.state.checked_at,
            last_used=datetime.fromtimestamp(entry.last_used, UTC) if entry.last_used else None,
            warnings=(*manifest.warnings, *self._do.kaito.warnings(entry_id)),
            unproven=manifest.unproven,
            progress=job.status().progress if job is not None and active else None,
            job=job.id if job is not None and active else None,
            error=ErrorInfo.of(error) if error else None,
            fetched_bytes=job.tally.fetched if job is not None and job.kind == "fill" else 0,
            seconds=job.status().seconds if job is not None and job.kind == "fill" else 0.0,
            note=job.note if job is not None else None,
        )

    def _why_withdrawn(self, entry: Entry) -> NvcacheError | None:
        """Why an entry is withdrawn, and if mending it failed, why that: a source that no longer has it, for one. None of one that is served."""
        if entry.broken is None:
            return None
        ended = [job for job in self._jobs.of(entry.id) if job.state.ended and job.kind != "fill"]
        failure = ended[-1].error if ended else None
        if failure is None:
            return entry.broken
        hint = failure.hint if failure.retryable else GIVE_UP
        return IntegrityError(entry.broken.code, f"{entry.broken}; mending it failed: {failure}", hint=hint, facts=entry.broken.facts)

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


def _other_files(before: Stamps, now: Stamps) -> bool:
    """Whether another file has the place of a blob: whatever its size, nobody knows what is in it."""
    return any(sha256 in before and before[sha256][0] != inode for sha256, (inode, _) in now.items())


def _written_to(before: Stamps, now: Stamps) -> bool:
    """Whether a blob that is the same file has another time of its last write; one that was made anew has another inode."""
    return any(sha256 in before and before[sha256][0] == inode and before[sha256][1] != mtime for sha256, (inode, mtime) in now.items())
