"""What happens while a model is read, repaired, removed or given up: it is neither lost nor undone by what had begun before."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nvcache.core.plan import Priority
from nvcache.core.ref import parse_entry
from nvcache.core.space import Room
from nvcache.core.states import JobState, ModelState
from nvcache.core.timeline import Kind as Told
from nvcache.engine import persist
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeStatus
from nvcache.engine.kaito import Kaito
from nvcache.engine.messages import CheckTask
from nvcache.engine.shelf import Entry
from nvcache.engine.workers import Workers
from nvcache.errors import Code, DiskError
from tests.engine.conftest import Bed, DisksPart, end_of, ready, repo, run, until, weights
from tests.engine.test_keep import flip
from tests.engine.test_withdraw import open_on
from tests.support.faults import Kind

MB = 10**6
ONE, TWO = weights(1, 3 * MB), weights(2, 2 * MB)


class Gate:
    """Something that has come to a point is held there until it may go on."""

    def __init__(self) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.open.wait()


def entry_of(engine: Engine, name: str) -> Entry:
    assert engine.session is not None
    return engine.session.do.shelf.entries[parse_entry(name)]


def blob(bed: Bed, shown: str | None, file: str) -> Path:
    """The blob that a view's file is a link to."""
    found = Path(shown or "") / file
    return next(path for path in bed.store.glob("blobs/sha256/*/*") if path.samefile(found))


async def asked(engine: Engine, name: str, good: Callable[[], object]) -> None:
    """Ask for it, as pods do, until that is so."""
    while not good():
        await engine.model(name)
        await asyncio.sleep(0.05)


def gated_checks(monkeypatch: pytest.MonkeyPatch, gate: Callable[[CheckTask], Awaitable[None]]) -> None:
    """What workers found of a blob is told once `gate` has let it pass."""
    real = Workers.run

    async def run_(self: Workers, task: Any, **given: Any) -> dict[str, Any]:
        result = await real(self, task, **given)
        if isinstance(task, CheckTask):
            await gate(task)
        return result

    monkeypatch.setattr(Workers, "run", run_)


