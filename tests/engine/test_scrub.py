"""Scrubbing: by the clock, where it was cut short, beside all other work, and without a trace in the page cache."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from nvcache.core.states import JobState, ModelState
from nvcache.engine import scrub
from nvcache.engine.engine import Engine
from nvcache.engine.status import JobStatus
from nvcache.store.pagecache import in_memory, resident
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights
from tests.engine.test_keep import SIZE, flip
from tests.support.faults import Kind

LONG_AGO = "2001-02-03T04:05:06Z"
CHUNK = 16 * 2**20


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "LOOK_EVERY", 0.02)


def age(bed: Bed, entry: str) -> None:
    """Have a model verified long ago, in the store of a daemon that is not there."""
    manifest = bed.store / "manifests" / f"{entry}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"verified_at": LONG_AGO}))


async def scrubbed(engine: Engine) -> JobStatus:
    """The first scrub, when it has ended."""

    def found() -> list[JobStatus]:
        return [job for job in engine.jobs() if job.kind == "scrub"]

    await until(found, bool)
    return await end_of(engine, found()[0])


async def aged(bed: Bed, **given: object) -> str:
    """A model that is due, made by a daemon that is gone; its entry."""
    async with bed.engine(scrub_days=0, **given) as engine:
        entry = (await ready(engine, "acme/m")).entry
    age(bed, entry)
    return entry


def test_what_was_not_read_for_long_is_read_back_once(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.repos["acme/new"] = repo({"config.json": b"{}"})

    async def test() -> None:
        entry = await aged(bed)
        async with bed.engine(scrub_bandwidth=10**12) as engine:
            await ready(engine, "acme/new")
            job = await scrubbed(engine)
            assert (job.state, job.entry, job.bad_files, job.progress.bytes_fetched) == (JobState.DONE, entry, (), 0)
            assert job.progress.bytes_done == job.progress.bytes_total == (await engine.model(entry)).bytes
            assert (await engine.model(entry)).checked_at
            assert (engine.counters.scrubs, engine.counters.scrub_failures) == (1, 0)
            assert engine.counters.scrubbed_bytes == job.progress.bytes_total
            assert [event.job for event in await engine.timeline(entry) if event.kind == "verified"] == [job.id]
        async with bed.engine(scrub_bandwidth=10**12) as engine:
            await ready(engine, "acme/new")
            await asyncio.sleep(20 * scrub.LOOK_EVERY)
            assert engine.counters.scrubbed_bytes == 0, "the result was kept"

    run(test())


def test_wrong_bytes_that_nobody_asked_about_are_withdrawn_and_mended(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        entry = await aged(bed)
        shown = bed.shown()
        flip(bed.store / "models" / entry.replace("@", "/") / "model.safetensors", CHUNK + 5)
        stall = bed.hub.faults.add("model.safetensors", Kind.STALL, times=None, after=1000)
        async with bed.engine(scrub_bandwidth=10**12, stall_timeout=30, fetch_deadline=60) as engine:
            await until(lambda: stall.hits, bool)
            bad = await engine.model(entry)
            assert bad.state in (ModelState.DEGRADED, ModelState.FETCHING)
            assert (bad.path, bad.hub_cache) == (None, None)
            assert bed.shown() == {}, "pods look at the views, not at the daemon"
            assert [path.name for path in bed.store.glob("quarantine/*") if path.suffix != ".note"]
            sent = bed.hub.bytes_sent("model.safetensors")
            bed.hub.faults.clear()
            stall.released.set()
            job = await scrubbed(engine)
            assert (job.state, job.bad_files, job.repaired_chunks) == (JobState.DONE, ("model.safetensors",), 1)
            assert bed.hub.bytes_sent("model.safetensors") - sent <= 2 * CHUNK
            assert (await engine.model(entry)).state is ModelState.READY
            assert bed.shown() == shown
            assert engine.counters.scrub_failures == 1
            told = [event.kind for event in await engine.timeline(entry)]
            assert told.index("withdrawn") < told.index("verified")

    run(test())


def test_it_goes_on_where_it_was(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece is read and noted, then the pause for the rest of it is longer than the daemon lives."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 5 * scrub_piece())})
    monkeypatch.setattr(scrub, "SAVE_EVERY", 0.0)

    async def test() -> None:
        entry = await aged(bed)
        state = bed.store / "state" / f"{entry}.json"
        async with bed.engine(scrub_bandwidth=1000, scrub_days=3650) as engine:
            await until(lambda: json.loads(state.read_text())["scrubbed"], bool)
            first = engine.counters.scrubbed_bytes
        assert json.loads(state.read_text())["scrubbed"] == first == scrub_piece()
        async with bed.engine(scrub_bandwidth=10**12, scrub_days=3650) as engine:
            job = await scrubbed(engine)
            assert job.state is JobState.DONE
            assert engine.counters.scrubbed_bytes == job.progress.bytes_total - first
            assert job.progress.bytes_done == job.progress.bytes_total
            assert json.loads(state.read_text())["scrubbed"] == 0

    run(test())


def scrub_piece() -> int:
    return 4 * CHUNK


@pytest.mark.parametrize("act", ["pin", "remove", "evict"])
def test_nobody_waits_for_a_slow_reading(bed: Bed, act: str) -> None:
    """At that rate it would take hours; the reading is no use of the model either, and ends by itself when the model goes."""
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            entry = (await ready(engine, "acme/m")).entry
            job = await engine.verify(entry, bandwidth=1000)
            await until(lambda: engine.counters.scrubbed_bytes, bool)
            match act:
                case "pin":
                    assert (await engine.pin(entry, pinned=True)).pinned
                    assert not engine.job(job.id).state.ended
                    await engine.cancel(job.id)
                case "remove":
                    assert (await engine.remove(entry)).state is ModelState.ABSENT
                case "evict":
                    told = await engine.evict(engine.space().limit - 1000, dry_run=True)
                    assert [victim["in_use"] for victim in told.victims] == [False]

    run(test())


def test_a_quick_verification_does_not_join_a_slow_one(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            slow = await engine.verify("acme/m", bandwidth=1000)
            quick = await end_of(engine, await engine.verify("acme/m"))
            assert (quick.state, engine.job(slow.id).state) == (JobState.DONE, JobState.VERIFYING)
            assert engine.models()[0].state is ModelState.READY

    run(test())


def test_a_reading_ends_when_a_look_up_finds_files_gone(bed: Bed) -> None:
    """The repair does not wait for it."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 2 * scrub_piece())})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            slow = await engine.verify("acme/m", bandwidth=1000)
            await until(lambda: engine.counters.scrubbed_bytes, bool)
            (Path(status.path) / "model.safetensors").unlink()
            while (await engine.model("acme/m")).state is ModelState.READY:
                await asyncio.sleep(0.02)
            await until(engine.models, lambda models: models[0].state is ModelState.READY)
            assert not engine.job(slow.id).state.ended
            await engine.cancel(slow.id)

    run(test())


def cached(path: Path) -> int:
    with path.open("rb") as file:
        states = resident(file.fileno(), 0, path.stat().st_size)
        assert states is not None
        return in_memory(states)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_the_page_cache_is_left_as_it_was(bed: Bed, direct: bool) -> None:
    """Half a file is in memory: that half stays, and the other does not come."""
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(direct_io=direct) as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            path = Path(status.path) / "model.safetensors"
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.read(SIZE // 2)
            before = cached(path)
            for bandwidth in (None, 10**12):
                job = await end_of(engine, await engine.verify("acme/m", bandwidth))
                assert job.state is JobState.DONE, job.error
                assert job.cached_before is not None
                assert job.cached_after is not None
                assert SIZE * 0.4 < job.cached_before < SIZE * 0.6
                assert abs(job.cached_after - job.cached_before) < SIZE * 0.02
                assert abs(cached(path) - before) < SIZE * 0.02

    run(test())
