"""Work that nobody waits for is tried again until it succeeds. It knows no work itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from nvcache.core.states import JobState
from nvcache.engine.jobs import Job

log = logging.getLogger(__name__)
RETRY_FIRST, RETRY_MOST = 5.0, 300.0  # seconds between two tries
LONGEST_ASKED = 3600.0  # seconds that a source may ask for between them
RETRY_REFUSED = 600.0  # where the error says that trying again is no use: the world may still change


async def persist(start: Callable[[], Job | None], what: str, *, refused: float | None = RETRY_REFUSED, settled: asyncio.Event | None = None) -> bool:
    """Run a job again, ever less often, until it succeeds or there is none to start. True: there was one, and it succeeded.

    `refused` is the pause in seconds after an error that says that trying again is no use, and after somebody cancelled it; None gives up then.
    `settled` ends a pause: what the last job failed at was done by somebody else, and what comes is new.
    """
    pause = RETRY_FIRST
    settled = settled or asyncio.Event()
    while True:
        settled.clear()
        job = start()
        if job is None:
            return False
        if job.task is not None:
            await asyncio.wait({job.task})
        if job.error is None:
            return True
        again = job.error.retryable and job.state is not JobState.CANCELLED
        if not again and refused is None:
            return False
        wait = pause if again else refused or pause
        facts = {"model": job.ref.slug, "job": job.id, "code": job.error.code}
        log.warning("%s failed and is tried again in %g s: %s", what, wait, job.error, extra={"facts": facts})
        try:
            async with asyncio.timeout(max(wait, min(job.error.retry_after_s or 0, LONGEST_ASKED))):
                await settled.wait()
            pause = RETRY_FIRST
        except TimeoutError:
            pause = min(RETRY_MOST, pause * 2)