def test_what_breaks_while_its_repair_ends_is_repaired_as_well(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": ONE})

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            status, gate = await ready(engine, "acme/m"), Gate()
            path, do = blob(bed, status.path, "model.safetensors"), engine.session.do
            measure = do.ledger.measure

            async def held() -> Room:  # the repair has shown the model, and is not over
                if not gate.reached.is_set() and entry_of(engine, status.entry).broken is None:
                    await gate()
                return await measure()

            path.unlink()
            await asked(engine, status.entry, lambda: engine.counters.verify_failures)
            monkeypatch.setattr(do.ledger, "measure", held)
            await gate.reached.wait()
            failures = engine.counters.verify_failures
            path.unlink()
            await asked(engine, status.entry, lambda: engine.counters.verify_failures > failures)
            gate.open.set()
            await until(lambda: engine.counters.repairs, lambda repairs: repairs == 2)
            await until(lambda: engine.models()[0].state, lambda state: state is ModelState.READY)
            assert path.read_bytes() == ONE

    run(test())


def test_what_is_written_to_while_it_is_read_is_read_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo({"a.safetensors": ONE, "b.safetensors": TWO})

    async def test() -> None:
        async with bed.engine() as engine:
            status, gate = await ready(engine, "acme/m"), Gate()
            entry, path = entry_of(engine, status.entry), blob(bed, status.path, "a.safetensors")
            await asked(engine, status.entry, lambda: entry.stamps)

            async def was_read(task: CheckTask) -> None:
                if task.path == str(path):
                    await gate()

            gated_checks(monkeypatch, was_read)
            job = await engine.verify(status.entry)
            await gate.reached.wait()
            flip(path, MB)
            await asked(engine, status.entry, lambda: entry.doubts)
            gate.open.set()
            ended = await end_of(engine, job)
            assert (ended.state, ended.bad_files) == (JobState.DONE, ("a.safetensors",))
            assert path.read_bytes() == ONE

    run(test())


def test_a_doubt_outlives_a_reading_that_failed(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persist, "RETRY_FIRST", 0.2)
    monkeypatch.setitem(persist.persist.__kwdefaults__, "refused", 0.2)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": ONE})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            entry, path, failed = entry_of(engine, status.entry), blob(bed, status.path, "model.safetensors"), []
            await asked(engine, status.entry, lambda: entry.stamps)

            async def fails(task: CheckTask) -> None:
                if not failed:
                    failed.append(task)
                    raise DiskError(Code.DISK_IO, "cannot read it just now")

            gated_checks(monkeypatch, fails)
            flip(path, MB)
            await asked(engine, status.entry, lambda: engine.counters.repairs)
            assert failed
            assert path.read_bytes() == ONE

    run(test())


def test_a_cancelled_repair_is_tried_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(persist.persist.__kwdefaults__, "refused", 0.2)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": ONE})

    async def test() -> None:
        async with bed.engine(stall_timeout=30, fetch_deadline=60) as engine:
            status = await ready(engine, "acme/m")
            stall = bed.hub.faults.add("model.safetensors", Kind.STALL, times=1, after=1000)
            blob(bed, status.path, "model.safetensors").unlink()
            await asked(engine, status.entry, lambda: stall.hits)
            (job,) = [job for job in engine.jobs() if not job.state.ended]
            assert (await engine.cancel(job.id)).state is JobState.CANCELLED
            await until(lambda: engine.counters.repairs, bool)
            assert (await engine.model(status.entry)).path == status.path

    run(test())


def test_what_is_to_be_read_first_is_not_shown_by_the_repair_of_another(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lost a blob while no daemon ran, and the second has wrong bytes in another."""
    bed.hub.repos |= {
        "acme/a": repo({"model.safetensors": ONE, "config.json": b"{1}"}),
        "acme/b": repo({"model.safetensors": ONE, "more.safetensors": TWO, "config.json": b"{2}"}),
    }

    async def test() -> None:
        async with bed.engine() as engine:
            a, b = await ready(engine, "acme/a"), await ready(engine, "acme/b")
        flip(blob(bed, b.path, "more.safetensors"), MB)
        blob(bed, a.path, "model.safetensors").unlink()
        gate = Gate()

        async def was_read(task: CheckTask) -> None:
            if task.size == len(TWO):
                await gate()

        gated_checks(monkeypatch, was_read)
        async with bed.engine() as engine:
            await until(lambda: entry_of(engine, a.entry).broken, lambda broken: broken is None)
            await gate.reached.wait()
            for _ in range(20):
                assert (await engine.model(b.entry)).path is None
                await asyncio.sleep(0.02)
            gate.open.set()
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))
            assert (Path(b.path or "") / "more.safetensors").read_bytes() == TWO

    run(test())


def test_what_one_repair_has_made_anew_another_does_not_condemn(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the same blob gone, and the second gets to it when the first is done."""
    bed.hub.repos |= {"acme/a": repo({"model.safetensors": ONE}), "acme/b": repo({"model.safetensors": ONE, "config.json": b"{2}"})}

    async def test() -> None:
        async with bed.engine() as engine:
            a, b = await ready(engine, "acme/a"), await ready(engine, "acme/b")
        path = blob(bed, a.path, "model.safetensors")
        path.unlink()
        gate, calls, real = Gate(), [], Kaito.settle

        async def held(self: Kaito) -> None:
            entries = self._shelf.entries.values()
            if not gate.reached.is_set() and entries and all(entry.broken for entry in entries):
                calls.append(self)
                if len(calls) == 3:  # after one at the start and one for the first that is taken out
                    await gate()
            await real(self)

        monkeypatch.setattr(Kaito, "settle", held)
        async with bed.engine() as engine:
            await gate.reached.wait()
            await until(engine.models, lambda models: any(model.state is ModelState.READY for model in models))
            (first,) = (model for model in engine.models() if model.state is ModelState.READY)
            facts = path.stat()
            gate.open.set()
            await until(engine.models, lambda models: all(model.state is ModelState.READY for model in models))
            assert path.stat().st_ino == facts.st_ino
            assert {first.entry} < {a.entry, b.entry}
            assert all((Path(model.path or "") / "model.safetensors").read_bytes() == ONE for model in (a, b))
            assert engine.session is not None
            told = await engine.session.do.timeline.of(parse_entry(first.entry).slug)
            assert [event.kind for event in told].count(Told.WITHDRAWN) <= 2, "at the start, and when it was read"

    run(test())


def test_a_model_that_is_being_removed_is_not_shown_by_the_repair_of_another(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos |= {"acme/a": repo({"model.safetensors": ONE}), "acme/b": repo({"model.safetensors": ONE, "config.json": b"{2}"})}

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            a, b = await ready(engine, "acme/a"), await ready(engine, "acme/b")
            down = bed.hub.faults.add("*", Kind.STATUS, status=404, times=None, origin="*")
            blob(bed, a.path, "model.safetensors").unlink()
            assert (await end_of(engine, await engine.verify(b.entry))).state is JobState.FAILED
            await until(engine.models, lambda models: {model.state for model in models} == {ModelState.DEGRADED})
            await until(engine.jobs, lambda jobs: all(job.state.ended for job in jobs))
            assert down.hits
            bed.hub.faults.clear()
            gate, shelf, settle = Gate(), engine.session.do.shelf, engine.session.do.kaito.settle

            async def held() -> None:  # the removal has begun
                if entry.removing and not gate.reached.is_set():
                    shutil.rmtree(b.path or "", ignore_errors=True)
                    await gate()
                await settle()

            entry = entry_of(engine, b.entry)
            monkeypatch.setattr(engine.session.do.kaito, "settle", held)
            removal = asyncio.create_task(engine.remove(b.entry))
            await gate.reached.wait()
            assert (await end_of(engine, await engine.verify(a.entry))).state is JobState.DONE
            assert not Path(b.path or "").exists()
            gate.open.set()
            assert (await removal).state is ModelState.ABSENT
            assert parse_entry(b.entry) not in shelf.entries
            assert not Path(b.path or "").exists()

    run(test())


def test_a_scrub_stays_behind_all_other_work(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo({"a.safetensors": ONE, "b.safetensors": TWO})
    asked_with: list[Priority] = []
    real = Workers.run

    async def run_(self: Workers, task: Any, **given: Any) -> dict[str, Any]:
        if isinstance(task, CheckTask):
            assert engine.session is not None
            job.priority = Priority.DEMAND
            asked_with.append(given["priority"]())
        return await real(self, task, **given)

    async def test() -> None:
        nonlocal engine, job
        async with bed.engine() as running:
            assert running.session is not None
            engine, status = running, await ready(running, "acme/m")
            job = running.session.mender.scrub(parse_entry(status.entry), 10**9, 1.0)
            monkeypatch.setattr(Workers, "run", run_)
            await until(lambda: job.state, lambda state: state.ended)
            assert set(asked_with) == {Priority.SCRUB}

    engine: Engine
    job: Any
    run(test())


def test_what_is_removed_between_two_tries_of_its_refill_does_not_come_back(
    bed: Bed, disks: DisksPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persist, "RETRY_FIRST", 0.5)
    bed.hub.repos |= {"acme/a": repo({"model.safetensors": ONE}), "acme/b": repo({"model.safetensors": TWO})}

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(tmp_path / "a" / "store", "uuid-a")
            await open_on(engine)
            a, b = await ready(engine, "acme/a"), await ready(engine, "acme/b")
            bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*")
            disks.say(StripeStatus.LOST)
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            await until(engine.models, lambda models: [model.state for model in models] == [ModelState.FAILED] * 2)
            await engine.remove(a.entry)
            bed.hub.faults.clear()
            await until(engine.models, lambda models: [model.entry for model in models if model.state is ModelState.READY] == [b.entry])
            await asyncio.sleep(1)  # more than the pause
            assert [model.entry for model in engine.models()] == [b.entry]
            assert not [job for job in engine.jobs() if job.entry == a.entry and not job.state.ended]

    run(test())
