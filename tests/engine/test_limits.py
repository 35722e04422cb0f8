"""Limits of a source: requests in flight and bytes a second on the node, whatever the number of workers; nobody else is held up."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nvcache.core.states import JobState
from nvcache.engine.engine import Engine
from nvcache.engine.status import JobStatus
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind

MB = 1_000_000


@pytest.mark.parametrize(("limit", "lanes"), [(3, 1), (2, 4), (0, 1)], ids=["files", "lanes-of-a-file", "none"])
def test_requests_in_flight_are_limited_on_the_node(bed: Bed, limit: int, lanes: int) -> None:
    """Of many files at a time, and of one file that would have more lanes by itself."""
    files = {"model.safetensors": weights(1, 80 * MB)} if lanes > 1 else {f"{i}.bin": os.urandom(2 * MB) for i in range(12)}
    bed.hub.repos["acme/m"] = repo(files)
    bed.hub.faults.add("/acme/m/*", Kind.TRICKLE, times=None, after=2**20, seconds=0.05 if limit else 0.5)

    async def test() -> None:
        async with bed.engine(workers=2, lanes=4, hf_connections=limit) as engine:
            await ready(engine, "acme/m", include=("*",))
            assert bed.hub.most_at_once == limit if limit else bed.hub.most_at_once > 4

    run(test())


def test_a_source_at_its_limit_holds_up_no_other(bed: Bed, tmp_path: Path) -> None:
    local = tmp_path / "model"
    local.mkdir()
    (local / "model.safetensors").write_bytes(weights(3, 2 * MB))
    bed.hub.repos["acme/m"] = repo({f"{i}.bin": os.urandom(MB) for i in range(5)})
    stalled = bed.hub.faults.add("/acme/m/*", Kind.STALL, times=1, after=1000)

    async def test() -> None:
        async with bed.engine(workers=1, lanes=2, hf_connections=1, stall_timeout=30) as engine:
            first = await engine.ensure(wish("acme/m", include=("*",)))
            assert isinstance(first, JobStatus)
            await until(lambda: stalled.hits, bool)
            await ready(engine, f"file://{local}")
            assert engine.job(first.id).state is JobState.FETCHING
            stalled.released.set()
            assert (await end_of(engine, first)).state is JobState.DONE
            assert bed.hub.most_at_once == 1

    run(test())


async def fetched(engine: Engine, job: JobStatus) -> tuple[float, list[tuple[float, int]]]:
    """Seconds from the first byte of a fill to its end, and its bytes fetched by the time."""
    clock = asyncio.get_running_loop().time
    await until(lambda: engine.job(job.id).progress.bytes_fetched, bool)
    began, samples = clock(), []
    while not (seen := engine.job(job.id)).state.ended:
        samples.append((clock() - began, seen.progress.bytes_fetched))
        await asyncio.sleep(0.05)
    assert seen.state is JobState.DONE, seen.error
    return clock() - began, samples


def test_bandwidth_is_shared_by_the_workers_and_all_of_it_goes_to_who_is_left(bed: Bed) -> None:
    rate, burst = 8 * MB, 4 * MB  # a worker may begin with a quarter of a second, and is heard of four times a second
    sizes = [4 * MB, 4 * MB, 4 * MB, 20 * MB]
    bed.hub.repos["acme/m"] = repo({f"{i}.bin": os.urandom(size) for i, size in enumerate(sizes)})

    async def test() -> None:
        async with bed.engine(workers=2, lanes=4, hf_bandwidth=rate, fetch_deadline=30) as engine:
            job = await engine.ensure(wish("acme/m", include=("*",)))
            assert isinstance(job, JobStatus)
            took, samples = await fetched(engine, job)
            assert samples[-1][0] > 2
            for after, seen in samples:
                assert seen <= 1.2 * rate * after + burst
            assert sum(sizes) >= 0.6 * rate * took, f"{sum(sizes) / took / MB:.1f} MB/s of {rate / MB:.0f}"

    run(test())
