"""Demand before bulk: what somebody waits for overtakes prefetches, also those already running, and costs them nothing that they have."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nvcache.core.manifest import CHUNK
from nvcache.core.plan import Priority
from nvcache.core.states import JobState
from nvcache.engine.engine import Engine
from nvcache.engine.fetch import TRIES
from nvcache.engine.status import JobStatus
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind

MB = 1_000_000
BULK = weights(1, 200 * MB)


def served(bed: Bed, name: str) -> int:
    """Bytes of a repository's files that the Hub has sent."""
    return sum(request.sent for request in bed.hub.seen(f"/{name}/*"))


async def prefetch(engine: Engine, ref: str) -> JobStatus:
    """Start a fill that nobody waits for."""
    job = await engine.ensure(wish(ref, priority=Priority.DECLARED))
    assert isinstance(job, JobStatus)
    return job


@asynccontextmanager
async def busy(bed: Bed, stored: int, **settings: object) -> AsyncIterator[tuple[Engine, JobStatus]]:
    """An engine with one worker of two lanes, all of which a prefetch holds that has `stored` bytes of its 200 MB."""
    bed.hub.repos["acme/bulk"] = repo({"model.safetensors": BULK})
    bed.hub.faults.add("/acme/bulk/*", Kind.TRICKLE, times=None, after=2**20, seconds=0.02)
    async with bed.engine(**{"workers": 1, "lanes": 2, **settings}) as engine:
        job = await prefetch(engine, "acme/bulk")
        await until(lambda: engine.job(job.id).progress.bytes_fetched, lambda fetched: fetched > stored)
        yield engine, job


def test_demand_overtakes_a_running_prefetch_which_goes_on_with_what_it_has(bed: Bed) -> None:
    bed.hub.repos["acme/wanted"] = repo({"model.safetensors": weights(2, 70 * MB), "config.json": b"{}"})

    async def test() -> None:
        async with busy(bed, 100 * MB) as (engine, bulk):
            await ready(engine, "acme/wanted")
            assert engine.job(bulk.id).state is JobState.FETCHING
            assert engine.counters.preemptions == 1
            ended = await end_of(engine, bulk)
            assert ended.state is JobState.DONE
            shown = [content for path, content in bed.shown().items() if "acme--bulk" in path]
            assert shown
            assert all(content == BULK for content in shown)
            assert served(bed, "acme/bulk") <= len(BULK) + 2 * CHUNK  # what its two lanes were about to have
            assert len(BULK) <= ended.progress.bytes_fetched <= served(bed, "acme/bulk")
            assert (engine.counters.retries, engine.counters.fill_failures, engine.counters.worker_restarts) == (0, {}, 0)

    run(test())


def test_what_is_about_to_end_does_not_make_way(bed: Bed) -> None:
    bed.hub.repos["acme/wanted"] = repo({"model.safetensors": weights(2, MB)})

    async def test() -> None:
        async with busy(bed, len(BULK) - 60 * MB) as (engine, bulk):
            await ready(engine, "acme/wanted")
            assert engine.counters.preemptions == 0
            assert engine.job(bulk.id).state is not JobState.FETCHING

    run(test())


@pytest.mark.parametrize("pinned", [False, True], ids=["the-same-wish", "another-wish-for-the-entry"])
def test_a_prefetch_that_somebody_comes_to_wait_for_is_demand(bed: Bed, pinned: bool) -> None:
    """It was queued behind another prefetch, and has to overtake it."""
    bed.hub.repos["acme/joined"] = repo({"model.safetensors": weights(2, 2 * MB)})
    ref = f"acme/joined@{bed.hub.repos['acme/joined'].commit}" if pinned else "acme/joined"

    async def test() -> None:
        async with busy(bed, MB) as (engine, bulk):
            queued = await prefetch(engine, "acme/joined")
            await until(lambda: engine.job(queued.id).state, lambda state: state is JobState.FETCHING)
            wanted = await engine.ensure(wish(ref))
            assert isinstance(wanted, JobStatus)
            assert (wanted.id == queued.id) is not pinned
            assert (await end_of(engine, wanted)).state is JobState.DONE
            assert engine.job(queued.id).state is JobState.DONE
            assert engine.job(bulk.id).state is JobState.FETCHING
            assert engine.counters.preemptions == 1

    run(test())


