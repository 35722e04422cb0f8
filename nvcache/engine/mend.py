"""The jobs that verify and repair entries, and the persistence of the second. What they do to an entry is `repair`'s and `scrub`'s matter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from nvcache.core.plan import Priority
from nvcache.core.ref import EntryId
from nvcache.core.states import JobState
from nvcache.core.timeline import Kind
from nvcache.engine.context import Context
from nvcache.engine.jobs import Job, Jobs
from nvcache.engine.persist import persist
from nvcache.engine.repair import Repairer
from nvcache.engine.scrub import survey
from nvcache.engine.shelf import Entry
from nvcache.errors import Code, IntegrityError, Interrupted, NvcacheError, RequestError

log = logging.getLogger(__name__)
Spawn = Callable[[Coroutine[Any, Any, None], str], None]  # start a task, by name, that ends with the store


class Mender:
    """Verifications and repairs of one store's entries. All methods belong to the event loop."""

    def __init__(self, context: Context, jobs: Jobs, repairer: Repairer, spawn: Spawn) -> None:
        self._do = context
        self._jobs = jobs
        self._repairer = repairer
        self._spawn = spawn
        repairer.wake = self._wake
        self._insisting: dict[tuple[str, EntryId], asyncio.Event] = {}  # what goes on by itself → set when its pause is over

    def verify(self, entry_id: EntryId, bandwidth: int | None = None) -> Job:
        """A job that reads every byte of an entry back and repairs what is bad. It is read as fast as it goes, or at `bandwidth` bytes a second."""
        entry = self._do.shelf.entries[entry_id]

        async def work(job: Job) -> None:
            if bandwidth is None or entry.broken is not None:
                await self._judge(job, entry_id)
            else:
                await self._survey(job, entry, bandwidth, fresh=0.0)

        return self._start(entry, "verify", work, bandwidth)

    def scrub(self, entry_id: EntryId, bandwidth: int, fresh: float) -> Job:
        """Like `verify`, behind all other work, going on where a scrub was cut short that began less than `fresh` seconds ago."""
        entry = self._do.shelf.entries[entry_id]

        async def work(job: Job) -> None:
            await self._survey(job, entry, bandwidth, fresh)
            self._do.counters.scrubs += 1
            self._do.counters.scrub_failures += bool(job.bad_files)

        return self._start(entry, "scrub", work, bandwidth)

    async def _survey(self, job: Job, entry: Entry, bandwidth: int, fresh: float) -> None:
        """Read slowly and without a lock; then, with the lock, believe it or look again."""
        job.move(JobState.VERIFYING)
        wrong = await survey(self._do, job, entry, bandwidth, fresh)
        async with self._do.entry_locks(entry.id):
            if self._do.shelf.entries.get(entry.id) is not entry:
                raise Interrupted(Code.CANCELLED, f"cannot finish the reading of {entry.id}: it was changed or removed meanwhile")
            if wrong is None and entry.broken is None:
                await self._repairer.proven(job, entry)
                job.move(JobState.DONE)
                return
        job.priority = Priority.REPAIR
        job.read_again()
        await self._judge(job, entry.id, wrong)

    async def _judge(self, job: Job, entry_id: EntryId, first: str | None = None) -> None:
        """Read everything with the lock of the entry, the blob `first` before all others, and repair what is bad."""
        try:
            async with self._do.entry_locks(entry_id):
                if entry_id not in self._do.shelf.entries:
                    raise RequestError(Code.UNKNOWN_MODEL, f"cannot verify {entry_id}: it was removed meanwhile")
                await self._read(job, entry_id, first)
        except NvcacheError as error:
            found = self._do.shelf.entries.get(entry_id)
            if found is not None and found.broken is not None and error.code is not Code.STOPPING:
                self.keep_mending(entry_id)
            raise
        finally:
            self._leave_none()
        job.move(JobState.DONE)

    async def _read(self, job: Job, entry_id: EntryId, first: str | None) -> None:
        """With the lock of an entry: read it, again if somebody wrote to it meanwhile, and repair it."""
        while (entry := self._do.shelf.entries[entry_id]).broken is None:
            doubts = entry.doubts
            await self._repairer.verify(job, entry, first)
            if self._do.shelf.entries[entry_id] is not entry:  # a repair made it anew
                return
            if entry.doubts == doubts:
                entry.answered = doubts
                break
            job.read_again()
        if (entry := self._do.shelf.entries[entry_id]).broken is not None:  # also when a look-up found files gone meanwhile
            await self._repairer.recover(job, entry)

    def _leave_none(self) -> None:
        """Who shared bad files with an entry was withdrawn with it. If it could not be mended, he may be, from his own source."""
        for entry in self._do.shelf.entries.values():
            if entry.broken is not None:
                self.keep_mending(entry.id)

    def keep_mending(self, entry_id: EntryId) -> None:
        """Repair a withdrawn entry, again and again until it is whole or removed; one such task for an entry."""
        self._insist("repair", entry_id, self._repair)

    def _insist(self, kind: str, entry_id: EntryId, start: Callable[[EntryId], Job | None]) -> None:
        """Have what `start` starts succeed until it starts nothing more; one such task for an entry and `kind`.

        It looks again after it has succeeded: what came too late for that job found this task still there.
        """
        if (kind, entry_id) in self._insisting:
            return

        async def insist() -> None:
            try:
                while await persist(partial(start, entry_id), f"the {kind} of {entry_id}", settled=settled):
                    pass
            finally:
                del self._insisting[kind, entry_id]

        settled = self._insisting[kind, entry_id] = asyncio.Event()
        self._spawn(insist(), f"{kind}-{entry_id}")

    def changed(self, entry_id: EntryId) -> None:
        """Whoever waits to repair an entry that is whole or gone by now waits no longer: if it breaks again, that is mended at once."""
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None or entry.broken is None:
            self._wake(entry_id)

    def _wake(self, entry_id: EntryId) -> None:
        if (settled := self._insisting.get(("repair", entry_id))) is not None:
            settled.set()

    def doubt(self, entry: Entry) -> None:
        """A look-up found that somebody wrote to files of the entry, which nobody may: they are read at once, until a reading answers that."""
        log.warning("files of a model were written to; it is verified", extra={"facts": {"model": str(entry.id)}})
        entry.doubts += 1
        self._insist("verification", entry.id, self._recheck)

    def _recheck(self, entry_id: EntryId) -> Job | None:
        """A job that reads an entry whose files were written to; None when that was done, or it is withdrawn and read for that."""
        entry = self._do.shelf.entries.get(entry_id)
        return self.verify(entry_id) if entry is not None and entry.broken is None and entry.doubts != entry.answered else None

    def withdraw(self, entry: Entry) -> None:
        """A look-up found files missing or of another size: from now on the entry is not served, until it is whole again."""
        log.error("files of a model are gone or short; it is withdrawn and repaired", extra={"facts": {"model": str(entry.id)}})
        entry.broken = IntegrityError(Code.DEGRADED, f"cannot serve {entry.id}: files of it are gone or short")
        self._do.counters.verify_failures += 1
        self._do.timeline.note(entry.id, Kind.WITHDRAWN, what="files of it are gone or short", code=str(Code.DEGRADED))
        self._do.changed(entry.id)
        self._spawn(self._do.kaito.settle(), f"kaito-{entry.id}")
        self._wake(entry.id)  # it was whole: a pause is of something that is over
        self.keep_mending(entry.id)

    def _repair(self, entry_id: EntryId) -> Job | None:
        """A job that brings a withdrawn entry back; None when there is nothing to bring back any more."""
        entry = self._do.shelf.entries.get(entry_id)
        if entry is None or entry.broken is None:
            return None

        async def work(job: Job) -> None:
            try:
                async with self._do.entry_locks(entry_id):
                    found = self._do.shelf.entries.get(entry_id)
                    if found is not None and found.broken is not None:
                        await self._repairer.recover(job, found)
            finally:
                self._leave_none()
            job.move(JobState.DONE)

        return self._start(entry, "repair", work)

    def _start(self, entry: Entry, kind: str, work: Callable[[Job], Coroutine[Any, Any, None]], bandwidth: int | None = None) -> Job:
        """Verification and repair of one entry share a flight: each does the other's work where that is needed.

        Nobody waits for a slow reading who wants a quick one, or a repair.
        """
        priority = Priority.SCRUB if kind == "scrub" else Priority.REPAIR
        job, _ = self._jobs.start(("verify", entry.id, bandwidth), kind, entry.manifest.ref, work, priority)
        self._jobs.bind(job, entry.id)
        self._do.timeline.follow(job)
        return job
