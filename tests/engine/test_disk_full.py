"""A disk that runs full while a fill is under way, by somebody else's doing. A small tmpfs is the disk; mounting it needs root."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from nvcache.core.states import ModelState
from nvcache.engine import clock
from nvcache.engine.handover import PlainDirectory
from nvcache.engine.leases import GRACE
from nvcache.engine.status import JobStatus
from nvcache.errors import Code, RequestError
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.disks import full, unmount
from tests.support.faults import Kind
from tests.support.hub import HubServer

MB = 1_000_000


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Bed]:
    """A bed whose store lies on a disk of 100 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={100 * MB}", "tmpfs", place], check=True)
    try:
        with HubServer({}) as hub:
            bed = Bed(tmp_path, hub)
            bed.store = place / "store"
            yield bed
    finally:
        unmount(place)


def test_the_disk_fills_up_under_a_fill(small: Bed) -> None:
    small.hub.repos["acme/good"] = repo({"model.safetensors": weights(5, 10 * MB)})
    small.hub.repos["acme/m"] = repo({"a.safetensors": weights(1, 30 * MB, name="a"), "b.safetensors": weights(2, 30 * MB, name="b")})
    stall = small.hub.faults.add("/acme/m/*.safetensors", Kind.STALL, after=1000)  # whichever comes first: one lane
    filler = small.store.parent / "filler"

    async def test() -> None:
        async with small.engine(lanes=1, stall_timeout=20, max_bytes=95 * MB) as engine:
            good = await ready(engine, "acme/good")
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: stall.hits, bool)
            filler.write_bytes(b"\0" * 45 * MB)  # somebody else is quicker
            stall.released.set()
            ended = await end_of(engine, job)
            assert ended.error is not None
            assert ended.error.code is Code.DISK_FULL
            assert (await engine.model(good.entry)).state is ModelState.READY
            assert {path.name for path in small.store.glob("ingest/*")} == {"plans", "receipts"}, "the room is given back"
            assert [path.stat().st_size for path in small.store.glob("blobs/sha256/*/*")] == [len(weights(5, 10 * MB))]
            filler.unlink()
            await ready(engine, "acme/m")

    run(test())


def test_a_full_disk_is_told_before_a_byte_is_fetched(small: Bed) -> None:
    small.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 60 * MB)})

    async def test() -> None:
        async with small.engine(max_bytes=95 * MB) as engine:
            (small.store.parent / "filler").write_bytes(b"\0" * 60 * MB)
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code in (Code.FULL, Code.TOO_LARGE)
            assert "60" in ended.error.message
            assert small.hub.bytes_sent() == 0

    run(test())


def test_a_full_disk_refuses_no_lease(small: Bed) -> None:
    """Who loads what is here does not fail for what others wrote. Unwritten, a lease does not outlive the daemon; with room again it is written."""
    small.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, MB)})

    def written() -> set[str]:
        return {path.stem for path in small.store.glob("leases/*")}

    async def test() -> None:
        async with small.engine() as engine:
            model = await ready(engine, "acme/m")
            before = await engine.lease(model.entry, "the pod", 600)
            with full(small.store.parent):
                fresh = await engine.lease(model.entry, "another", 600)
                renewed = await engine.renew(model.entry, fresh.lease, 900)
                assert renewed.lease == fresh.lease
                adopted = [await engine.lease(model.entry, "the pod", 600, lambda holder: holder == "the pod") for _ in range(2)]
                mine = adopted[-1]
                assert len({before.lease, *(each.lease for each in adopted)}) == 3
                assert {lease.lease for lease in engine.leases()} == {fresh.lease, mine.lease}
                for told in (fresh, renewed, *adopted):
                    assert 60 < told.expires.timestamp() - time.time() <= GRACE, "its holder comes back soon, and it is written then"
                assert all(lease.expires.timestamp() - time.time() > 500 for lease in engine.leases()), "it lives as long as was asked for"
                with pytest.raises(RequestError) as refused:
                    await engine.remove(model.entry)
                assert refused.value.code is Code.LEASED
                await engine.release(model.entry, (await engine.lease(model.entry, "a third", 600)).lease)
                assert written() == {before.lease}, "what it was made of stands for it"
            assert (await engine.renew(model.entry, mine.lease, None)).expires.timestamp() - time.time() > 500
            assert written() == {mine.lease}
        async with small.engine() as engine:
            assert {lease.lease for lease in engine.leases()} == {mine.lease}
            with pytest.raises(RequestError) as unknown:
                await engine.renew(model.entry, fresh.lease, None)
            assert unknown.value.code is Code.UNKNOWN_LEASE, "its holder takes one anew"

    run(test())


