"""Keeping: resume, repair, withdrawal, leases, pins, declared models, a source that is down, an engine that is stopped."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import time
from pathlib import Path

import pytest

from nvcache.core.states import JobState, ModelState
from nvcache.engine.status import JobStatus, ModelStatus
from nvcache.errors import Code, RequestError
from nvcache.settings import ModelSetting
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind

SIZE = 40_000_000


def test_an_interrupted_fill_goes_on_by_itself_on_its_revision(bed: Bed) -> None:
    source = bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("model.safetensors", Kind.TRICKLE, times=None, after=2**20, seconds=0.02)

    async def test() -> None:
        async with bed.engine(lanes=1) as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: engine.job(job.id).progress.bytes_fetched, bool)
            pinned = source.commit
        assert bed.shown() == {}
        source.push({"model.safetensors": weights(3, SIZE)})
        bed.hub.faults.clear()
        async with bed.engine(lanes=1) as engine:
            name = f"hf--acme--m@{pinned}"
            await until(lambda: [model for model in engine.models() if model.entry == name and model.state is ModelState.READY], bool)
            assert not list(bed.store.glob("ingest/plans/*")), "the plan is done"
            assert not list(bed.store.glob("ingest/receipts/*"))
            assert {path.name for path in bed.store.glob("ingest/*")} == {"plans", "receipts"}

    run(test())


def flip(path: Path, at: int) -> None:
    """Damage one byte of a file behind its back."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_finds_and_repairs_just_the_bad_chunk(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            fine = await end_of(engine, await engine.verify("acme/m"))
            assert (fine.state, fine.bad_files) == (JobState.DONE, ())
            damaged = Path(status.path) / "model.safetensors"
            with damaged.open("rb") as mapped:  # a pod that has it open keeps what it had: the inode is never written again
                inode = os.fstat(mapped.fileno()).st_ino
                flip(damaged, 20_000_000)
                before = len(bed.hub.requests)
                job = await end_of(engine, await engine.verify("acme/m"))
                assert job.state is JobState.DONE, job.error
                assert (job.repaired_chunks, job.bad_files) == (1, ("model.safetensors",))
                assert damaged.stat().st_ino != inode
            asked = [request.range for request in bed.hub.requests[before:] if request.range]
            assert set(asked) == {"bytes=16777216-33554431"}
            assert bed.shown()[f"models/{status.entry.replace('@', '/')}/model.safetensors"] == weights(1, SIZE)
            again = await engine.model("acme/m")
            assert (again.state, again.bytes) == (ModelState.READY, status.bytes)
            assert list(bed.store.glob("quarantine/*.note"))

    run(test())


def test_a_bad_model_is_withdrawn_while_its_source_is_down(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = source = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            flip(Path(status.path) / "model.safetensors", 5_000_000)
            del bed.hub.repos["acme/m"]
            job = await end_of(engine, await engine.verify("acme/m"))
            assert job.state is JobState.FAILED
            assert bed.shown() == {}
            seen = await engine.model("acme/m")
            assert (seen.state, seen.path) == (ModelState.DEGRADED, None)
            with pytest.raises(RequestError) as refused:
                await engine.lease("acme/m", "pod", 60)
            assert refused.value.code is Code.NOT_READY
            asked = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert asked.state is JobState.FAILED
        bed.hub.repos["acme/m"] = source
        before = bed.hub.bytes_sent("model.safetensors")
        async with bed.engine() as engine:
            await until(lambda: [model for model in engine.models() if model.state is ModelState.READY], bool)
            assert bed.hub.bytes_sent("model.safetensors") - before == 2**24
            assert bed.shown()[f"models/{status.entry.replace('@', '/')}/model.safetensors"] == weights(1, SIZE)

    run(test())


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_look_up_notices_a_blob_that_is_gone(bed: Bed, damage: str) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            blob = max(bed.store.glob("blobs/sha256/*/*"), key=lambda path: path.stat().st_size)
            if damage == "truncate":
                blob.chmod(0o644)
                os.truncate(blob, 1000)
            else:
                blob.unlink()
                (Path(status.path) / "model.safetensors").unlink()
            while (seen := await engine.model("acme/m")).state is ModelState.READY:
                await asyncio.sleep(0.02)
            assert seen.state is ModelState.DEGRADED
            assert seen.path is None
            await until(engine.models, lambda models: models[0].state is ModelState.READY)
            assert bed.shown()[f"models/{status.entry.replace('@', '/')}/model.safetensors"] == weights(1, SIZE)

    run(test())


def test_a_source_that_is_down_takes_nothing_away(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
        async with bed.engine(hf_endpoint="http://127.0.0.1:9") as engine:
            answer = await engine.ensure(wish("acme/m"))
            assert isinstance(answer, ModelStatus)
            assert (answer.state, answer.path) == (ModelState.READY, status.path)
            assert answer.note
            pinned = await engine.ensure(wish(f"acme/m@{status.revision}"))
            assert isinstance(pinned, ModelStatus)
            assert pinned.note is None

    run(test())


def test_leases_and_pins_hold(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100_000)})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m", pin=True)
            with pytest.raises(RequestError) as pinned:
                await engine.remove("acme/m")
            assert pinned.value.code is Code.PINNED
            await engine.pin("acme/m", pinned=False)
            held = await engine.lease("acme/m", "pod a", 60)
        async with bed.engine() as engine:
            with pytest.raises(RequestError) as leased:
                await engine.remove("acme/m")
            assert leased.value.code is Code.LEASED
            assert "pod a" in str(leased.value)
            renewed = await engine.renew("acme/m", held.lease, 600)
            assert renewed.expires > held.expires
            await engine.release("acme/m", held.lease)
            with pytest.raises(RequestError) as unknown:
                await engine.renew("acme/m", held.lease, 600)
            assert unknown.value.code is Code.UNKNOWN_LEASE
            gone = await engine.remove(status.entry)
            assert gone.state is ModelState.ABSENT
            assert bed.shown() == {}
            assert not list(bed.store.glob("blobs/sha256/*/*"))

    run(test())


