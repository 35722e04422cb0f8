"""Keeping: resume, repair, withdrawal, leases, pins, declared models, a source that is down, an engine that is stopped."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nvcache.core import timeline
from nvcache.core.ref import EntryId
from nvcache.core.states import JobState, ModelState
from nvcache.engine import clock
from nvcache.engine.engine import Engine
from nvcache.engine.messages import Task
from nvcache.engine.status import JobStatus, ModelStatus
from nvcache.errors import Code, RequestError
from nvcache.settings import ModelSetting
from nvcache.store.catalog import EntryState
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


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_blob_that_is_gone_at_start_costs_neither_pin_nor_lease(bed: Bed, damage: str) -> None:
    source = bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m", pin=True)
            lease = await engine.lease("acme/m", "a pod", 600)
        blob = max(bed.store.glob("blobs/sha256/*/*"), key=lambda path: path.stat().st_size)
        if damage == "truncate":
            os.truncate(blob, 1000)
        else:
            blob.unlink()
        bed.hub.repos.clear()
        async with bed.engine() as engine:
            (seen,) = engine.models()
            assert (seen.entry, seen.state, seen.path, seen.pinned) == (status.entry, ModelState.DEGRADED, None, True)
            assert [held.lease for held in engine.leases()] == [lease.lease]
            assert not bed.shown()
            assert "withdrawn" in [event.kind for event in await engine.timeline(status.entry)]
        bed.hub.repos["acme/m"] = source
        async with bed.engine() as engine:
            await until(engine.models, lambda models: models[0].state is ModelState.READY)
            assert engine.models()[0].pinned
            assert bed.shown()[f"models/{status.entry.replace('@', '/')}/model.safetensors"] == weights(1, SIZE)

    run(test())


def test_who_shares_bad_bytes_is_mended_from_his_own_source(bed: Bed) -> None:
    bed.hub.repos["acme/gone"], bed.hub.repos["acme/here"] = repo(), repo({"model.safetensors": weights(1, SIZE), "notes.txt": b"mine"})

    async def test() -> None:
        async with bed.engine() as engine:
            gone, here = await ready(engine, "acme/gone"), await ready(engine, "acme/here")
            flip(Path(gone.path or "") / "model.safetensors", 20_000_000)
            del bed.hub.repos["acme/gone"]
            failed = await end_of(engine, await engine.verify("acme/gone"))
            assert failed.error is not None
            assert failed.error.code is Code.REPOSITORY_NOT_FOUND
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))  # what came for one is there for both
            for model in (gone, here):
                assert bed.shown()[f"models/{model.entry.replace('@', '/')}/model.safetensors"] == weights(1, SIZE)

    run(test())


def test_a_pin_of_what_a_name_means_now_is_none_of_what_it_meant_before(bed: Bed) -> None:
    source = bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 1000)})

    async def test() -> None:
        async with bed.engine() as engine:
            before = await ready(engine, "acme/m")
            source.push({"model.safetensors": weights(2, 1000)})
            now = await ready(engine, "acme/m", pin=True)
            assert {model.entry: model.pinned for model in engine.models()} == {before.entry: False, now.entry: True}
            await engine.pin(now.entry, False)
            bed.hub.faults.add("*", Kind.STATUS, times=None, origin="*", method="*", status=500)
            served = await engine.ensure(wish("acme/m", pin=True))
            assert isinstance(served, ModelStatus)
            assert (served.entry, served.pinned) == (now.entry, True), "what is served for want of a source is what is pinned"

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
            *_, failed, served = await engine.timeline("acme/m")
            assert (failed.kind, served.kind, served.job) == (timeline.Kind.FAILED, timeline.Kind.HIT, failed.job), (
                "nobody waited in vain, and the story says so"
            )
            pinned = await engine.ensure(wish(f"acme/m@{status.revision}"))
            assert isinstance(pinned, ModelStatus)
            assert pinned.note is None

    run(test())


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_makes_no_lease_last_for_years(bed: Bed, monkeypatch: pytest.MonkeyPatch, restarted: bool) -> None:
    """As at a boot, when the time is asked for after the daemon began."""
    bed.hub.repos["acme/m"] = repo({"config.json": b"{}"})
    ttl, years = 600.0, 10 * 365 * 86400.0

    async def end_by(engine: Engine) -> float:
        session = engine.session
        assert session is not None
        await session.leases.expire()
        (lease,) = engine.leases()
        return lease.expires.timestamp()

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            with monkeypatch.context() as patch:
                patch.setattr(clock, "unix", lambda: time.time() + years)
                await engine.lease("acme/m", "pod", ttl)
            if not restarted:
                assert time.time() < await end_by(engine) <= time.time() + ttl
        if restarted:
            async with bed.engine() as engine:
                assert time.time() < await end_by(engine) <= time.time() + ttl

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


def test_two_things_noted_of_a_model_at_once_are_both_kept(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification has read everything and is about to write so while the pin is being written."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100_000)})
    writing, go_on = threading.Event(), threading.Event()

    async def both(engine: Engine) -> bool:
        found = await engine.model("acme/m")
        return found.pinned and found.checked_at is not None

    async def test() -> None:
        was_read, read_on = asyncio.Event(), asyncio.Event()
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            assert engine.session is not None
            catalog, workers = engine.session.do.catalog, engine.session.do.workers
            write, work = catalog.write_state, workers.run

            def slow(entry: EntryId, state: EntryState) -> None:
                if not writing.is_set():
                    writing.set()
                    assert go_on.wait(30)
                write(entry, state)

            async def held_up(task: Task, **more: Any) -> dict[str, Any]:
                found = await work(task, **more)
                was_read.set()
                await read_on.wait()
                return found

            monkeypatch.setattr(catalog, "write_state", slow)
            monkeypatch.setattr(workers, "run", held_up)
            job = await engine.verify("acme/m")
            await was_read.wait()
            pinning = asyncio.create_task(engine.ensure(wish("acme/m", pin=True)))
            await until(writing.is_set, bool)
            read_on.set()
            await asyncio.sleep(0.2)  # the verification comes to what it has to write
            go_on.set()
            await pinning
            await end_of(engine, job)
            assert await both(engine)
        async with bed.engine() as engine:
            assert await both(engine)

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
            os.kill(engine.session.do.workers.pids()[0], signal.SIGKILL)
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
            assert engine.models() == []
            assert [each.state for each in engine.jobs()] == [JobState.CANCELLED], "who has its id still learns that"
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


def test_watchers_see_what_a_wish_changes_of_a_model_that_is_ready(bed: Bed) -> None:
    source = bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100_000)})

    async def test() -> None:
        async with bed.engine() as engine:
            entry = (await ready(engine, "acme/m")).entry
            async with engine.watch(entry) as queue, asyncio.timeout(5):
                while not (await queue.get()).pinned:  # type: ignore[union-attr]
                    if queue.empty():
                        assert (await engine.ensure(wish(f"acme/m@{source.commit}", pin=True))).state is ModelState.READY

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


@pytest.mark.parametrize("folder", ["manifests", "state"])
def test_what_the_disk_does_not_give_back_at_a_start_is_not_taken_for_gone(bed: Bed, folder: str) -> None:
    """A directory in the place of a file: it is there, and reading it fails."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100_000)})

    async def test() -> None:
        async with bed.engine() as engine:
            entry = (await ready(engine, "acme/m")).entry
            await engine.pin("acme/m", True)
            lease = await engine.lease("acme/m", "the pod", 3600.0)
        file = bed.store / folder / f"{entry}.json"
        file.rename(aside := bed.place / "aside")
        file.mkdir()
        async with bed.engine() as engine:
            if folder == "manifests":
                assert engine.models() == [], "what its bytes are nobody knows"
            else:
                assert (await engine.model("acme/m")).pinned, "for it may have been"
        file.rmdir()
        aside.rename(file)
        bed.hub.faults.add("*", Kind.STATUS, status=503, times=None)
        async with bed.engine() as engine:
            status = await engine.model("acme/m")
            assert (status.state, status.pinned) == (ModelState.READY, True)
            assert [each.lease for each in engine.leases()] == [lease.lease]

    run(test())
