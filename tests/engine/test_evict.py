"""Room is made by removing models, least recently used first, and never one that somebody holds."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nvcache.core.states import ModelState
from nvcache.engine.engine import Engine
from nvcache.engine.ensure import Ensurer
from nvcache.engine.fetch import Fetcher
from nvcache.engine.lookup import Lookup
from nvcache.engine.remove import Remover
from nvcache.engine.status import JobStatus
from nvcache.errors import Code, RequestError, SpaceError
from nvcache.settings import ModelSetting
from tests.engine.conftest import BOUND, Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind

MB = 1_000_000
SIZE = 10 * MB


def stock(bed: Bed, names: Iterable[str]) -> None:
    """Models of some 10 MB each, with nothing in common."""
    for seed, name in enumerate(names):
        bed.hub.repos[f"acme/{name}"] = repo({"model.safetensors": weights(seed, SIZE)})


async def warmed(engine: Engine, *names: str) -> None:
    """Make them ready, one after the other, the first used longest ago."""
    for at, name in enumerate(names):
        model = await ready(engine, f"acme/{name}")
        used(engine, model.entry, 1000.0 + at)


def used(engine: Engine, entry: str, when: float) -> None:
    """As if the model was last used then (unix seconds)."""
    assert engine.session is not None
    shelf = engine.session.do.shelf
    next(each for each in shelf.entries.values() if str(each.id) == entry).last_used = when


def here(engine: Engine) -> set[str]:
    """Names of what is ready."""
    return {model.ref.removeprefix("hf://acme/").partition("@")[0] for model in engine.models() if model.state is ModelState.READY}


def test_the_model_used_longest_ago_makes_way(bed: Bed) -> None:
    stock(bed, "abcd")

    async def test() -> None:
        async with bed.engine(max_bytes=35 * MB, evict_high=1.0, evict_low=1.0) as engine:
            await warmed(engine, "a", "b", "c")
            for name in "bca":  # asked for just now, a last
                await engine.model(f"acme/{name}")
            foreseen = await engine.dry_run(wish("acme/d"))
            assert (foreseen.fits, len(foreseen.would_evict)) == (True, 1)
            assert foreseen.would_evict[0].startswith("hf--acme--b@")
            assert here(engine) == {"a", "b", "c"}, "a dry run removes nothing"
            fill = next(job.id for job in engine.jobs() if job.entry == foreseen.would_evict[0])
            await ready(engine, "acme/d")
            assert engine.job(fill).state == "done", "whoever waited for it and asks late"
            assert here(engine) == {"a", "c", "d"}
            assert (engine.counters.evictions, engine.counters.evicted_bytes // MB) == (1, 10)
            assert not list(bed.store.glob("models/hf--acme--b"))
            assert engine.space().used <= 35 * MB

    run(test())


def test_what_is_pinned_leased_or_declared_stays_and_is_named(bed: Bed) -> None:
    stock(bed, "abcd")

    async def test() -> None:
        async with bed.engine(max_bytes=35 * MB, models=(ModelSetting(ref="acme/c"),)) as engine:
            await warmed(engine, "a", "b", "c")
            await engine.pin("acme/a", True)
            lease = await engine.lease("acme/b", "the pod", 600)
            failed = await end_of(engine, await engine.ensure(wish("acme/d")))
            assert failed.error is not None
            assert failed.error.code is Code.FULL
            for words in ("pinned", "leased", "declared", "would free 0 bytes"):
                assert words in failed.error.message
            held = failed.error.facts["in_the_way"]
            assert isinstance(held, list)
            assert {each["entry"].partition("@")[0] for each in held} == {f"hf--acme--{name}" for name in "abc"}
            assert here(engine) == {"a", "b", "c"}
            refused = (await engine.dry_run(wish("acme/d"))).refusal
            assert refused is not None
            assert "leased" in refused.message
            assert "the pod" not in f"{failed.error}{refused}", "whose a lease is, is not for everybody who asks for a model"
            await engine.release("acme/b", lease.lease)
            await ready(engine, "acme/d")
            assert here(engine) == {"a", "c", "d"}

    run(test())


def test_what_could_not_make_enough_room_is_left_alone(bed: Bed) -> None:
    stock(bed, "ab")
    bed.hub.repos["acme/large"] = repo({"model.safetensors": weights(9, 28 * MB)})

    async def test() -> None:
        async with bed.engine(max_bytes=30 * MB) as engine:
            await warmed(engine, "a", "b")
            await engine.pin("acme/b", True)
            failed = await end_of(engine, await engine.ensure(wish("acme/large")))
            assert failed.error is not None
            assert failed.error.code is Code.FULL
            assert here(engine) == {"a", "b"}, "nothing goes in vain"

    run(test())


def test_a_model_that_a_process_reads_goes_last_and_stays_whole_for_it(bed: Bed) -> None:
    stock(bed, "abcd")

    async def test() -> None:
        async with bed.engine(max_bytes=25 * MB) as engine:
            await warmed(engine, "a", "b")
            path = Path((await engine.model("acme/a")).path or "") / "model.safetensors"
            expected = path.read_bytes()
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                used(engine, (await engine.model("acme/a")).entry, 1.0)
                await ready(engine, "acme/c")
                assert here(engine) == {"a", "c"}, "the newer one goes: nobody reads it"
                used(engine, (await engine.model("acme/c")).entry, 2.0)
                lease = await engine.lease("acme/c", "pod", 600)
                await ready(engine, "acme/d")
                assert here(engine) == {"c", "d"}
                assert mapped[:] == expected
                await engine.release("acme/c", lease.lease)

    run(test())


def test_content_that_a_running_fill_counts_on_is_not_freed(bed: Bed) -> None:
    shared = weights(1, SIZE)
    bed.hub.repos["acme/a"] = repo({"model.safetensors": shared})
    bed.hub.repos["acme/b"] = repo({"one.safetensors": shared, "two.safetensors": weights(2, SIZE)})

    async def test() -> None:
        async with bed.engine(max_bytes=25 * MB) as engine:
            await warmed(engine, "a")
            model = await ready(engine, "acme/b")
            assert model.fetched_bytes < 1.5 * SIZE, "the shared file was here"
            assert here(engine) == {"a", "b"}
            assert engine.counters.evictions == 0

    run(test())


def test_content_that_a_fill_counts_on_is_kept_by_the_eviction_for_it(bed: Bed) -> None:
    """The new revision has a file of the old one, and no room beside it."""
    shared = weights(1, SIZE)
    source = bed.hub.repos["acme/m"] = repo({"one.safetensors": shared, "two.safetensors": weights(2, SIZE)})

    async def test() -> None:
        async with bed.engine(max_bytes=25 * MB) as engine:
            old = await ready(engine, "acme/m")
            source.push({"one.safetensors": shared, "two.safetensors": weights(3, SIZE)})
            assert (await engine.dry_run(wish("acme/m"))).would_evict == (old.entry,)
            sent = bed.hub.bytes_sent("one.safetensors")
            new = await ready(engine, "acme/m")
            assert [model.entry for model in engine.models()] == [new.entry]
            assert bed.hub.bytes_sent("one.safetensors") == sent, "it was here"

    run(test())


def test_an_operator_makes_room_by_hand_and_looks_first(bed: Bed) -> None:
    stock(bed, "abc")

    async def test() -> None:
        async with bed.engine(max_bytes=35 * MB) as engine:
            await warmed(engine, "a", "b", "c")
            plan = await engine.evict(20 * MB, dry_run=True)
            assert ([str(each["entry"]).partition("@")[0] for each in plan.victims], plan.enough) == (["hf--acme--a", "hf--acme--b"], True)
            assert here(engine) == {"a", "b", "c"}
            await engine.pin("acme/a", True)
            done = await engine.evict(20 * MB, dry_run=False)
            assert here(engine) == {"a"}
            assert (done.freed // MB, done.short // MB) == (20, 15)
            assert (await engine.evict(20 * MB, dry_run=False)).victims == (), "there is room now"
            with pytest.raises(SpaceError) as full:
                await engine.evict(30 * MB, dry_run=False)
            assert full.value.code is Code.FULL
            assert "pinned" in str(full.value)
            with pytest.raises(SpaceError) as never:
                await engine.evict(36 * MB, dry_run=False)
            assert never.value.code is Code.TOO_LARGE

    run(test())


def test_what_nobody_wants_goes_before_any_model(bed: Bed) -> None:
    """A fill that was cancelled left its room taken: that is enough, for the operator and for the marks."""
    stock(bed, "ab")
    bed.hub.repos["acme/left"] = repo({"model.safetensors": weights(9, 3 * SIZE)})

    async def leave(engine: Engine) -> None:
        stall = bed.hub.faults.add("/acme/left/*", Kind.STALL, times=None, after=1000, seconds=BOUND)
        job = await engine.ensure(wish("acme/left"))
        assert isinstance(job, JobStatus)
        await until(lambda: stall.hits, bool)
        await engine.cancel(job.id)
        bed.hub.faults.clear()
        assert engine.space().used >= 5 * SIZE, "it is taken"

    async def test() -> None:
        async with bed.engine(max_bytes=55 * MB, evict_high=0.9, evict_low=0.4, stall_timeout=BOUND, fetch_deadline=BOUND) as engine:
            assert engine.session is not None
            await warmed(engine, "a", "b")
            await leave(engine)
            done = await engine.evict(30 * MB, dry_run=False)
            assert (done.victims, done.enough) == ((), True)
            await leave(engine)
            await engine.session.evictor.keep_to_marks()
            assert engine.space().used < 3 * SIZE
            assert here(engine) == {"a", "b"}

    run(test())


def test_what_is_too_large_and_what_is_full_are_told_apart_before_a_byte_is_fetched(bed: Bed) -> None:
    """Pinned models fill the cache: one that would fit without them is told so, with their names; one that never fits is told that."""
    stock(bed, "abc")
    bed.hub.repos["acme/huge"] = repo({"model.safetensors": weights(9, 36 * MB)})

    async def test() -> None:
        async with bed.engine(max_bytes=25 * MB) as engine:
            await warmed(engine, "a", "b")
            pinned = [(await engine.pin(f"acme/{name}", True)).entry for name in "ab"]
            sent = bed.hub.bytes_sent()
            full = (await end_of(engine, await engine.ensure(wish("acme/c")))).error
            assert full is not None
            assert full.code is Code.FULL
            assert all(entry in full.message for entry in pinned)
            never = (await end_of(engine, await engine.ensure(wish("acme/huge")))).error
            assert never is not None
            assert (never.code, never.retryable) == (Code.TOO_LARGE, False)
            assert bed.hub.bytes_sent() == sent

    run(test())


def test_above_the_high_mark_the_store_shrinks_to_the_low_one(bed: Bed) -> None:
    stock(bed, "abcd")

    async def test() -> None:
        async with bed.engine(max_bytes=41 * MB, evict_high=0.95, evict_low=0.5) as engine:
            assert engine.session is not None
            await warmed(engine, "a", "b", "c")
            await engine.session.evictor.keep_to_marks()
            assert here(engine) == {"a", "b", "c"}, "below the mark"
            await warmed(engine, "d")
            used(engine, (await engine.model("acme/d")).entry, 2000.0)
            await engine.session.evictor.keep_to_marks()
            assert here(engine) == {"c", "d"}
            await engine.session.evictor.keep_to_marks()
            assert here(engine) == {"c", "d"}

    run(test())


def test_many_fills_at_once_share_the_room_and_none_hangs(bed: Bed) -> None:
    """Each evicts for itself while others hold their entries' locks; what does not fit is told, what fits is whole."""
    stock(bed, "abcdefgh")

    async def test() -> None:
        async with bed.engine(max_bytes=35 * MB, workers=2) as engine:
            await warmed(engine, "a", "b", "c")
            jobs = [await engine.ensure(wish(f"acme/{name}")) for name in "defgh"]
            ended = [await end_of(engine, job) for job in jobs if isinstance(job, JobStatus)]
            codes = {status.error.code for status in ended if status.error is not None}
            assert codes <= {Code.FULL}
            assert engine.space().used <= 35 * MB
            for model in engine.models(ModelState.READY):
                assert (Path(model.path or "") / "model.safetensors").stat().st_size > SIZE

    run(test())