def test_a_file_that_a_prefetch_was_to_bring_comes_as_soon_as_somebody_waits_for_it(bed: Bed) -> None:
    shared = {"model.safetensors": weights(2, 2 * MB)}
    bed.hub.repos["acme/old"], bed.hub.repos["acme/new"] = repo(shared), repo(shared)

    async def test() -> None:
        async with busy(bed, MB) as (engine, bulk):
            old = await prefetch(engine, "acme/old")
            await until(lambda: engine.job(old.id).state, lambda state: state is JobState.FETCHING)
            await ready(engine, "acme/new")
            assert engine.job(bulk.id).state is JobState.FETCHING
            assert (await end_of(engine, old)).state is JobState.DONE
            assert served(bed, "acme/old") + served(bed, "acme/new") == len(shared["model.safetensors"])

    run(test())


def test_a_connection_is_freed_as_lanes_are(bed: Bed) -> None:
    """There are lanes enough, but the source allows one request."""
    bed.hub.repos["acme/wanted"] = repo({"model.safetensors": weights(2, MB)})

    async def test() -> None:
        async with busy(bed, MB, workers=2, hf_connections=1) as (engine, bulk):
            await ready(engine, "acme/wanted")
            assert engine.job(bulk.id).state is JobState.FETCHING
            assert engine.counters.preemptions == 1

    run(test())


def test_a_worker_that_does_not_stop_for_demand_is_replaced(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvcache.engine.workers.STOP_GRACE", 0.5)
    bed.hub.repos["acme/wanted"] = repo({"model.safetensors": weights(2, MB)})

    async def test() -> None:
        async with busy(bed, 20 * MB) as (engine, bulk):
            assert engine.session is not None
            os.kill(engine.session.do.workers.pids()[0], signal.SIGSTOP)
            await ready(engine, "acme/wanted")
            assert engine.job(bulk.id).state is JobState.FETCHING
            assert (engine.counters.worker_restarts, engine.counters.preemptions) == (1, 1)
            bed.hub.faults.clear()
            assert (await end_of(engine, bulk)).state is JobState.DONE

    run(test())


def test_a_cancelled_demand_lets_the_prefetch_go_on(bed: Bed) -> None:
    bed.hub.repos["acme/wanted"] = repo({"model.safetensors": weights(2, 70 * MB)})
    bed.hub.faults.add("/acme/wanted/*", Kind.STALL, times=None, after=MB)

    async def test() -> None:
        async with busy(bed, MB, stall_timeout=30) as (engine, bulk):
            wanted = await engine.ensure(wish("acme/wanted"))
            assert isinstance(wanted, JobStatus)
            await until(lambda: engine.job(wanted.id).progress.bytes_fetched, bool)
            before = engine.job(bulk.id).progress.bytes_fetched
            await engine.cancel(wanted.id)
            await until(lambda: engine.job(bulk.id).progress.bytes_fetched, lambda fetched: fetched > before + 20 * MB)
            assert engine.counters.preemptions == 1

    run(test())


def test_a_file_outlives_more_tokens_than_it_has_tries(bed: Bed, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    bed.hub.repos["acme/private"] = repo({"model.safetensors": weights(1, 150 * MB)}, private=True)
    bed.hub.faults.add("*model.safetensors", Kind.TRICKLE, times=None, after=2**20, seconds=0.03)

    def rotate(number: int) -> None:
        secret.write_text(f"token-{number}")
        bed.hub.token = f"token-{number}"
        bed.hub.expire_urls()
        bed.hub.drop_connections()

    async def test() -> None:
        rotate(0)
        async with bed.engine(workers=1, lanes=1, hf_token_path=secret) as engine:
            job = await engine.ensure(wish("acme/private"))
            assert isinstance(job, JobStatus)
            for number in range(1, TRIES + 1):
                goal = engine.job(job.id).progress.bytes_fetched + 20 * MB
                while engine.job(job.id).progress.bytes_fetched < goal:
                    await asyncio.sleep(0.01)
                rotate(number)
                await until(lambda: engine.counters.retries, number.__eq__)
            ended = await end_of(engine, job)
            assert ended.state is JobState.DONE, ended.error

    run(test())
