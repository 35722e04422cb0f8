"""Bytes that went bad, in every way: served to nobody from then on, quarantined, fetched anew only where they are bad, and back by itself."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvcache.api.metrics import registry, render
from nvcache.core.states import JobState, ModelState
from nvcache.engine import lookup, persist, scrub, session
from nvcache.engine.engine import Engine
from nvcache.engine.messages import AdoptTask
from nvcache.engine.repair import Repairer
from nvcache.engine.status import ModelStatus
from nvcache.engine.workers import Workers
from nvcache.errors import Code, DiskError
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.engine.test_keep import flip
from tests.support.faults import Kind

MB = 10**6
CHUNK = 16 * 2**20
SIZE = 2 * CHUNK + MB  # three chunks
GOOD = weights(1, SIZE)


def truncate(blob: Path) -> None:
    """Lose the last two chunks."""
    blob.chmod(0o644)
    os.truncate(blob, CHUNK)


def directory(blob: Path) -> None:
    """Have something in its place that cannot be read at all."""
    blob.unlink()
    blob.mkdir()


# how → what does it, how many chunks are told as bad, and how many are lost
WAYS: dict[str, tuple[Callable[[Path], None], int, int]] = {
    "flipped": (lambda blob: flip(blob, CHUNK + 7), 1, 1),
    "truncated": (truncate, 3, 2),
    "unlinked": (Path.unlink, 3, 3),
    "replaced": (directory, 3, 3),
}


def blob_of(bed: Bed) -> Path:
    sha256 = hashlib.sha256(GOOD).hexdigest()
    return bed.store / "blobs" / "sha256" / sha256[:2] / sha256


def states(engine: Engine) -> dict[str, float]:
    """`nvcache_models`, as a scraper reads it: those that are not 0."""
    lines = (line for line in render(registry(engine)).decode().splitlines() if line.startswith("nvcache_models{"))
    told = {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}
    return {state: count for state, count in told.items() if count}


def withdrawn(status: ModelStatus) -> bool:
    return status.state in (ModelState.DEGRADED, ModelState.FETCHING)


@pytest.mark.parametrize(
    ("how", "bandwidth"), [("flipped", 10**12), ("unlinked", 10**12), *((how, None) for how in WAYS)], ids=lambda value: str(value or "")
)
def test_what_went_bad(bed: Bed, how: str, bandwidth: int | None) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD, "config.json": b"{}"})
    bed.hub.repos["acme/twin"] = repo({"model.safetensors": GOOD, "other.json": b"{}"})
    bed.hub.repos["acme/apart"] = repo({"config.json": b"{1}"})
    damage, chunks, lost = WAYS[how]

    async def test() -> None:
        async with bed.engine(stall_timeout=30, fetch_deadline=60) as engine:
            names = [(await ready(engine, f"acme/{name}")).entry for name in ("m", "twin", "apart")]
            shown = bed.shown()
            blob = blob_of(bed)
            damage(blob)
            stall = bed.hub.faults.add("model.safetensors", Kind.STALL, times=None, after=1000)
            before = bed.hub.bytes_sent("model.safetensors")
            job = await engine.verify("acme/m", bandwidth)
            await until(lambda: stall.hits or engine.job(job.id).state.ended, bool)
            assert not engine.job(job.id).state.ended, engine.job(job.id).error
            bad = [await engine.model(name) for name in names]
            assert [withdrawn(status) for status in bad] == [True, True, False], "also the one that shares the bytes, and no other"
            assert [status.path is None and status.hub_cache is None for status in bad] == [True, True, False]
            assert {path.split("/")[1].removeprefix("models--").removeprefix("hf--") for path in bed.shown()} == {"acme--apart"}
            assert sum(count for state, count in states(engine).items() if state != "ready") == 2
            assert (states(engine)["ready"], engine.degraded()) == (1, 2)
            if how != "unlinked":
                assert (bed.store / "quarantine" / blob.name).exists()
            assert not blob.exists()
            bed.hub.faults.clear()
            stall.released.set()
            ended = await end_of(engine, job)
            assert (ended.state, ended.bad_files, ended.repaired_chunks) == (JobState.DONE, ("model.safetensors",), chunks), ended.error
            sent = bed.hub.bytes_sent("model.safetensors") - before
            assert ended.progress.bytes_fetched <= min(lost * CHUNK, len(GOOD))
            assert sent <= ended.progress.bytes_fetched + 2 * CHUNK, "and what the stalled requests had sent"
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))
            assert bed.shown() == shown
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name

    run(test())


def test_what_nobody_asks_for_is_looked_at_as_well(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list asks for no model; the second one here is never asked for at all."""
    monkeypatch.setattr(session, "MEASURE_EVERY", 0.1)
    bed.hub.repos["acme/other"] = repo({"model.safetensors": weights(5, MB)})
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/other")
            await ready(engine, "acme/m")
            bed.hub.faults.add("*", Kind.STATUS, status=503, times=None)
            blob_of(bed).unlink()
            await until(
                lambda: {each.entry.split("@")[0]: each.state for each in engine.models()}, lambda found: found["hf--acme--m"] is not ModelState.READY
            )
            assert states(engine) == {"ready": 1.0, "degraded": 1.0}
            bed.hub.faults.clear()

    run(test())


