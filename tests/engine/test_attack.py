"""Regression tests of an attack on the engine: each names a way in which a wrong byte was shown, a good copy lost or a job never ended."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from nvcache.api.schemas import LeaseWish
from nvcache.core.states import JobState, ModelState
from nvcache.engine import ledger, persist
from nvcache.engine.engine import Engine
from nvcache.engine.status import JobStatus
from nvcache.errors import Code, RequestError, SpaceError
from nvcache.settings import ModelSetting
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.engine.test_keep import flip
from tests.support.daemon import DaemonProcess
from tests.support.disks import mounted
from tests.support.faults import Kind

MB = 1_000_000
SHARED = weights(1, 40 * MB)


def blob(bed: Bed, content: bytes) -> Path:
    """Where the store keeps `content`."""
    name = hashlib.sha256(content).hexdigest()
    return bed.store / "blobs/sha256" / name[:2] / name


def wrong(bed: Bed, expected: dict[str, bytes]) -> list[str]:
    """The shown files whose bytes are not what their name at the end of the path says."""
    return [path for path, content in bed.shown().items() for name, good in expected.items() if path.endswith(name) and content != good]


# -- wrong bytes


def test_a_second_repair_leaves_the_ingest_of_the_first_alone(bed: Bed) -> None:
    """Two entries share a blob that went bad: asking for the second while the first is mended must not swap the data under the running fetch."""
    bed.hub.repos["acme/a"] = repo({"model.safetensors": SHARED, "config.json": b"{}"})
    bed.hub.repos["acme/b"] = repo({"model.safetensors": SHARED, "config.json": b'{"b": 1}'})

    async def test() -> None:
        async with bed.engine(lanes=4, stall_timeout=20, fetch_deadline=30) as engine:
            first = await ready(engine, "acme/a")
            await ready(engine, "acme/b")
            assert first.path
            flip(Path(first.path) / "model.safetensors", 20 * MB)
            stall = bed.hub.faults.add("*model.safetensors", Kind.STALL, after=2**20, seconds=20, times=1)
            mending = await engine.verify("acme/a")
            await until(lambda: stall.hits, bool)
            other = await engine.ensure(wish("acme/b"))
            await asyncio.sleep(1)
            bed.hub.faults.release()
            ended = await end_of(engine, mending)
            also = await end_of(engine, other) if isinstance(other, JobStatus) else None
            assert wrong(bed, {"model.safetensors": SHARED}) == []
            assert ended.state is JobState.DONE, ended.error
            assert also is None or also.state is JobState.DONE, also.error

    run(test())


def test_a_repair_leaves_the_ingest_of_a_running_fill_alone(bed: Bed) -> None:
    """A fill of B fetches what A's repair is about to seed: the seed must not replace the data that the fill's worker writes, proves and commits."""
    bed.hub.repos["acme/a"] = repo({"model.safetensors": SHARED, "config.json": b"{}"})
    bed.hub.repos["acme/b"] = repo({"model.safetensors": SHARED, "config.json": b'{"b": 1}'})

    async def test() -> None:
        async with bed.engine(lanes=4, stall_timeout=20, fetch_deadline=30) as engine:
            first = await ready(engine, "acme/a")
            assert first.path
            flip(Path(first.path) / "model.safetensors", 20 * MB)
            listing = bed.hub.faults.add("/api/models/acme/a/tree/*", Kind.STALL, origin="hub", seconds=20)
            bytes_ = bed.hub.faults.add("*model.safetensors", Kind.STALL, after=2**20, seconds=20)
            mending = await engine.verify("acme/a")
            await until(lambda: listing.hits, bool)  # A's blob is in quarantine now, its repair waits for the listing
            filling = await engine.ensure(wish("acme/b"))
            await until(lambda: bytes_.hits, bool)
            listing.released.set()
            await asyncio.sleep(1.5)
            bytes_.released.set()
            ended, also = await end_of(engine, mending), await end_of(engine, filling)
            assert wrong(bed, {"model.safetensors": SHARED}) == []
            assert (ended.state, also.state) == (JobState.DONE, JobState.DONE), (ended.error, also.error)

    run(test())


@pytest.mark.parametrize("how", ["ask again", "restart"])
def test_bad_bytes_stay_withdrawn_when_the_quarantine_fails(bed: Bed, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk runs full (or the daemon is killed) between hiding the views and moving the bad blob aside: nobody may show that blob again."""
    good = {"a.safetensors": weights(1, MB, name="a"), "b.safetensors": weights(2, MB, name="b"), "config.json": b"{}"}
    bed.hub.repos["acme/m"] = repo(good)

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            flip(Path(status.path) / "a.safetensors", MB // 2)
            flip(Path(status.path) / "b.safetensors", MB // 2)

            def full(sha256: str, note: str) -> Path:
                raise SpaceError(Code.DISK_FULL, f"cannot write quarantine/{sha256}.note: No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(engine.session.do.blobs, "quarantine", full)
                failed = await end_of(engine, await engine.verify("acme/m"))
            assert failed.state is JobState.FAILED
            assert bed.shown() == {}
            if how == "ask again":
                answer = await engine.ensure(wish("acme/m"))
                if isinstance(answer, JobStatus):
                    await end_of(engine, answer)
                assert wrong(bed, good) == []
        async with bed.engine() as engine:
            await until(engine.models, lambda models: bool(models) and models[0].state is ModelState.READY)
            assert wrong(bed, good) == []

    run(test())


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two read-only-image-like mounts: other bytes, but the same names, sizes, times and inode numbers."""
    with mounted("tmpfs", tmp_path / "one") as one, mounted("tmpfs", tmp_path / "two") as two:
        for seed, place in ((1, one), (2, two)):
            (place / "model.safetensors").write_bytes(weights(seed, 40 * MB))
            os.utime(place / "model.safetensors", (0, 0))
        assert (one / "model.safetensors").stat().st_ino == (two / "model.safetensors").stat().st_ino
        yield one, two


def test_two_directories_with_the_same_times_and_inodes_are_two_models(bed: Bed, twins: tuple[Path, Path]) -> None:
    """Inode numbers count per file system: files of two mounts must not share an ingest."""

    async def test() -> None:
        async with bed.engine() as engine:
            answers = await asyncio.gather(*(engine.ensure(wish(f"file://{place}")) for place in twins))
            for job, seed in zip(answers, (1, 2), strict=True):
                ended = await end_of(engine, job)
                assert ended.state is JobState.DONE, ended.error
                status = await engine.model(ended.entry or "")
                assert status.path
                assert (Path(status.path) / "model.safetensors").read_bytes() == weights(seed, 40 * MB), f"model {seed} shows other bytes"

    run(test())


def test_every_path_of_one_inode_is_held_against_its_own_digest(bed: Bed, tmp_path: Path) -> None:
    """SHA256SUMS may say another digest for a second link: that is a mismatch, and must not make the Hub's file of that digest 'known'."""
    place, true, false = tmp_path / "weights", weights(1, MB), weights(9, MB)
    place.mkdir()
    (place / "a.safetensors").write_bytes(false)
    (place / "b.safetensors").hardlink_to(place / "a.safetensors")
    sums = {"a.safetensors": false, "b.safetensors": true}
    (place / "SHA256SUMS").write_text("".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sums.items()))
    bed.hub.repos["acme/m"] = repo({"model.safetensors": true})

    async def test() -> None:
        async with bed.engine() as engine:
            local = await end_of(engine, await engine.ensure(wish(f"file://{place}")))
            status = await ready(engine, "acme/m")
            assert status.path
            assert (Path(status.path) / "model.safetensors").read_bytes() == true
            assert local.state is JobState.FAILED
            assert local.error
            assert local.error.code is Code.DIGEST_MISMATCH

    run(test())


def test_a_blob_that_went_bad_is_replaced_even_if_somebody_else_links_it(bed: Bed, tmp_path: Path) -> None:
    """A backup by `cp -al` holds a second link to a blob that no entry has any more; its bytes rot; a new fill must not end up with them."""
    content = weights(1, MB)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": content})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            kept = tmp_path / "backup"
            kept.hardlink_to(blob(bed, content))
            await engine.remove("acme/m")
            flip(kept, MB // 2)
            status = await ready(engine, "acme/m")
            assert status.path
            assert (Path(status.path) / "model.safetensors").read_bytes() == content

    run(test())


def test_verify_notices_a_view_that_is_no_link_to_its_blob(bed: Bed) -> None:
    """Somebody replaced a shown file by another of the same size: what pods see is wrong, and verify is asked whether it is right."""
    content = weights(1, MB)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": content})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            shown = Path(status.path) / "model.safetensors"
            shown.unlink()
            shown.write_bytes(weights(2, MB))
            await end_of(engine, await engine.verify("acme/m"))
            assert shown.read_bytes() == content

    run(test())


def test_a_committed_blob_is_read_again_before_a_resumed_fill_shows_it(bed: Bed) -> None:
    """Killed with one file of two committed; that blob changes before the restart: its chunk digests are in the receipt and must be compared."""
    first, second = weights(1, MB, name="a"), weights(2, 40 * MB, name="b")
    bed.hub.repos["acme/m"] = repo({"a.safetensors": first, "b.safetensors": second})
    bed.hub.faults.add("*b.safetensors", Kind.TRICKLE, times=None, after=2**18, seconds=0.05)

    async def test() -> None:
        async with bed.engine() as engine:
            await engine.ensure(wish("acme/m"))
            await until(lambda: (blob(bed, first).exists(), list(bed.store.glob("ingest/receipts/*"))), all)
        flip(blob(bed, first), MB // 2)
        bed.hub.faults.clear()
        async with bed.engine() as engine:
            await until(engine.models, lambda models: bool(models) and models[0].state is ModelState.READY)
            assert wrong(bed, {"a.safetensors": first}) == []

    run(test())


# -- good copies lost


def test_removing_one_model_leaves_what_a_running_fill_counts_on(bed: Bed) -> None:
    """B's fill found a shard among A's blobs and fetches the rest; A is removed meanwhile."""
    rest = weights(2, 40 * MB, name="b")
    bed.hub.repos["acme/a"] = repo({"a.safetensors": SHARED})
    bed.hub.repos["acme/b"] = repo({"a.safetensors": SHARED, "b.safetensors": rest})
    stall = bed.hub.faults.add("*b.safetensors", Kind.STALL, after=2**20, seconds=20)

    async def test() -> None:
        async with bed.engine(stall_timeout=20, fetch_deadline=30) as engine:
            await ready(engine, "acme/a")
            filling = await engine.ensure(wish("acme/b"))
            await until(lambda: stall.hits, bool)
            await engine.remove("acme/a")
            stall.released.set()
            ended = await end_of(engine, filling)
            assert ended.state is JobState.DONE, ended.error
            assert wrong(bed, {"a.safetensors": SHARED, "b.safetensors": rest}) == []

    run(test())


async def degrade(bed: Bed, engine: Engine, name: str, bad: bytes) -> None:
    """Make `name` degraded: one file goes bad while its source is down."""
    source = bed.hub.repos.pop(name)
    flip(blob(bed, bad), len(bad) // 2)
    assert (await end_of(engine, await engine.verify(name))).state is JobState.FAILED
    assert (await engine.model(name)).state is ModelState.DEGRADED
    bed.hub.repos[name] = source


def test_removing_a_model_leaves_the_good_files_of_a_degraded_one(bed: Bed) -> None:
    """A waits for its source with its views withdrawn; B shares a file of A that is still good. Removing B must not take that file from A."""
    bad = weights(3, MB, name="x")
    bed.hub.repos["acme/a"] = repo({"a.safetensors": SHARED, "x.safetensors": bad})
    bed.hub.repos["acme/b"] = repo({"a.safetensors": SHARED})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/a")
            await ready(engine, "acme/b")
            await degrade(bed, engine, "acme/a", bad)
            await engine.remove("acme/b")
            assert blob(bed, SHARED).exists(), "the good file of a degraded model is lost"

    run(test())


def test_making_room_leaves_the_good_files_of_a_degraded_model(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fill that needs room gives up what is idle; the good shards of a model that waits for its repair are not."""
    monkeypatch.setattr(ledger, "COMMIT_GRACE", 0.0)
    bad = weights(3, MB, name="x")
    bed.hub.repos["acme/a"] = repo({"a.safetensors": SHARED, "x.safetensors": bad})
    bed.hub.repos["acme/b"] = repo({"b.safetensors": weights(2, 40 * MB, name="b")})

    async def test() -> None:
        async with bed.engine(max_bytes=60 * MB) as engine:
            await ready(engine, "acme/a", pin=True)
            await degrade(bed, engine, "acme/a", bad)
            ended = await end_of(engine, await engine.ensure(wish("acme/b")))
            assert blob(bed, SHARED).exists(), f"the good file of a pinned model is lost (the other fill: {ended.state})"

    run(test())


def test_making_room_leaves_what_a_running_fill_adopted(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that a fill adopted is in no manifest yet; another fill that needs room must not take it."""
    monkeypatch.setattr(ledger, "COMMIT_GRACE", 0.0)
    rest = weights(2, 40 * MB, name="b")
    bed.hub.repos["acme/a"] = repo({"a.safetensors": SHARED})
    bed.hub.repos["acme/b"] = repo({"a.safetensors": SHARED, "b.safetensors": rest})
    bed.hub.repos["acme/c"] = repo({"c.safetensors": weights(3, 40 * MB, name="c")})

    async def test() -> None:
        async with bed.engine(max_bytes=100 * MB, stall_timeout=20, fetch_deadline=30) as engine:
            await ready(engine, "acme/a")
            keep = bed.place / "keep"
            keep.hardlink_to(blob(bed, SHARED))
            await engine.remove("acme/a")
            keep.unlink()
            stall = bed.hub.faults.add("*b.safetensors", Kind.STALL, after=2**20, seconds=20)
            filling = await engine.ensure(wish("acme/b"))
            await until(lambda: stall.hits, bool)
            await end_of(engine, await engine.ensure(wish("acme/c")))
            stall.released.set()
            ended = await end_of(engine, filling)
            assert ended.state is JobState.DONE, ended.error

    run(test())


def test_cancelling_one_caller_leaves_the_plan_of_the_fill_it_waited_for(bed: Bed) -> None:
    """Two wishes for one entry: the second waits for the first. Cancelling the second must not take the first one's plan off the disk."""
    bed.hub.repos["acme/m"] = repo()
    stall = bed.hub.faults.add("model.safetensors", Kind.STALL, after=2**20, seconds=20)

    async def test() -> None:
        async with bed.engine(stall_timeout=20, fetch_deadline=30) as engine:
            first = await engine.ensure(wish("acme/m"))
            await until(lambda: stall.hits, bool)
            second = await engine.ensure(wish("acme/m", include=["*"]))
            assert isinstance(first, JobStatus)
            assert isinstance(second, JobStatus)
            await until(lambda: engine.job(second.id).entry, bool)
            assert list(bed.store.glob("ingest/plans/*.json"))
            await engine.cancel(second.id)
            assert engine.job(first.id).state is JobState.FETCHING
            assert list(bed.store.glob("ingest/plans/*.json")), "kill -9 now would throw away all that was fetched"

    run(test())


def test_asking_again_right_after_a_cancel_resumes(bed: Bed) -> None:
    """The cancelled worker may still write; the next one must not trip over it."""
    content = weights(1, 40 * MB)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": content})

    async def test() -> None:
        async with bed.engine(workers=2) as engine:
            for pause in range(30):  # each a little later than the one before
                job = await engine.ensure(wish("acme/m"))
                if not isinstance(job, JobStatus):  # the cancellation came while it was being published: too late
                    await engine.remove("acme/m")
                    continue
                await until(lambda name=job.id: (list(bed.store.glob("ingest/*/data")), engine.job(name).state.ended), any)
                await asyncio.sleep(pause * 0.01)
                ended = await engine.cancel(job.id)
                assert ended.state in (JobState.CANCELLED, JobState.DONE), ended.error
                if ended.state is JobState.DONE:
                    await engine.remove("acme/m")
            await ready(engine, "acme/m")
            assert wrong(bed, {"model.safetensors": content}) == []

    run(test())


def test_a_cancelled_removal_is_over_or_undone(bed: Bed) -> None:
    """The API gives up on a removal after half a minute; the disk finishes it. The entry must not stay "evicting" for ever."""
    content = weights(1, MB)
    bed.hub.repos["acme/m"] = repo({"model.safetensors": content})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            fd = os.open(blob(bed, content).parent, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX)  # a slow disk
            removing = asyncio.create_task(engine.remove("acme/m"))
            await until(bed.shown, lambda shown: not shown)
            await asyncio.sleep(0.2)
            removing.cancel()
            await asyncio.wait({removing})
            os.close(fd)
            await until(lambda: blob(bed, content).exists(), lambda there: not there)
            assert [model.state for model in engine.models()] == []

    run(test())


# -- the wrong model shown, or a removed one back


def test_a_removed_model_is_not_repaired_back(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that is tried again and again must end when its model is removed, not fetch it anew."""
    monkeypatch.setattr(persist, "RETRY_FIRST", 0.5)
    bad = weights(3, MB, name="x")
    bed.hub.repos["acme/a"] = repo({"x.safetensors": bad})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/a")
            flip(blob(bed, bad), MB // 2)
            source = bed.hub.repos.pop("acme/a")
            assert (await end_of(engine, await engine.verify("acme/a"))).state is JobState.FAILED
        bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*")
        async with bed.engine() as engine:
            await until(engine.jobs, lambda jobs: any(job.state is JobState.FAILED for job in jobs))
            await engine.remove("acme/a")
            bed.hub.repos["acme/a"] = source
            bed.hub.faults.clear()
            await asyncio.sleep(3)
            assert [model.entry for model in engine.models(ModelState.READY)] == []
            assert bed.shown() == {}

    run(test())


def test_an_older_fill_that_ends_later_does_not_take_the_name_back(bed: Bed) -> None:
    """main moved while its old commit was fetched, and the new one was ready first."""
    source = bed.hub.repos["acme/m"] = repo()
    stall = bed.hub.faults.add("model.safetensors", Kind.STALL, after=2**20, seconds=20)

    async def test() -> None:
        async with bed.engine(stall_timeout=20, fetch_deadline=30) as engine:
            older = await engine.ensure(wish("acme/m"))
            await until(lambda: stall.hits, bool)
            newer = source.push({"model.safetensors": weights(2, MB)})
            status = await ready(engine, "acme/m", pin=True)  # another wish: the same one would join the older fill
            assert status.revision == newer
            stall.released.set()
            assert (await end_of(engine, older)).state is JobState.DONE
            assert (bed.store / "hub/models--acme--m/refs/main").read_text() == newer
            assert (await engine.model("acme/m")).revision == newer

    run(test())


def test_names_are_taken_over_while_other_models_come_and_go(bed: Bed) -> None:
    """Taking a name from an older revision waits for the disk; a model that appears meanwhile must not break the fill."""
    source = bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 1000)})
    for number in range(40):
        bed.hub.repos[f"acme/x{number}"] = repo({"model.safetensors": weights(number, 1000)})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            for turn in range(10):
                source.push({"model.safetensors": weights(100 + turn, 1000)})
                asked = [f"acme/x{number}" for number in range(turn * 4, turn * 4 + 4)]
                jobs = await asyncio.gather(*(engine.ensure(wish(name)) for name in ["acme/m", *asked]))
                for job in jobs:
                    if isinstance(job, JobStatus):
                        ended = await end_of(engine, job)
                        assert ended.state is JobState.DONE, ended.error

    run(test())


def test_another_alias_takes_the_place_of_the_first(bed: Bed, tmp_path: Path) -> None:
    """The view under the old alias must go with it: it shows a model under a name nobody gave it, and keeps its blobs after the removal."""
    place, content = tmp_path / "weights", weights(1, MB)
    place.mkdir()
    (place / "model.safetensors").write_bytes(content)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, f"file://{place}", alias="acme/one")
            status = await ready(engine, f"file://{place}", alias="acme/two")
            assert status.hub_id == "acme/two"
            await engine.remove(status.entry)
            assert bed.shown() == {}
            assert not blob(bed, content).exists()

    run(test())


@pytest.mark.parametrize("order", ["the Hub's model later", "both at once", "declared"])
def test_one_hub_name_shows_one_source(bed: Bed, tmp_path: Path, order: str) -> None:
    """An alias and a Hub model of that name, or two aliases, are a conflict in whatever order they come."""
    places = [tmp_path / "one", tmp_path / "two"]
    for seed, place in enumerate(places):
        place.mkdir()
        (place / "model.safetensors").write_bytes(weights(seed, MB))
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(5, MB)})

    async def test() -> None:
        declared = tuple(ModelSetting(ref=f"file://{place}", alias="acme/m") for place in places) if order == "declared" else ()
        async with bed.engine(models=declared) as engine:
            wishes = [wish(f"file://{places[0]}", alias="acme/m")]
            wishes += [wish("acme/m")] if order == "the Hub's model later" else [wish(f"file://{places[1]}", alias="acme/m")]
            if order == "declared":
                await until(engine.jobs, lambda jobs: len(jobs) >= 2 and all(job.state.ended for job in jobs))
            elif order == "both at once":
                for answer in await asyncio.gather(*map(engine.ensure, wishes), return_exceptions=True):
                    if isinstance(answer, JobStatus):
                        await end_of(engine, answer)
            else:
                for asked in wishes:
                    try:
                        answer = await engine.ensure(asked)
                    except RequestError:
                        continue
                    if isinstance(answer, JobStatus):
                        await end_of(engine, answer)
            shown = list(bed.store.glob("hub/models--acme--m/snapshots/*"))
            assert len(shown) == 1, [model.ref for model in engine.models()]

    run(test())


# -- what never ends, leaks or misleads


def test_a_worker_that_dies_under_a_verification_says_so(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 400 * MB)})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            job = await engine.verify("acme/m")
            os.kill(engine.session.do.workers.pids()[0], signal.SIGSTOP)
            await asyncio.sleep(0.2)
            os.kill(engine.session.do.workers.pids()[0], signal.SIGKILL)
            ended = await end_of(engine, job)
            assert ended.state is JobState.DONE or (ended.error and ended.error.code is Code.WORKER_DIED), ended.error

    run(test())


def test_a_view_that_vanishes_under_a_verification_comes_back(bed: Bed) -> None:
    """The look-up that notices it joins the verification; that one must not end with the entry still withdrawn."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100 * MB)})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.path
            await asyncio.sleep(1.1)  # the last cheap check is forgotten
            job = await engine.verify("acme/m")
            await until(lambda: engine.job(job.id).state, lambda state: state is JobState.VERIFYING)
            os.kill(engine.session.do.workers.pids()[0], signal.SIGSTOP)
            (Path(status.path) / "model.safetensors").unlink()
            assert (await engine.model("acme/m")).state is ModelState.DEGRADED
            os.kill(engine.session.do.workers.pids()[0], signal.SIGCONT)
            assert (await end_of(engine, job)).state is JobState.DONE
            await asyncio.sleep(1)
            assert engine.models()[0].state is ModelState.READY

    run(test())


def test_a_degraded_model_is_mended_when_its_source_is_back(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for it: a repair that failed for want of a source is tried again by itself, not only after a restart."""
    monkeypatch.setattr(persist, "RETRY_FIRST", 0.5)
    bad = weights(3, MB, name="x")
    bed.hub.repos["acme/a"] = repo({"x.safetensors": bad})

    async def test() -> None:
        async with bed.engine(models=(ModelSetting(ref="acme/a"),)) as engine:
            await until(engine.models, lambda models: bool(models) and models[0].state is ModelState.READY)
            flip(blob(bed, bad), MB // 2)
            down = bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*")
            assert (await end_of(engine, await engine.verify("acme/a"))).state is JobState.FAILED
            assert down.hits
            bed.hub.faults.clear()
            await asyncio.sleep(4)
            assert engine.models()[0].state is ModelState.READY

    run(test())


def test_removing_a_degraded_model_frees_its_quarantine(bed: Bed) -> None:
    """The bad copy counts as used; without its entry nothing would ever remove it."""
    bad = weights(3, MB, name="x")
    bed.hub.repos["acme/a"] = repo({"x.safetensors": bad})

    async def test() -> None:
        async with bed.engine(max_bytes=2 * MB) as engine:
            await ready(engine, "acme/a")
            await degrade(bed, engine, "acme/a", bad)
            await engine.remove("acme/a")
            bed.hub.repos["acme/b"] = repo({"y.safetensors": weights(4, 3 * MB // 2, name="y")})
            job = await end_of(engine, await engine.ensure(wish("acme/b")))
            assert job.state is JobState.DONE, job.error

    run(test())


def test_a_job_cancelled_before_it_began_ends(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, MB)})

    async def test() -> None:
        async with bed.engine() as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            assert (await engine.cancel(job.id)).state is JobState.CANCELLED
            await ready(engine, "acme/m")

    run(test())


def test_a_cheap_check_while_a_selection_widens_finds_nothing_wrong(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    """A wider fill writes the new listing before the entry has it; a look-up meanwhile must not call the old entry degraded."""
    files = {"model.safetensors": weights(1, 1000)} | {f"n{number}.bin": bytes([number]) * 100 for number in range(60)}
    bed.hub.repos["acme/m"] = repo(files)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            for number in range(40):
                job = await engine.ensure(wish("acme/m", include=[f"n{number}.bin"]))
                assert isinstance(job, JobStatus)
                while not engine.job(job.id).state.ended:
                    engine.session.do.shelf.entries[next(iter(engine.session.do.shelf.entries))].checked = (float("-inf"), True)
                    assert (await engine.model("acme/m")).state is ModelState.READY

    run(test())


def test_a_fill_cancelled_while_it_publishes_is_ready_or_gone(bed: Bed) -> None:
    """The thread that publishes goes on when its job is cancelled: what it shows must then be known, or be taken back."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, MB)})

    async def test() -> None:
        async with bed.engine() as engine:
            engine.session.do.views._lock.acquire()  # a slow disk
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: engine.job(job.id).state, lambda state: state is JobState.VERIFYING)
            await asyncio.sleep(0.5)
            cancelled = asyncio.create_task(engine.cancel(job.id))
            await asyncio.sleep(0.2)
            engine.session.do.views._lock.release()
            await cancelled
            await asyncio.sleep(0.5)
            ready_now = {model.entry.replace("@", "/") for model in engine.models(ModelState.READY)}
            assert {"/".join(path.split("/")[1:3]) for path in bed.shown() if path.startswith("models/")} == ready_now

    run(test())


def test_a_removal_that_was_cut_short_leaves_no_state(bed: Bed) -> None:
    """kill -9 between the manifest and the state file: the next start removes what no entry has."""

    async def test() -> None:
        async with bed.engine():
            pass
        name = "hf--acme--gone@" + "a" * 40
        left = [bed.store / f"state/{name}.json", bed.store / f"use/{name}"]
        for path in left:
            path.write_bytes(b"{}")
        async with bed.engine():
            assert [path for path in left if path.exists()] == []

    run(test())


def test_warm_keeps_its_timeout_when_the_daemon_does_not_answer(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, "http://127.0.0.1:9") as daemon:
        assert daemon.process
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            done = daemon.cli("warm", "acme/m", "--timeout", "2")
            assert done.returncode == 8
            assert time.monotonic() - began < 10
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)


def test_a_holder_has_no_terminal_controls() -> None:
    """U+009B starts an escape sequence as well as ESC [ does; U+202E turns the line round; U+2028 breaks it."""
    for character in "\x9b\u2028\u202e":
        with pytest.raises(ValidationError):
            LeaseWish(holder=f"pod{character}31m")
