"""Filling: single flight, proof, refusals before the first byte, what a failure leaves behind."""

from __future__ import annotations

import asyncio
import json

import pytest

from nvcache.core.states import ModelState
from nvcache.engine.status import JobStatus, ModelStatus
from nvcache.errors import Code, NvcacheError, RequestError
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind


def test_a_hundred_callers_cause_one_fetch(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            answers = await asyncio.gather(*(engine.ensure(wish("acme/m" if i % 2 else "hf://acme/m@main")) for i in range(100)))
            for answer in answers:
                assert isinstance(answer, JobStatus)
                assert (await end_of(engine, answer)).state == "done"
            assert bed.hub.bytes_sent("model.safetensors") == len(weights(1, 40_000_000))
            assert len(bed.hub.seen("config.json")) == 1
            again = await engine.ensure(wish("acme/m"))
            assert isinstance(again, ModelStatus)
            assert (again.state, again.fetched_bytes) == (ModelState.READY, 0)

    run(test())


def test_wrong_bytes_once_are_fetched_again(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("model.safetensors", Kind.FLIP, after=1000)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            assert engine.counters.verify_failures == 1
            assert bed.shown()[next(path for path in bed.shown() if path.endswith("model.safetensors"))] == weights(1, 40_000_000)

    run(test())


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_wrong_bytes_twice_are_never_shown(bed: Bed, file: str) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 2_000_000), "config.json": b'{"a": 1}'})
    bed.hub.faults.add(file, Kind.FLIP, times=None, after=5)

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code is Code.DIGEST_MISMATCH
            assert str(ended.error.facts["expected"]) in ended.error.message
            assert str(ended.error.facts["actual"]) in ended.error.message
            assert bed.shown() == {}
            assert (await engine.model("acme/m")).state is ModelState.FAILED
            assert (await engine.model("acme/m")).path is None
            await engine.remove("acme/m")
            assert engine.models() == []
            assert engine.space().used == 0

    run(test())


@pytest.mark.parametrize(
    "name", ["../out.json", "/etc/out", "a/../../b", "a//b", "back\\slash", "nul\0", "new\nline", "x" * 256, "CONFIG.json", "config.json/below"]
)
def test_hostile_names_are_refused_before_a_byte_is_fetched(bed: Bed, name: str) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 2_000_000), "config.json": b"{}", name: b"x"})

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code in (Code.HOSTILE_NAME, Code.LISTING_CONFLICT)
            assert bed.hub.bytes_sent() == 0

    run(test())


def test_an_index_that_names_a_missing_shard_costs_no_shard(bed: Bed) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    bed.hub.repos["acme/m"] = repo({"model-1.safetensors": weights(1, 2_000_000, name="a"), "model.safetensors.index.json": index})

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code is Code.BAD_INDEX
            assert "model-2.safetensors" in ended.error.message
            assert bed.hub.bytes_sent("*.safetensors") == 0

    run(test())


def test_a_malformed_header_is_refused_after_its_bytes_were_proven(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": b"\xff" * 2_000_000})

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code is Code.BAD_SAFETENSORS
            assert bed.shown() == {}

    run(test())


@pytest.mark.parametrize("listed", [1_000_000, 3_000_000])
def test_a_listing_that_lies_about_sizes(bed: Bed, listed: int) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 2_000_000)}, listed_sizes={"model.safetensors": listed})

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code in (Code.SIZE_MISMATCH, Code.SOURCE_CHANGED)
            assert bed.shown() == {}

    run(test())