def test_files_that_somebody_wrote_to_are_read_at_once(bed: Bed) -> None:
    """Nobody asks for a verification: a look-up sees that the time of the last write is another."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert (await engine.model("acme/m")).state is ModelState.READY
            flip(blob_of(bed), 7)
            while not (jobs := [job for job in engine.jobs() if job.kind == "verify"]):
                await engine.model("acme/m")
                await asyncio.sleep(0.02)
            ended = await end_of(engine, jobs[0])
            assert (ended.state, ended.repaired_chunks) == (JobState.DONE, 1), ended.error
            assert bed.shown()[f"models/{status.entry.replace('@', '/')}/model.safetensors"] == GOOD
            for _ in range(2):
                await asyncio.sleep(lookup.CHECK_EVERY)
                assert (await engine.model("acme/m")).state is ModelState.READY
            assert len(engine.jobs()) == 2, "a file that was made anew is not doubted"

    run(test())


def test_a_revision_that_its_source_no_longer_has(bed: Bed) -> None:
    """It says so, and stays withdrawn: what the name means by now are other bytes."""
    source = bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})
    bed.hub.repos["acme/apart"] = repo({"config.json": b"{1}"})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            other = await ready(engine, "acme/apart")
            flip(blob_of(bed), 5)
            source.push({"model.safetensors": weights(2, SIZE)})
            del source.commits[status.revision]
            job = await end_of(engine, await engine.verify(status.entry))
            assert job.state is JobState.FAILED
            assert job.error is not None
            assert job.error.code is Code.REVISION_NOT_FOUND
            now = await engine.model(status.entry)
            assert (now.state, now.path) == (ModelState.DEGRADED, None)
            assert now.error is not None
            assert (await engine.model(other.entry)).path == other.path
        async with bed.engine() as engine:
            seen = await until(lambda: [job for job in engine.jobs() if job.kind == "repair" and job.state.ended], bool)
            assert seen[0].error is not None
            assert seen[0].error.code is Code.REVISION_NOT_FOUND
            assert {model.entry: model.state for model in engine.models()} == {status.entry: ModelState.DEGRADED, other.entry: ModelState.READY}
            assert not [path for path in bed.shown() if "acme--m" in path]

    run(test())


@pytest.mark.parametrize("how", ["mended when asked for", "removed and fetched anew"])
def test_what_breaks_again_is_mended_at_once(bed: Bed, how: str) -> None:
    """Although the repair was put off for minutes when it failed, before somebody else brought the model back."""
    source = bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            flip(blob_of(bed), 5)
            here = source.commits.pop(status.revision)
            assert (await end_of(engine, await engine.verify(status.entry))).state is JobState.FAILED
            await until(lambda: [job for job in engine.jobs() if job.kind == "repair" and job.state is JobState.FAILED], bool)
            source.commits[status.revision] = here
            if how == "mended when asked for":
                assert (await end_of(engine, await engine.verify(status.entry))).state is JobState.DONE
            else:
                await engine.remove(status.entry)
                await ready(engine, "acme/m")
            repairs = engine.counters.repairs
            blob_of(bed).unlink()
            while engine.counters.repairs == repairs:
                await engine.model(status.entry)
                await asyncio.sleep(0.05)
            assert (await engine.model(status.entry)).path == status.path
            assert blob_of(bed).read_bytes() == GOOD

    run(test())


def test_a_source_that_is_down(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is ready is served, what is bad waits with back-off and comes back by itself, and nothing else waits with it."""
    monkeypatch.setattr(persist, "RETRY_FIRST", 0.2)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})
    bed.hub.repos["acme/apart"] = repo({"config.json": b"{1}"})

    async def test() -> None:
        async with bed.engine() as engine:
            status, other = await ready(engine, "acme/m"), await ready(engine, "acme/apart")
            flip(blob_of(bed), CHUNK + 7)
            down = bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*")
            assert (await end_of(engine, await engine.verify(status.entry))).state is JobState.FAILED
            hits = down.hits
            await until(lambda: len([job for job in engine.jobs() if job.kind == "repair" and job.state.ended]) >= 2, bool)
            assert down.hits > hits, "it is asked again and again"
            asked = await engine.ensure(wish("acme/apart"))
            assert isinstance(asked, ModelStatus)
            assert (asked.state, asked.path) == (ModelState.READY, other.path)
            held = await engine.lease(other.entry, "pod", 60)
            await engine.release(other.entry, held.lease)
            assert withdrawn(await engine.model(status.entry))
            bed.hub.faults.clear()
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))
            assert (await engine.model(status.entry)).path == status.path

    run(test())


