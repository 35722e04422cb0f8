"""Leases live on the disk and by the clock: a restart gives them time, their end lets go, and what a process reads is known without one."""

from __future__ import annotations

import asyncio
import mmap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nvcache.core.timeline import Kind
from nvcache.engine import clock, session
from nvcache.engine.leases import GRACE
from nvcache.errors import Code, DiskError, RequestError
from nvcache.store.catalog import Catalog
from tests.engine.conftest import Bed, ready, repo, run, until, weights

SIZE = 100_000


def stock(bed: Bed, *names: str) -> None:
    for seed, name in enumerate(names):
        bed.hub.repos[f"acme/{name}"] = repo({"model.safetensors": weights(seed, SIZE)})


@pytest.mark.parametrize("ttl", [5.0, 3600.0])
def test_after_a_restart_every_lease_has_time_enough_to_be_renewed(bed: Bed, monkeypatch: pytest.MonkeyPatch, ttl: float) -> None:
    """Also one that ran out while no daemon ran; and none is made shorter."""
    stock(bed, "m")
    away = 600.0

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            held = await engine.lease("acme/m", "the pod", ttl)
        began = time.time() + away
        monkeypatch.setattr(clock, "unix", lambda: time.time() + away)
        async with bed.engine() as engine:
            (again,) = engine.leases()
            assert (again.lease, again.holder) == (held.lease, "the pod")
            assert again.expires.timestamp() >= max(began + GRACE, held.expires.timestamp())
            with pytest.raises(RequestError) as refused:
                await engine.remove("acme/m")
            assert refused.value.code is Code.LEASED
            (holder,) = refused.value.facts["holders"]  # type: ignore[misc]
            assert (holder["lease"], holder["holder"]) == (held.lease, "the pod")

    assert GRACE >= 120
    run(test())


def test_a_lease_that_runs_out_lets_go(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(bed, "m")

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            status = await ready(engine, "acme/m")
            await engine.lease("acme/m", "the pod", 60)
            assert (await engine.model("acme/m")).leases == 1
            monkeypatch.setattr(clock, "unix", lambda: time.time() + 61)
            assert engine.leases() == []
            await engine.session.leases.expire()
            assert list(bed.store.glob("leases/*")) == []
            assert engine.counters.leases_expired == 1
            await engine.remove(status.entry)

    run(test())


def test_what_a_process_reads_is_known_without_a_lease(bed: Bed) -> None:
    stock(bed, "read", "idle")

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            look = engine.session.evictor.look_who_reads
            status = await ready(engine, "acme/read")
            await ready(engine, "acme/idle")
            with (Path(status.path or "") / "model.safetensors").open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with mapped:
                await look()
                assert {model.hub_id: model.in_use for model in engine.models()} == {"acme/read": True, "acme/idle": False}
                assert (await engine.model("acme/read")).in_use
            async with engine.watch(status.entry) as told:
                assert (await told.get()).in_use  # type: ignore[union-attr]
                await look()
                assert not (await told.get()).in_use  # type: ignore[union-attr]

    run(test())


def test_a_disk_that_keeps_a_lease_does_not_end_what_goes_on_by_itself(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(bed, "m")
    monkeypatch.setattr(session, "MEASURE_EVERY", 0.05)
    tries = 0

    def fails(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise DiskError(Code.DISK_IO, "cannot remove it: the disk fails", facts={"errno": "EIO"})

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            await ready(engine, "acme/m")
            for _ in range(2):
                await engine.lease("acme/m", "the pod", 60)
            monkeypatch.setattr(engine.session.do.catalog, "remove_lease", fails)
            monkeypatch.setattr(clock, "unix", lambda: time.time() + 61)
            await until(lambda: tries, lambda tries: tries == 2)
            assert engine.counters.leases_expired == 2
            assert engine.leases() == []
            await until(engine.problems, lambda problems: not problems)

    run(test())


@pytest.mark.parametrize("how", ["take", "renew", "adopt"])
def test_a_lease_that_is_ended_while_it_is_written_does_not_come_back(bed: Bed, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """An operator breaks it and removes the model while the disk is slow: who asked for it is told, and nothing of it is left there."""
    stock(bed, "m")
    writing, go_on = threading.Event(), threading.Event()

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            model = await ready(engine, "acme/m")
            before = None if how == "take" else await engine.lease(model.entry, "the pod", 600)
            write = engine.session.do.catalog.write_lease

            def slow(lease: Any) -> None:
                writing.set()
                assert go_on.wait(30)
                write(lease)

            monkeypatch.setattr(engine.session.do.catalog, "write_lease", slow)
            adopts = (lambda holder: holder == "the pod") if how == "adopt" else None
            call = engine.renew(model.entry, before.lease, 600) if how == "renew" and before else engine.lease(model.entry, "the pod", 600, adopts)
            asking = asyncio.create_task(call)
            await until(writing.is_set, bool)
            (held,) = engine.leases()
            await engine.release(model.entry, held.lease)
            await engine.remove(model.entry)
            go_on.set()
            with pytest.raises(RequestError) as ended:
                await asking
            assert ended.value.code is Code.UNKNOWN_LEASE
            assert list(bed.store.glob("leases/*")) == []

    run(test())


def test_a_lease_whose_file_stays_is_released_all_the_same(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(bed, "m")

    def fails(*_: object) -> None:
        raise DiskError(Code.DISK_IO, "cannot remove it: the disk fails", facts={"errno": "EIO"})

    async def test() -> None:
        async with bed.engine() as engine:
            assert engine.session is not None
            model = await ready(engine, "acme/m")
            held = await engine.lease(model.entry, "the pod", 600)
            async with engine.watch(model.entry) as told, asyncio.timeout(5):
                while (await told.get()).leases != 1:  # type: ignore[union-attr]
                    pass
                monkeypatch.setattr(engine.session.do.catalog, "remove_lease", fails)
                with pytest.raises(DiskError):
                    await engine.release(model.entry, held.lease)
                assert (await told.get()).leases == 0  # type: ignore[union-attr]
            assert (await engine.timeline(model.entry))[-1].kind is Kind.RELEASED

    run(test())


def test_what_goes_on_by_itself_needs_nothing_more_of_the_disk_to_begin(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a store is tried again until it succeeds; what begins then is not, and one failure would have ended all of it."""
    stock(bed, "m")
    monkeypatch.setattr(session, "MEASURE_EVERY", 0.05)
    load = session.load_shelf

    def last_that_goes_well(*given: Any) -> Any:
        loaded = load(*given)
        monkeypatch.setattr(Catalog, "plans", fails)
        return loaded

    def fails(*_: object) -> None:
        raise DiskError(Code.DISK_IO, "cannot list the plans: Too many open files", facts={"errno": "EMFILE"})

    async def test() -> None:
        monkeypatch.setattr(session, "load_shelf", last_that_goes_well)
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            await engine.lease("acme/m", "the pod", 60)
            monkeypatch.setattr(clock, "unix", lambda: time.time() + 61)
            async with asyncio.timeout(10):
                await until(lambda: engine.counters.leases_expired, bool)

    run(test())