def test_too_large_is_refused_at_once_with_numbers(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(max_bytes=30_000_000) as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code is Code.TOO_LARGE
            assert ended.error.facts["limit_bytes"] == 30_000_000
            assert bed.hub.bytes_sent() == 0
            plan = await engine.dry_run(wish("acme/m"))
            assert not plan.fits
            assert plan.refusal is not None
            assert plan.refusal.code is Code.TOO_LARGE

    run(test())


def test_full_just_now_leaves_what_is_held_alone(bed: Bed) -> None:
    bed.hub.repos["acme/one"] = repo()
    bed.hub.repos["acme/two"] = repo({"model.safetensors": weights(2, 40_000_000)})

    async def test() -> None:
        async with bed.engine(max_bytes=60_000_000) as engine:
            one = await ready(engine, "acme/one")
            lease = await engine.lease("acme/one", "the pod", 600)
            ended = await end_of(engine, await engine.ensure(wish("acme/two")))
            assert ended.error is not None
            assert ended.error.code is Code.FULL
            assert bed.hub.bytes_sent("acme/two/*") == 0, "it is not begun on"
            assert (await engine.model(one.entry)).state is ModelState.READY
            await engine.release("acme/one", lease.lease)
            await ready(engine, "acme/two")

    run(test())


def test_a_failed_fill_gives_its_room_to_the_next(bed: Bed) -> None:
    bed.hub.repos["acme/one"] = repo()
    bed.hub.repos["acme/two"] = repo({"model.safetensors": weights(2, 40_000_000)})
    bed.hub.faults.add("/acme/one/*", Kind.TRICKLE, times=None, after=2**20, seconds=0.01)

    async def test() -> None:
        async with bed.engine(max_bytes=60_000_000) as engine:
            job = await engine.ensure(wish("acme/one"))
            assert isinstance(job, JobStatus)
            await until(lambda: engine.job(job.id).progress.bytes_fetched, bool)
            bed.hub.faults.clear()
            bed.hub.faults.add("/acme/one/*", Kind.STATUS, times=None, status=500, origin="*")
            bed.hub.drop_connections()
            ended = await end_of(engine, job)
            assert ended.error is not None
            assert ended.error.retryable
            await ready(engine, "acme/two")

    run(test())


def test_wider_wishes_fetch_the_difference_and_narrower_ones_are_hits(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 2_000_000), "config.json": b"{}", "pytorch_model.bin": b"b" * 2_000_000})

    async def test() -> None:
        async with bed.engine() as engine:
            first = await ready(engine, "acme/m", include=("config.json",))
            assert first.files == 1
            whole = await ready(engine, "acme/m")
            assert whole.files == 2
            assert len(bed.hub.seen("config.json", method="GET")) == 1
            assert bed.hub.bytes_sent("pytorch_model.bin") == 0
            manifest = engine.manifest(whole.entry)
            assert manifest is not None
            assert [left.path for left in manifest.left_out] == ["pytorch_model.bin"]
            narrow = await engine.ensure(wish("acme/m", include=("config.json",)))
            assert isinstance(narrow, ModelStatus)
            assert narrow.files == 2
            everything = await ready(engine, "acme/m", include=("*",))
            assert everything.files == 3
            assert bed.hub.bytes_sent("model.safetensors") == len(weights(1, 2_000_000))

    run(test())


def test_a_moved_name_and_shared_content(bed: Bed) -> None:
    files = {"model.safetensors": weights(1, 20_000_000), "config.json": b'{"v": 1}', "same.json": b"{}"}
    source = bed.hub.repos["acme/m"] = repo(files)

    async def test() -> None:
        async with bed.engine() as engine:
            old = await ready(engine, "acme/m")
            source.push({**files, "config.json": b'{"v": 2}'})
            new = await ready(engine, "acme/m")
            assert new.entry != old.entry
            assert bed.hub.bytes_sent("model.safetensors") == len(files["model.safetensors"])
            assert len(bed.hub.seen("same.json", method="GET")) == 1
            assert (bed.store / "hub/models--acme--m/refs/main").read_text() == new.revision
            assert (await engine.model("acme/m")).entry == new.entry
            assert (await engine.model(old.entry)).state is ModelState.READY
            with pytest.raises(RequestError) as ambiguous:
                await engine.remove("hf--acme--m")
            assert ambiguous.value.code is Code.AMBIGUOUS_REVISION
            await engine.remove(old.entry)
            shown = await engine.model("acme/m")
            assert shown.state is ModelState.READY
            assert bed.shown()[f"models/{shown.entry.replace('@', '/')}/model.safetensors"] == files["model.safetensors"]
        async with bed.engine() as engine:
            assert (await engine.model("acme/m")).entry == new.entry

    run(test())


def test_a_name_that_moves_during_a_fill_changes_nothing(bed: Bed) -> None:
    source = bed.hub.repos["acme/m"] = repo()
    stall = bed.hub.faults.add("model.safetensors", Kind.STALL, after=1_000_000)

    async def test() -> None:
        async with bed.engine(stall_timeout=20) as engine:
            job = await engine.ensure(wish("acme/m"))
            await until(lambda: stall.hits, bool)
            before = source.commit
            source.push({"model.safetensors": weights(9, 40_000_000)})
            stall.released.set()
            ended = await end_of(engine, job)
            assert ended.entry == f"hf--acme--m@{before}"
            assert (await engine.model(ended.entry)).state is ModelState.READY

    run(test())


def test_files_only_xet_can_give_are_refused_when_planned(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 2_000_000)}, listed_sizes={"model.safetensors": 50_000_000_001})

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))
            assert ended.error is not None
            assert ended.error.code is Code.NEEDS_XET
            assert bed.hub.bytes_sent() == 0

    run(test())


@pytest.mark.parametrize(("ref", "code"), [("acme/none", Code.REPOSITORY_NOT_FOUND), ("acme/m@nope", Code.REVISION_NOT_FOUND)])
def test_what_does_not_exist(bed: Bed, ref: str, code: Code) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            ended = await end_of(engine, await engine.ensure(wish(ref)))
            assert ended.error is not None
            assert ended.error.code is code
            with pytest.raises(NvcacheError) as unknown:
                await engine.model(ref)
            assert unknown.value.code is Code.UNKNOWN_MODEL

    run(test())


def test_thousands_of_files(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo({f"part-{i:04d}/config.json": b"%d" % i for i in range(1500)})
    bed.hub.page_size = 100

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            assert status.files == 1500
            assert len(bed.shown()) == 3000

    run(test())
