"""What is declared may change while the engine runs: models are begun on and let go of, and their pins come and go with the declaration."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvcache import settings
from nvcache.core.states import JobState, ModelState
from nvcache.engine.engine import Engine
from nvcache.errors import Code, RequestError
from nvcache.kubernetes.reading import Reader
from nvcache.settings import ModelSetting
from tests.engine.conftest import Bed, DisksPart, end_of, ready, repo, run, until, weights
from tests.support.faults import Kind

A, B = ModelSetting(ref="acme/a", pin=True), ModelSetting(ref="acme/b")


def declare(engine: Engine, *models: ModelSetting) -> None:
    engine.converge(engine.settings.model_copy(update={"models": models}))


def entries(engine: Engine) -> set[str]:
    """The declared entries."""
    assert engine.session is not None
    shelf = engine.session.do.shelf
    return {str(entry.id) for entry in shelf.entries.values() if engine.declared.holds(entry, shelf)}


def slugs(engine: Engine) -> set[str]:
    return {entry.partition("@")[0] for entry in entries(engine)}


def here(engine: Engine) -> set[str]:
    return {model.hub_id or "" for model in engine.models(ModelState.READY)}


def small(seed: int) -> dict[str, bytes]:
    return {"model.safetensors": weights(seed, 100_000)}


def test_what_is_declared_now_is_fetched_and_what_is_no_more_may_go(bed: Bed) -> None:
    bed.hub.repos |= {"acme/a": repo(small(1)), "acme/b": repo(small(2))}

    async def test() -> None:
        async with bed.engine(models=(A,)) as engine:
            await until(lambda: here(engine), lambda found: found == {"acme/a"})
            assert slugs(engine) == {"hf--acme--a"}
            with pytest.raises(RequestError, match="it is declared with pin = true") as refused:
                await engine.remove("acme/a")
            assert refused.value.code is Code.PINNED
            with pytest.raises(RequestError, match="it is declared with pin = true"):
                await engine.pin("acme/a", False)
            cluster = Reader(engine)
            declare(engine, B)
            await until(lambda: here(engine), lambda found: found == {"acme/a", "acme/b"})
            assert slugs(engine) == {"hf--acme--b"}
            facts = cluster.read()
            assert facts is not None
            assert facts.declared == ("hf://acme/b",)
            assert not (await engine.model("acme/a")).pinned
            await engine.remove("acme/a")
            declare(engine, A, B)
            await until(lambda: here(engine), lambda found: found == {"acme/a", "acme/b"})
            asked = len(bed.hub.requests)
            declare(engine, B, A)
            assert len(bed.hub.requests) == asked, "the same in another order is nothing new"
        async with bed.engine(models=(B,)) as engine:
            assert not (await engine.model("acme/a")).pinned, "a declaration that went while no daemon ran holds nothing either"
            assert slugs(engine) == {"hf--acme--b"}

    run(test())


def test_a_pin_by_hand_outlives_the_declaration(bed: Bed) -> None:
    bed.hub.repos["acme/a"] = repo(small(1))

    async def test() -> None:
        async with bed.engine(models=(A,)) as engine:
            await until(lambda: here(engine), bool)
            await engine.pin("acme/a", True)
            declare(engine)
            assert (await engine.model("acme/a")).pinned
            assert not (await engine.pin("acme/a", False)).pinned

    run(test())


def test_an_older_revision_is_not_what_is_declared(bed: Bed) -> None:
    source = bed.hub.repos["acme/a"] = repo(small(1))

    async def test() -> None:
        async with bed.engine(models=(A,)) as engine:
            await until(lambda: [job.state for job in engine.jobs()], lambda states: states == [JobState.DONE])
            (first,) = engine.models(ModelState.READY)
            source.push(small(3))
            second = await ready(engine, "acme/a")
            assert entries(engine) == {second.entry}
            assert [(await engine.model(entry)).pinned for entry in (first.entry, second.entry)] == [False, True]

    run(test())


def test_a_name_that_a_declared_model_takes_means_it_at_once(bed: Bed, tmp_path: Path) -> None:
    place = tmp_path / "weights"
    place.mkdir()
    (place / "model.safetensors").write_bytes(weights(1, 100_000))
    bed.hub.repos["acme/a"] = repo(small(2))

    async def test() -> None:
        async with bed.engine() as engine:
            declare(engine, ModelSetting(ref=f"file://{place}", alias="acme/a"))
            status = await ready(engine, "acme/a")
            assert status.ref.startswith("file://")
            assert entries(engine) == {status.entry}

    run(test())


def test_one_that_keeps_failing_is_tried_no_more_and_a_fill_under_way_goes_on(bed: Bed) -> None:
    bed.hub.repos["acme/b"] = repo()
    slow = bed.hub.faults.add("model.safetensors", Kind.TRICKLE, times=None, after=2**20, seconds=0.02)
    none = ModelSetting(ref="acme/none")

    async def test() -> None:
        async with bed.engine(models=(none, B), lanes=1) as engine:
            session = engine.session
            assert session is not None
            await until(lambda: [job for job in engine.jobs() if job.state is JobState.FAILED], bool)
            (job,) = await until(lambda: [job for job in engine.jobs() if job.state is JobState.FETCHING], bool)
            await until(lambda: slow.hits, bool)
            keeping = dict(session._keeping)
            declare(engine)
            assert not session._keeping
            await until(keeping[none].cancelled, bool)
            bed.hub.faults.clear()
            assert (await end_of(engine, job)).state is JobState.DONE
            assert here(engine) == {"acme/b"}
            assert entries(engine) == set()

    run(test())


def test_what_is_declared_while_there_is_no_store_is_fetched_onto_the_next(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos |= {"acme/a": repo(small(1)), "acme/b": repo(small(2))}

    async def test() -> None:
        async with bed.engine(disks.link, models=(A,)) as engine:
            declare(engine, B)
            disks.mounted(bed.place / "stripe" / "store", "one")
            await until(lambda: here(engine), lambda found: found == {"acme/b"})
            assert bed.hub.seen("*acme/a*") == []

    run(test())


def test_other_settings_stay_as_they_were(bed: Bed) -> None:
    async def test() -> None:
        async with bed.engine() as engine:
            before = engine.settings
            engine.converge(settings.load(flags={"lanes": 9, "allow": ("hf://x/*",)}, environ={}, uid=1000))
            assert engine.settings == before.model_copy(update={"allow": ("hf://x/*",)})

    run(test())