def test_a_lease_that_was_adopted_on_a_full_disk_ends_on_the_disk_too(small: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    small.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, MB)})

    async def test() -> None:
        async with small.engine() as engine:
            assert engine.session is not None
            model = await ready(engine, "acme/m")
            for holder in ("released", "run out"):
                await engine.lease(model.entry, holder, 600)
            with full(small.store.parent):
                first, _ = [await engine.lease(model.entry, name, 600, lambda holder, name=name: holder == name) for name in ("released", "run out")]
                assert len(list(small.store.glob("leases/*"))) == 2
                await engine.release(model.entry, first.lease)
                assert len(list(small.store.glob("leases/*"))) == 1
                monkeypatch.setattr(clock, "unix", lambda: time.time() + 601)
                await engine.session.leases.expire()
                assert list(small.store.glob("leases/*")) == []

    run(test())


def test_others_on_the_disk_keep_what_they_need(small: Bed) -> None:
    """As beside a kubelet, which evicts pods when less is free: what was admitted makes room by evicting, and so does what others take."""
    keep = 15 * MB
    for seed, name in enumerate("abcdefghij"):
        small.hub.repos[f"acme/{name}"] = repo({"model.safetensors": weights(seed, 10 * MB)})

    def free() -> int:
        facts = os.statvfs(small.store)
        return facts.f_bavail * facts.f_frsize

    async def test() -> None:
        async with small.engine(PlainDirectory(small.store, keep_free=keep), max_bytes=95 * MB, evict_high=1.0, evict_low=1.0) as engine:
            assert engine.session is not None
            for name in "abcdefghij":
                await ready(engine, f"acme/{name}")
                assert free() >= keep
            kept = len(engine.models(ModelState.READY))
            assert kept < 10
            (small.store.parent / "theirs").write_bytes(b"\0" * 12 * MB)
            assert free() < keep
            await engine.session.evictor.keep_to_marks()
            assert free() >= keep
            assert 0 < len(engine.models(ModelState.READY)) < kept
            for model in engine.models(ModelState.READY):
                await engine.lease(model.entry, "pod", 600)
            ended = await end_of(engine, await engine.ensure(wish("acme/a")))
            assert ended.error is not None
            assert ended.error.code is Code.FULL
            assert free() >= keep

    run(test())


def test_on_a_full_disk_no_model_goes_that_a_process_reads(small: Bed) -> None:
    """Its bytes would stay for as long as the process has them: one after the other would go, and the disk be as full as before."""
    for seed, name in enumerate("abcd"):
        small.hub.repos[f"acme/{name}"] = repo({"model.safetensors": weights(seed, 20 * MB)})

    async def test() -> None:
        async with small.engine(max_bytes=95 * MB, evict_high=0.9, evict_low=0.8) as engine, AsyncExitStack() as open_files:
            assert engine.session is not None
            for name in "abc":
                status = await ready(engine, f"acme/{name}")
                open_files.enter_context((Path(status.path or "") / "model.safetensors").open("rb"))
            (small.store.parent / "theirs").write_bytes(b"\0" * 35 * MB)
            await engine.session.evictor.keep_to_marks()
            ended = await end_of(engine, await engine.ensure(wish("acme/d")))
            assert ended.error is not None
            assert ended.error.code is Code.FULL
            assert "open in a process" in ended.error.message
            assert len(engine.models(ModelState.READY)) == 3
            await open_files.aclose()
            await ready(engine, "acme/d")

    run(test())