def test_a_model_that_is_mapped_is_not_removed(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100_000)})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            with (Path(status.path) / "model.safetensors").open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            with mapped, pytest.raises(RequestError) as refused:
                await engine.remove("acme/m")
            assert refused.value.code is Code.IN_USE
            await engine.remove("acme/m")

    run(test())


def test_declared_models_are_made_ready_and_pinned(bed: Bed) -> None:
    bed.hub.repos["acme/a"] = repo({"model.safetensors": weights(1, 100_000)})
    bed.hub.repos["acme/b"] = repo({"model.safetensors": weights(2, 100_000)})

    async def test() -> None:
        declared = (ModelSetting(ref="acme/a", pin=True), ModelSetting(ref="acme/b", revision="main"), ModelSetting(ref="acme/none"))
        async with bed.engine(models=declared) as engine:
            found = await until(engine.models, lambda models: sum(model.state is ModelState.READY for model in models) == 2)
            assert {model.hub_id: model.pinned for model in found if model.state is ModelState.READY} == {"acme/a": True, "acme/b": False}

    run(test())


def test_a_worker_that_dies_is_replaced(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("model.safetensors", Kind.TRICKLE, times=None, after=2**20, seconds=0.02)

    async def test() -> None:
        async with bed.engine(lanes=1) as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: engine.job(job.id).progress.bytes_fetched, bool)
            os.kill(engine._do.workers.pids()[0], signal.SIGKILL)
            bed.hub.faults.clear()
            ended = await end_of(engine, job)
            assert ended.state is JobState.DONE, ended.error
            assert bed.hub.bytes_sent("model.safetensors") < 2 * SIZE

    run(test())


def test_cancelling_a_stalled_fetch_is_quick_and_final(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    stall = bed.hub.faults.add("model.safetensors", Kind.STALL, times=None, after=1000)

    async def test() -> None:
        async with bed.engine(stall_timeout=30, fetch_deadline=300) as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: stall.hits, bool)
            ended = await engine.cancel(job.id)
            assert ended.state is JobState.CANCELLED
            stall.released.set()
            assert await until(lambda: engine.space().used, bool)
            gone = await engine.remove("acme/m")
            assert gone.state is ModelState.ABSENT
            assert engine.space().used == 0
            assert engine.jobs() == []
        async with bed.engine() as engine:
            assert engine.models() == []

    run(test())


def test_stopping_with_a_stalled_fetch_is_bounded(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    stall = bed.hub.faults.add("model.safetensors", Kind.STALL, times=None, after=1000)

    async def test() -> None:
        async with bed.engine(stall_timeout=30, fetch_deadline=300) as engine:
            await engine.ensure(wish("acme/m"))
            await until(lambda: stall.hits, bool)
            began = time.monotonic()
        assert time.monotonic() - began < 10  # the promise of SIGTERM

    run(test())


def test_watchers_see_the_fill_and_its_end(bed: Bed) -> None:
    source = bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("model.safetensors", Kind.TRICKLE, times=None, after=2**20, seconds=0.02)

    async def test() -> None:
        async with bed.engine(lanes=1) as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: engine.job(job.id).entry, bool)
            seen: list[ModelStatus] = []
            async with engine.watch(f"hf--acme--m@{source.commit}") as queue:
                while not seen or seen[-1].state is not ModelState.READY:
                    status = await queue.get()
                    assert status is not None
                    seen.append(status)
            done = [status.progress.bytes_done for status in seen if status.progress]
            assert done == sorted(done)
            assert any(0 < count < SIZE for count in done)

    run(test())


def test_a_directory_is_a_source(bed: Bed, tmp_path: Path) -> None:
    place = tmp_path / "weights"
    (place / "sub").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(weights(1, 20_000_000))
    (place / "sub" / "config.json").write_bytes(b"{}")

    async def test() -> None:
        async with bed.engine() as engine:
            first = await ready(engine, f"file://{place}", alias="acme/alias")
            manifest = engine.manifest(first.entry)
            assert manifest is not None
            assert {file.check for file in manifest.files} == {"first-use"}
            assert (bed.store / "hub/models--acme--alias/refs/main").exists()
            assert first.hub_id == "acme/alias"
            assert isinstance(await engine.ensure(wish(f"file://{place}")), ModelStatus)
            (place / "sub" / "config.json").write_bytes(b'{"new": 1}')
            second = await ready(engine, f"file://{place}")
            assert second.entry != first.entry
            bed.hub.repos["acme/alias"] = repo()
            with pytest.raises(RequestError) as taken:
                await engine.ensure(wish(f"file://{place / 'sub'}", alias="acme/alias"))
            assert taken.value.code is Code.ALIAS_CONFLICT

    run(test())
