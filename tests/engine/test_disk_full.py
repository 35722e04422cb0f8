"""A disk that runs full while a fill is under way, by somebody else's doing. A small tmpfs is the disk; mounting it needs root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.core.states import ModelState
from nvcache.engine.status import JobStatus
from nvcache.errors import Code
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
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
        subprocess.run(["umount", place], check=True)


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