def test_what_reads_wrong_once_and_right_after_is_not_thrown_away(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow reading that finds something wrong believes it only when it is still so with nobody else at the files."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            before = bed.hub.bytes_sent()
            blob = blob_of(bed)
            flip(blob, 7)
            looks_wrong = scrub._looks_wrong

            async def put_right(*given: object) -> bool:
                wrong: bool = await looks_wrong(*given)  # type: ignore[arg-type]
                flip(blob, 7)
                return wrong

            monkeypatch.setattr(scrub, "_looks_wrong", put_right)
            job = await end_of(engine, await engine.verify(status.entry, bandwidth=10**12))
            assert (job.state, job.bad_files) == (JobState.DONE, ())
            assert (await engine.model(status.entry)).state is ModelState.READY
            assert bed.hub.bytes_sent() == before

    run(test())


def test_another_file_in_place_of_a_blob_is_read_before_it_is_shown(bed: Bed) -> None:
    """It has the size and the time of the last write: only that it is another file is seen."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            assert (await engine.model("acme/m")).state is ModelState.READY
            shown, blob = bed.shown(), blob_of(bed)
            other = bed.place / "other"
            shutil.copy2(blob, other)
            flip(other, 7)
            os.utime(other, ns=(0, 0))
            other.rename(blob)
            await asyncio.sleep(lookup.CHECK_EVERY)
            while (await engine.model("acme/m")).state is ModelState.READY:
                await asyncio.sleep(0.02)
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))
            assert bed.shown() == shown

    run(test())


def test_a_model_that_fills_the_cache_is_mended_all_the_same(bed: Bed) -> None:
    """There is no room for a bad file and the one that takes its place: the bad one goes, and all of it is fetched."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    async def test() -> None:
        async with bed.engine(max_bytes=len(GOOD) + MB) as engine:
            await ready(engine, "acme/m", pin=True)
            flip(blob_of(bed), 7)
            ended = await end_of(engine, await engine.verify("acme/m"))
            assert ended.error is None, ended.error
            assert (await engine.model("acme/m")).state is ModelState.READY
            assert GOOD in bed.shown().values()

    run(test())


def test_good_chunks_of_a_bad_file_are_kept_while_room_is_made(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})
    seed = Repairer._seed

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            before = bed.hub.bytes_sent("model.safetensors")

            async def tidied(self: Repairer, *args: Any, **given: Any) -> None:
                await seed(self, *args, **given)
                assert engine.session is not None
                await engine.session.do.ledger.tidy()

            monkeypatch.setattr(Repairer, "_seed", tidied)
            flip(blob_of(bed), 7)
            assert (await end_of(engine, await engine.verify("acme/m"))).error is None
            assert bed.hub.bytes_sent("model.safetensors") - before <= CHUNK

    run(test())