def test_a_lease_that_comes_while_it_is_being_evicted_wins_or_is_refused(bed: Bed) -> None:
    stock(bed, "abc")

    async def test() -> None:
        async with bed.engine(max_bytes=25 * MB) as engine:
            for _ in range(5):
                await warmed(engine, "a", "b")
                job = await engine.ensure(wish("acme/c"))
                lease = None
                refused = {Code.NOT_READY}
                try:
                    lease = await engine.lease("acme/a", "pod", 600)
                except RequestError as error:
                    refused = {error.code}
                assert refused <= {Code.NOT_READY, Code.UNKNOWN_MODEL}
                await end_of(engine, job)
                if lease is not None:
                    assert "a" in here(engine)
                    await engine.release("acme/a", lease.lease)
                await until(lambda: [job for job in engine.jobs() if not job.state.ended], lambda left: not left)
                for model in engine.models():
                    await engine.remove(model.entry)

    run(test())


def test_what_went_counts_when_another_was_taken_up_meanwhile(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(bed, "abc")
    bed.hub.repos["acme/d"] = repo({"model.safetensors": weights(9, 18 * MB)})
    evict = Remover.evict

    async def test() -> None:
        async with bed.engine(max_bytes=35 * MB, evict_high=1.0, evict_low=1.0) as engine:
            await warmed(engine, "a", "b", "c")

            async def late(self: Remover, entry: Any, why: str) -> None:
                if "--b" in entry.slug:
                    await engine.lease("acme/b", "pod", 600)
                await evict(self, entry, why)

            monkeypatch.setattr(Remover, "evict", late)
            await ready(engine, "acme/d")
            assert here(engine) == {"b", "d"}

    run(test())


def test_what_is_held_above_the_mark_costs_nobody_else_his_place(bed: Bed) -> None:
    """What would go is fetched again at the next wish, and would go again: it goes when its room is needed."""
    stock(bed, "abcd")

    async def test() -> None:
        async with bed.engine(max_bytes=41 * MB, evict_high=0.7, evict_low=0.5) as engine:
            assert engine.session is not None
            await warmed(engine, "a", "b", "c")
            for name in "abc":
                await engine.pin(f"acme/{name}", True)
            await warmed(engine, "d")
            await engine.session.evictor.keep_to_marks()
            assert here(engine) == {"a", "b", "c", "d"}

    run(test())


def test_what_was_just_fetched_is_not_the_first_to_go(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was resolved before the fetch, which took an hour; all others were used since."""
    stock(bed, "abcd")
    resolve = Ensurer._resolve

    async def long_ago(self: Ensurer, *args: Any) -> Any:
        resolved, moment = await resolve(self, *args)
        return resolved, moment - 3600

    async def test() -> None:
        async with bed.engine(max_bytes=41 * MB, evict_high=0.7, evict_low=0.6) as engine:
            assert engine.session is not None
            for name in "abc":
                await ready(engine, f"acme/{name}")
                await engine.model(f"acme/{name}")
            monkeypatch.setattr(Ensurer, "_resolve", long_ago)
            job = await engine.ensure(wish("acme/d"))
            assert (await end_of(engine, job)).error is None
            await engine.session.evictor.keep_to_marks()
            assert "d" in here(engine)
            assert len(here(engine)) == 2

    run(test())


def test_room_that_was_promised_is_given_back_by_a_fill_that_ends_before_it_begins(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(bed, "a")
    here_first, looked = Fetcher.here, 0

    async def stuck(self: Fetcher, plan: Any) -> Any:
        nonlocal looked
        looked += 1
        if looked == 2:
            await asyncio.sleep(BOUND)
        return await here_first(self, plan)

    async def test() -> None:
        async with bed.engine(max_bytes=15 * MB) as engine:
            monkeypatch.setattr(Fetcher, "here", stuck)
            job = await engine.ensure(wish("acme/a"))
            assert isinstance(job, JobStatus)
            await until(lambda: looked, lambda looked: looked == 2)
            assert engine.space().reserved >= SIZE
            await engine.cancel(job.id)
            assert engine.space().reserved == 0
            await ready(engine, "acme/a")

    run(test())


def test_a_model_that_goes_while_it_is_asked_for_is_fetched_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(bed, "a")
    check = Lookup.check

    async def test() -> None:
        async with bed.engine(resolve_ttl=600.0) as engine:
            status = await ready(engine, "acme/a")

            async def late(self: Lookup, entry: Any) -> Any:
                monkeypatch.setattr(Lookup, "check", check)
                await engine.remove(status.entry)
                return await check(self, entry)

            monkeypatch.setattr(Lookup, "check", late)
            answer = await engine.ensure(wish("acme/a"))
            assert isinstance(answer, JobStatus), f"it is {answer}"
            assert (await end_of(engine, answer)).error is None
            assert here(engine) == {"a"}

    run(test())


def test_a_pin_that_comes_while_it_is_being_evicted_wins(bed: Bed) -> None:
    """Not half: its views are not made anew beside their removal, and the pin is not forgotten with the state."""
    stock(bed, "a")

    async def test() -> None:
        async with bed.engine(resolve_ttl=600.0) as engine:
            assert engine.session is not None
            status = await ready(engine, "acme/a")
            catalog, gate = engine.session.do.catalog, asyncio.Event()
            loop, write = asyncio.get_running_loop(), catalog.write_state

            def slow(*args: Any) -> None:
                asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(BOUND)
                write(*args)

            catalog.write_state = slow  # type: ignore[method-assign]
            pinning = asyncio.create_task(engine.ensure(wish("acme/a", pin=True)))
            (entry,) = engine.session.do.shelf.entries.values()
            await until(lambda: entry.changing, bool)
            with pytest.raises(RequestError) as refused:
                await engine.remove(status.entry)
            assert refused.value.code is Code.IN_USE
            gate.set()
            assert (await pinning).state is ModelState.READY
            with pytest.raises(RequestError) as refused:
                await engine.remove(status.entry)
            assert refused.value.code is Code.PINNED

    run(test())


@pytest.mark.parametrize("free", [0, 5])
def test_the_error_of_admission_tells_how_much_is_short(free: int) -> None:
    from nvcache.core.evict import Candidate, plan_eviction
    from nvcache.core.space import Room, admit, in_the_way, shortfall

    with pytest.raises(SpaceError) as raised:
        admit(Room(limit=100, used=100 - free, reserved=0, free=1000), 50, what="x")
    assert shortfall(raised.value) == 50 - free
    told = in_the_way(raised.value, plan_eviction(50, [Candidate("m@1", {"b": 60}, 0.0, ("pinned",))]))
    assert "m@1 (60 bytes: pinned)" in str(told)
