"""One flight for a key: who asks while it is being given up begins another."""

from __future__ import annotations

import asyncio

from nvcache.core.plan import Priority
from nvcache.core.ref import parse_ref
from nvcache.core.states import JobState
from nvcache.engine.jobs import Job, Jobs

REF = parse_ref("acme/m")


def test_nobody_joins_a_job_that_is_being_cancelled() -> None:
    async def test() -> None:
        jobs, over = Jobs(lambda _: None), asyncio.Event()

        async def stubborn(_: Job) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await over.wait()  # what has to be put away takes its time

        async def quick(job: Job) -> None:
            job.move(JobState.RESOLVING)
            job.move(JobState.DONE)

        first, new = jobs.start("key", "fill", REF, stubborn, Priority.DEMAND)
        assert new
        assert jobs.start("key", "fill", REF, quick, Priority.DEMAND) == (first, False)
        await asyncio.sleep(0)
        cancelling = asyncio.create_task(jobs.cancel(first))
        await asyncio.sleep(0)
        second, new = jobs.start("key", "fill", REF, quick, Priority.DEMAND)
        assert (second is not first, new) == (True, True)
        over.set()
        await cancelling
        assert second.task is not None
        await second.task
        assert (first.state, second.state) == (JobState.CANCELLED, JobState.DONE)
        third, new = jobs.start("key", "fill", REF, quick, Priority.DEMAND)
        assert new
        assert third.task is not None
        await third.task

    asyncio.run(test())