def test_a_blob_that_lies_here_and_cannot_be_read_is_fetched(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody vouches for it, so it is read before it is believed; a disk that fails that read would fail it for ever."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})
    work = Workers.run
    failing = DiskError(Code.DISK_IO, "cannot read it: Input/output error", facts={"errno": "EIO"})

    async def unreadable(self: Workers, task: Any, **given: Any) -> Any:
        if isinstance(task, AdoptTask):
            raise failing
        return await work(self, task, **given)

    async def test() -> None:
        async with bed.engine() as engine:
            blob_of(bed).write_bytes(bytes(len(GOOD)))
            monkeypatch.setattr(Workers, "run", unreadable)
            status = await ready(engine, "acme/m")
            assert bed.shown()[f"models/{status.entry.replace('@', '/')}/model.safetensors"] == GOOD
            assert (bed.store / "quarantine" / blob_of(bed).name).exists()

    run(test())


def test_a_removal_that_failed_is_told_while_the_repair_waits_for_its_next_try(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})
    monkeypatch.setattr(persist, "RETRY_FIRST", 300.0)
    go_on = threading.Event()

    def fails(*_: object) -> None:
        assert go_on.wait(30)
        raise DiskError(Code.DISK_IO, "cannot remove it: Input/output error", facts={"errno": "EIO"})

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            entry = (await ready(engine, "acme/m")).entry
            bed.hub.faults.add("*", Kind.STATUS, status=503, times=None)
            blob_of(bed).unlink()
            await engine.look()
            await until(engine.jobs, lambda jobs: any(job.kind == "repair" and job.state is JobState.FAILED for job in jobs))
            monkeypatch.setattr(engine.session.do.catalog, "remove_state", fails)
            async with engine.watch(entry) as told, asyncio.timeout(10):
                removing = asyncio.create_task(engine.remove(entry))
                while (await told.get()).state is not ModelState.EVICTING:  # type: ignore[union-attr]
                    pass
                go_on.set()
                with pytest.raises(DiskError):
                    await removing
                assert (await told.get()).state is ModelState.DEGRADED  # type: ignore[union-attr]

    run(test())


def test_a_removal_that_failed_half_way_takes_nothing_from_the_model(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back, and may be pinned since: the next start must find it as well."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": GOOD})

    def fails(*_: object) -> None:
        raise DiskError(Code.DISK_IO, "cannot remove it: Input/output error", facts={"errno": "EIO"})

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            status = await ready(engine, "acme/m")
            with monkeypatch.context() as broken:
                broken.setattr(engine.session.do.catalog, "remove_state", fails)
                with pytest.raises(DiskError):
                    await engine.remove(status.entry)
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))
            await engine.pin("acme/m", True)
        async with bed.engine() as engine:
            again = await engine.model("acme/m")
            assert (again.state, again.pinned) == (ModelState.READY, True)

    run(test())
