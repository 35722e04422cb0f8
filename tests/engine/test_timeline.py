"""The story of a model: what a fill, a failure, a repair, a lease and a removal leave behind, and that it says where the time went."""

from __future__ import annotations

import asyncio
import json

import pytest

from nvcache.core.timeline import ENDS, PHASES, Event, Kind, slowest
from nvcache.engine.status import JobStatus
from nvcache.errors import RequestError
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind as Fault

SECRET = "hf_" + "s3cr3t" * 6


def kinds(events: list[Event]) -> list[Kind]:
    return [event.kind for event in events]


def one(events: list[Event], kind: Kind) -> Event:
    found = [event for event in events if event.kind is kind]
    assert len(found) == 1, events
    return found[0]


def test_a_cold_start_is_told_phase_by_phase(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    size = len(weights(1, 40_000_000))

    async def test() -> None:
        async with bed.engine() as engine:
            answer = await engine.ensure(wish("acme/m"), "uid=7/pid=8/")
            assert isinstance(answer, JobStatus)
            await end_of(engine, answer)
            events = await engine.timeline("acme/m")
            assert kinds(events)[:3] == [Kind.ASKED, Kind.RESOLVED, Kind.LISTED]
            assert kinds(events)[-2:] == [Kind.PUBLISHED, Kind.READY]
            assert {event.job for event in events} == {answer.id}
            assert one(events, Kind.ASKED).who == "uid=7/pid=8/"
            fetched, end = one(events, Kind.FETCHED), one(events, Kind.READY)
            assert (fetched.bytes, fetched.count, fetched.source) == (size + 2, 2, bed.hub.url)
            assert fetched.rate
            assert (end.bytes, end.revision) == (size + 2, (await engine.model("acme/m")).revision)
            phases = sum(event.seconds or 0.0 for event in events if event.kind in PHASES)
            assert end.seconds is not None
            assert 0.5 * end.seconds < phases <= end.seconds + 0.1
            assert slowest(events)

    run(test())


def test_what_a_source_does_wrong_is_told_with_its_code_and_counted(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("model.safetensors", Fault.BUSY, seconds=1, times=1)
    bed.hub.faults.add("model.safetensors", Fault.RESET, after=1000, times=1)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            events = await engine.timeline("acme/m")
            retried = {event.code: event for event in events if event.kind is Kind.RETRIED}
            assert retried.keys() == {"source-busy", "source-unreachable"}
            assert (retried["source-busy"].seconds or 0) >= 1
            assert "503" in (retried["source-busy"].what or "")
            assert slowest(events) == [one(events, Kind.FETCHED)]
            errors = engine.counters.source_errors
            assert {code: count for (_, code), count in errors.items()} == {code: event.count for code, event in retried.items()}
            assert engine.counters.source_bytes == {"hf": engine.counters.fetched_bytes}

    run(test())


def test_a_stall_shows_while_it_lasts(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    fault = bed.hub.faults.add("model.safetensors", Fault.STALL, after=1000, times=1)

    async def test() -> None:
        async with bed.engine(stall_timeout=20.0, lanes=1) as engine:
            job = await engine.ensure(wish("acme/m"))
            await until(lambda: fault.hits, bool)
            events = await engine.timeline("acme/m")
            assert [event.kind for event in events if event.going] == [Kind.FETCHED]
            fault.released.set()
            await end_of(engine, job)
            assert not [event for event in await engine.timeline("acme/m") if event.going]

    run(test())


def test_a_name_that_cannot_be_resolved_has_a_story_and_its_code(bed: Bed) -> None:
    async def test() -> None:
        async with bed.engine() as engine:
            for _ in range(4):
                await end_of(engine, await engine.ensure(wish("acme/none")))
            events = await engine.timeline("acme/none")
            assert kinds(events) == [Kind.ASKED, Kind.RESOLVED, Kind.FAILED] * 2  # the first, and the last three as one
            assert events[-1].count == 3
            assert {event.code for event in events if event.kind is Kind.FAILED} == {"repository-not-found"}
            assert engine.counters.source_errors == {("hf", "repository-not-found"): 4}
            with pytest.raises(RequestError, match="acme/other"):
                await engine.timeline("acme/other")

    run(test())


def test_who_joins_and_who_waits_for_another_job(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    fault = bed.hub.faults.add("model.safetensors", Fault.STALL, after=1000, times=1)

    async def test() -> None:
        async with bed.engine(stall_timeout=20.0) as engine:
            first = await engine.ensure(wish("acme/m"))
            for _ in range(20):
                await engine.ensure(wish("acme/m"), "again")
            other = await engine.ensure(wish("hf://acme/m@main"))
            await until(lambda: fault.hits, bool)
            assert isinstance(other, JobStatus)
            await until(lambda: engine.job(other.id).entry, bool)
            await asyncio.sleep(0.1)  # what is waited for has to take longer than what nobody need hear of
            fault.released.set()
            for job in (first, other):
                await end_of(engine, job)
            events = await engine.timeline("acme/m")
            asked = [event for event in events if event.kind is Kind.ASKED]
            assert [event.job for event in asked].count(other.id) == 1
            assert len(asked) < 10
            assert isinstance(first, JobStatus)
            waited = one(events, Kind.WAITED)  # whichever found out first what the name means goes first
            leader = other if waited.job == first.id else first
            assert waited.what == f"job {leader.id}, a fill of it"

    run(test())


def test_hits_are_noted_once_a_minute_and_leases_by_who_held_them(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            entry = (await ready(engine, "acme/m")).entry
            for _ in range(5):
                await engine.ensure(wish(f"hf://acme/m@{entry.partition('@')[2]}"), "vllm")
            lease = await engine.lease(entry, "pod-1", None)
            await engine.release(entry, lease.lease)
            await engine.lease(entry, "pod-2", 60.0)
            tail = (await engine.timeline(entry))[-4:]
            assert kinds(tail) == [Kind.HIT, Kind.LEASED, Kind.RELEASED, Kind.LEASED]
            assert [event.who for event in tail] == ["vllm", "pod-1", "pod-1", "pod-2"]
            await ready(engine, "acme/m")  # its name is resolved again, which is no start
            assert len(await engine.timeline(entry)) == len(await engine.timeline("acme/m"))
            assert kinds(await engine.timeline(entry)).count(Kind.ASKED) == 1
            assert tail[2].seconds is not None
            assert engine.counters.leases_taken == 2

    run(test())


def test_bytes_that_go_bad_and_their_repair(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            blob = max(bed.store.glob("blobs/sha256/*/*"), key=lambda path: path.stat().st_size)
            blob.chmod(0o644)
            with blob.open("r+b") as file:
                file.seek(20_000_000)
                file.write(b"bad")
            ended = await end_of(engine, await engine.verify("acme/m"))
            assert ended.error is None
            told = [event for event in await engine.timeline(status.entry) if event.job == ended.id or event.kind is Kind.WITHDRAWN]
            assert kinds(told)[:2] == [Kind.READ, Kind.WITHDRAWN]
            assert "model.safetensors" in (told[1].what or "")
            assert told[-1].kind is Kind.VERIFIED
            assert told[-1].what == "1 chunk was bad"
            assert engine.counters.repairs == 1

    run(test())


def test_the_story_outlives_the_model_and_the_daemon(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            await engine.remove("acme/m")
        async with bed.engine() as engine:
            events = await engine.timeline("hf--acme--m")
            assert kinds(events)[-2:] == [Kind.REMOVED, Kind.STARTED]
            assert (await engine.timeline("acme/m")) == events
            await ready(engine, "acme/m")
            events = await engine.timeline("acme/m")
            assert kinds(events).count(Kind.STARTED) == 1
            assert kinds(events)[-1] is Kind.READY

    run(test())


def test_an_eviction_says_for_what(bed: Bed) -> None:
    bed.hub.repos["acme/one"] = repo({"model.safetensors": weights(1, 40_000_000), "config.json": b"{}"})
    bed.hub.repos["acme/two"] = repo({"model.safetensors": weights(2, 40_000_000), "config.json": b"{}"})

    async def test() -> None:
        async with bed.engine(max_bytes=60_000_000) as engine:
            await ready(engine, "acme/one")
            await ready(engine, "acme/two")
            assert "acme/two" in (one(await engine.timeline("acme/one"), Kind.EVICTED).what or "")

    run(test())


def test_a_daemon_that_stops_and_one_that_is_cancelled_are_told_apart(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.repos["acme/n"] = repo({"model.safetensors": weights(2, 40_000_000)})
    fault = bed.hub.faults.add("model.safetensors", Fault.STALL, after=1000, times=2)

    async def test() -> None:
        async with bed.engine(stall_timeout=20.0, lanes=1) as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: fault.hits, bool)
            await engine.cancel(job.id)
            assert [event.kind for event in await engine.timeline("acme/m") if event.kind in ENDS] == [Kind.CANCELLED]
            await engine.ensure(wish("acme/n"))
            await until(lambda: fault.hits, lambda hits: hits == 2)
        bed.hub.faults.clear()
        async with bed.engine() as engine:
            await until(engine.jobs, lambda jobs: [job.state for job in jobs] == ["done"])
            events = await engine.timeline("acme/n")
            assert [event.kind for event in events if event.kind in ENDS] == [Kind.INTERRUPTED, Kind.READY]
            assert [event.what for event in events if event.kind is Kind.ASKED][-1] == "a fill that was cut short goes on"

    run(test())


def test_no_secret_reaches_a_story(bed: Bed) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("model.safetensors", Fault.STATUS, status=500, times=2)
    token = bed.place / "token"
    token.write_text(SECRET)

    async def test() -> None:
        async with bed.engine(hf_token_path=token) as engine:
            await end_of(engine, await engine.ensure(wish("acme/m"), f"Authorization: Bearer {SECRET}"))
            await engine.timeline("acme/m")  # what was noted is on the disk by then
            text = b"".join(path.read_bytes() for path in bed.store.glob("timelines/*")).decode()
            assert "retried" in text
            for part in (SECRET, "Signature", "X-Amz", "?"):
                assert part not in text
            for line in text.split("\n"):
                assert not line or isinstance(json.loads(line), dict)

    run(test())


def test_a_store_that_takes_no_notes_serves_all_the_same(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine() as engine:
            (bed.store / "timelines" / "hf--acme--m").mkdir()
            assert (await ready(engine, "acme/m")).path
            assert engine.problems() == ()
            assert "what happens is not noted" in caplog.text

    run(test())
