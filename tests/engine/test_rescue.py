"""Files of a known SHA-256 from other local models and from mirrors: the source is spared, and no mirror can spoil or hold up a fill."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.core.states import JobState, ModelState
from nvcache.engine import clock
from nvcache.engine.engine import Engine
from nvcache.engine.status import JobStatus
from nvcache.errors import Code
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.engine.test_keep import flip
from tests.support.azurite import Azurite
from tests.support.faults import Kind
from tests.support.mirror import MirrorServer

SIZE = 40_000_000
FILE = "model.safetensors"


@pytest.fixture
def mirror() -> Iterator[MirrorServer]:
    """A mirror with nothing."""
    with MirrorServer() as serving:
        yield serving


def named(url: str, name: str = "near", **given: object) -> dict[str, object]:
    """A `[[mirrors]]` table."""
    return {"url": url, "name": name, **given}


def both(bed: Bed, mirror: MirrorServer) -> bytes:
    """One model at the Hub and at the mirror; its weights."""
    source = bed.hub.repos["acme/m"] = mirror.repos["acme/m"] = repo()
    content = source.commits[source.commit][FILE].source
    assert isinstance(content, bytes)
    return content


def check(bed: Bed, content: bytes) -> None:
    """Every view of acme/m shows the right bytes."""
    found = [data for path, data in bed.shown().items() if path.endswith(FILE) and "acme--m" in path]
    assert found
    assert all(data == content for data in found), "wrong bytes are shown"


def test_what_another_local_model_has_is_asked_of_nobody(bed: Bed, mirror: MirrorServer) -> None:
    """Other models of the node come before mirrors, those before the source."""
    content = both(bed, mirror)
    bed.hub.repos["acme/copy"] = repo({FILE: content, "config.json": b'{"a": 1}'})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
        asked = len(bed.hub.seen(FILE))
        async with bed.engine(mirrors=(named(mirror.by_digest),)) as engine:
            await ready(engine, "acme/copy")
            assert engine.counters.reused_bytes == len(content)
        assert len(bed.hub.seen(FILE)) == asked
        assert mirror.requests == []

    run(test())


@pytest.mark.parametrize("template", ["by_digest", "by_name"])
def test_a_mirror_spares_the_source(bed: Bed, mirror: MirrorServer, template: str) -> None:
    """What it has comes from it; what has no published SHA-256 is not asked of it. Credentials for the source stay with the source."""
    content = both(bed, mirror)

    async def test() -> None:
        async with bed.engine(mirrors=(named(getattr(mirror, template)),)) as engine:
            await ready(engine, "acme/m")
            assert engine.counters.mirror_bytes == {"near": len(content)}
            assert engine.counters.mirror_failures == {}
        check(bed, content)
        assert bed.hub.bytes_sent(FILE) == 0
        assert bed.hub.bytes_sent("config.json") == 2
        assert {request.path.rpartition("/")[2] for request in mirror.requests} <= {FILE, *_digests(bed)}
        assert not [request for request in mirror.requests if "authorization" in request.headers]

    run(test())


def _digests(bed: Bed) -> set[str]:
    return {path.name for path in bed.store.glob("blobs/sha256/*/*")}


def test_a_mirror_that_lacks_it_is_no_worse_than_none(bed: Bed, mirror: MirrorServer) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest),)) as engine:
            await ready(engine, "acme/m")
            assert engine.counters.mirror_failures == {}, "to lack a file is no failure"
            bed.hub.repos["acme/n"] = mirror.repos["acme/n"] = repo({FILE: weights(5, 100_000)})
            await ready(engine, "acme/n")
            assert engine.counters.mirror_bytes["near"] > 100_000, "and it is asked for the next one"

    run(test())


FAULTS = {
    "refused": ({"kind": Kind.STATUS, "status": 403}, Code.SOURCE_FORBIDDEN),
    "error": ({"kind": Kind.STATUS, "status": 500}, Code.SOURCE_FAILED),
    "busy": ({"kind": Kind.BUSY, "seconds": 2}, Code.SOURCE_BUSY),
    "portal": ({"kind": Kind.PORTAL}, Code.SOURCE_PROTOCOL),
    "pointer": ({"kind": Kind.POINTER}, Code.POINTER_FILE),
    "gzip": ({"kind": Kind.GZIP}, Code.SOURCE_PROTOCOL),
    "loop": ({"kind": Kind.REDIRECT_LOOP}, Code.SOURCE_PROTOCOL),
    "elsewhere": ({"kind": Kind.STATUS, "status": 302, "headers": {"Location": "http://127.0.0.3:9/x"}}, Code.SOURCE_PROTOCOL),
    "size": ({"kind": Kind.WRONG_TOTAL}, Code.SIZE_MISMATCH),
    "reset": ({"kind": Kind.RESET, "after": 3_000_000}, Code.SOURCE_UNREACHABLE),
    "truncated": ({"kind": Kind.TRUNCATE, "after": 3_000_000}, Code.SOURCE_UNREACHABLE),
    "stall": ({"kind": Kind.STALL, "after": 20_000_000, "whole": True}, Code.SOURCE_STALLED),
    "trickle": ({"kind": Kind.TRICKLE, "after": 65536, "seconds": 0.2}, Code.SOURCE_STALLED),
    "other bytes": ({"kind": Kind.CALL}, Code.DIGEST_MISMATCH),
    "a flipped byte": ({"kind": Kind.FLIP, "after": 12345}, Code.DIGEST_MISMATCH),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_mirror_costs_nothing_but_a_little_time(bed: Bed, mirror: MirrorServer, fault: str) -> None:
    """Whatever it does, the model is right and comes at once; afterwards the mirror is left alone, and the reason is told."""
    content = both(bed, mirror)
    given, code = FAULTS[fault]
    mirror.faults.add("*", times=None, **given)  # type: ignore[arg-type]
    if fault == "other bytes":
        mirror.lies = {sha256: bytes(len(content)) for sha256 in _sha256(bed)}
    patience = 1.0 if code is Code.SOURCE_STALLED else 5.0

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest),), stall_timeout=patience) as engine:
            await ready(engine, "acme/m")
            assert engine.counters.mirror_failures == {("near", str(code)): 1}
            assert engine.counters.verify_failures == 0, "the source's bytes were right"
            asked = len(mirror.requests)
            bed.hub.repos["acme/n"] = repo({FILE: weights(5, 100_000)})
            await ready(engine, "acme/n")
            assert len(mirror.requests) == asked, "it was to be left alone"
        check(bed, content)

    run(test())


def test_a_mirror_that_is_not_there_or_does_not_answer(bed: Bed, mirror: MirrorServer) -> None:
    """The next one is asked; one that answers nothing is given up within the time for a stall."""
    content = both(bed, mirror)

    async def test() -> None:
        with _deaf() as port:
            closed = named(f"http://127.0.0.1:{_free_port()}/{{sha256}}", "closed")
            deaf = named(f"http://127.0.0.1:{port}/{{sha256}}", "deaf")
            async with bed.engine(mirrors=(closed, deaf, named(mirror.by_digest))) as engine:
                await ready(engine, "acme/m")
                assert engine.counters.mirror_failures == {("closed", "source-unreachable"): 1, ("deaf", "source-stalled"): 1}
                assert engine.counters.mirror_bytes == {"near": len(content)}
        assert bed.hub.bytes_sent(FILE) == 0

    run(test())


@contextlib.contextmanager
def _deaf() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_rest_ends(bed: Bed, mirror: MirrorServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while a mirror is asked again, and twice as much later after the next failure."""
    both(bed, mirror)
    monkeypatch.setattr("nvcache.engine.rescue.clock", _Clock)
    mirror.faults.add("*", Kind.STATUS, status=500, times=2)

    async def fetch(engine: Engine, number: int) -> int:
        before = len(mirror.requests)
        name = f"acme/m{number}"
        bed.hub.repos[name] = mirror.repos[name] = repo({FILE: weights(number, 5000 + number)})
        await ready(engine, name)
        return len(mirror.requests) - before

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest),)) as engine:
            assert await fetch(engine, 1) == 1, "it fails"
            assert await fetch(engine, 2) == 0
            _Clock.ahead += 15
            assert await fetch(engine, 3) == 1, "it fails again"
            _Clock.ahead += 15
            assert await fetch(engine, 4) == 0
            _Clock.ahead += 15
            assert await fetch(engine, 5) == 1, "it is good again"
            assert await fetch(engine, 6) == 1

    run(test())


class _Clock:
    ahead = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return clock.monotonic() + cls.ahead


def test_what_a_mirror_spoilt_before_it_broke_off_is_fetched_anew_and_nothing_else(bed: Bed, mirror: MirrorServer) -> None:
    """Two mirrors: one sends wrong bytes and breaks off, the other goes on where it stopped. Only what the first one sent is fetched again."""
    content = both(bed, mirror)
    with MirrorServer(mirror.repos) as bad:
        bad.lies[next(iter(_sha256(bed)))] = bytes(len(content))

        async def test() -> None:
            bad.faults.add("*", Kind.CALL)  # a good answer, and then none
            second = bad.faults.add("*", Kind.STATUS, status=500, times=None)
            async with bed.engine(lanes=1, mirrors=(named(bad.by_digest, "bad"), named(mirror.by_digest, "good"))) as engine:
                await ready(engine, "acme/m")
                assert second.hits == 1
                chunk = 16 * 2**20
                assert engine.counters.mirror_bytes == {"bad": chunk, "good": len(content)}
                assert ("bad", "digest-mismatch") in engine.counters.mirror_failures
                assert not [name for name, _ in engine.counters.mirror_failures if name == "good"], "the honest one is not blamed"
            check(bed, content)
            assert bed.hub.bytes_sent(FILE) == 0

        run(test())


def _sha256(bed: Bed) -> list[str]:
    source = bed.hub.repos["acme/m"]
    return [blob.sha256 for blob in source.commits[source.commit].values() if blob.sha256]


# -- without the source


def test_with_the_source_down_a_planned_fill_ends_by_a_mirror(bed: Bed, mirror: MirrorServer) -> None:
    """The plan names the revision and the digests: nobody but the mirror is needed for the weights."""
    content = both(bed, mirror)
    bed.hub.faults.add(FILE, Kind.TRICKLE, times=None, after=2**20, seconds=0.02)

    async def test() -> None:
        async with bed.engine(lanes=1) as engine:
            job = await engine.ensure(wish("acme/m"))
            assert isinstance(job, JobStatus)
            await until(lambda: engine.job(job.id).progress.bytes_fetched, lambda fetched: fetched > 2 * 2**20)
        bed.hub.faults.clear()
        bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*", method="*")
        async with bed.engine(lanes=1, mirrors=(named(mirror.by_digest),)) as engine:
            await until(lambda: [model for model in engine.models() if model.state is ModelState.READY], bool)
            assert engine.counters.mirror_bytes["near"] > 2 * 2**20
        check(bed, content)

    run(test())


@pytest.mark.parametrize("gone", [False, True], ids=["down", "gone"])
def test_bytes_that_went_bad_come_back_from_a_mirror(bed: Bed, mirror: MirrorServer, gone: bool) -> None:
    """A repair needs no source: the manifest knows every file's SHA-256, plain ones included. Only the bad chunk is fetched."""
    content = both(bed, mirror)

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest),)) as engine:
            status = await ready(engine, "acme/m")
            sent = mirror.sent()
            if gone:
                del bed.hub.repos["acme/m"]
            else:
                bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*", method="*")
            flip(Path(status.path or "") / FILE, 20_000_000)
            flip(Path(status.path or "") / "config.json", 0)
            job = await end_of(engine, await engine.verify(status.entry))
            assert job.state is JobState.DONE, job.error
            assert mirror.sent() - sent == 16 * 2**20 + 2
            assert (await engine.model(status.entry)).state is ModelState.READY
        check(bed, content)

    run(test())


def test_what_no_mirror_has_is_told_as_the_source_tells_it(bed: Bed, mirror: MirrorServer) -> None:
    """A mirror that lacks the bytes hides nothing: the model stays withdrawn, and says that its source has lost it."""
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest),)) as engine:
            status = await ready(engine, "acme/m")
            del bed.hub.repos["acme/m"]
            asked = len(bed.hub.seen(f"*{FILE}"))
            flip(Path(status.path or "") / FILE, 20_000_000)
            job = await end_of(engine, await engine.verify(status.entry))
            assert job.error is not None
            assert job.error.code is Code.REPOSITORY_NOT_FOUND, job.error
            assert len(bed.hub.seen(f"*{FILE}")) == asked, "it was not asked for what it does not list"
            seen = await engine.model(status.entry)
            assert seen.state is ModelState.DEGRADED
            assert seen.error is not None
            assert seen.error.code is Code.DEGRADED
            assert str(job.error.message) in seen.error.message, "who looks at the model need not look for the job"
            assert "nvcache rm" in seen.error.hint
            assert not list(bed.store.glob("ingest/plans/*"))

    run(test())


def test_a_lie_costs_a_repair_none_of_its_good_chunks(bed: Bed, mirror: MirrorServer) -> None:
    """What the disk still had is kept, and the source gives just the chunk that the mirror lied about."""
    content = both(bed, mirror)

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest),)) as engine:
            status = await ready(engine, "acme/m")
            mirror.lies = {sha256: bytes(len(content)) for sha256 in _sha256(bed)}
            flip(Path(status.path or "") / FILE, 20_000_000)
            job = await end_of(engine, await engine.verify(status.entry))
            assert job.state is JobState.DONE, job.error
            assert bed.hub.bytes_sent(FILE) == 16 * 2**20
        check(bed, content)

    run(test())


# -- credentials


def test_a_token_goes_to_the_mirror_it_is_for_and_is_read_when_it_is_needed(bed: Bed, mirror: MirrorServer, tmp_path: Path) -> None:
    both(bed, mirror)
    mirror.token, token = "right", tmp_path / "token"

    async def test() -> None:
        with MirrorServer() as other:
            async with bed.engine(mirrors=(named(other.by_digest, "other"), named(mirror.by_digest, token_file=token))) as engine:
                token.write_text("right\n")
                await ready(engine, "acme/m")
                assert engine.counters.mirror_failures == {}
            assert other.requests
            assert not [request for request in other.requests if "authorization" in request.headers]
        assert bed.hub.bytes_sent(FILE) == 0

    run(test())


def test_a_token_that_cannot_be_read_is_the_mirrors_failure(bed: Bed, mirror: MirrorServer, tmp_path: Path) -> None:
    both(bed, mirror)

    async def test() -> None:
        async with bed.engine(mirrors=(named(mirror.by_digest, token_file=tmp_path / "none"),)) as engine:
            await ready(engine, "acme/m")
            assert engine.counters.mirror_failures == {("near", "bad-config"): 1}
        assert mirror.requests == []

    run(test())


def test_a_container_is_a_mirror(bed: Bed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name, with a SAS out of a file; the SAS is told nobody. One that is refused is the mirror's failure."""
    source = bed.hub.repos["acme/m"] = repo()
    content = source.commits[source.commit][FILE].source
    assert isinstance(content, bytes)
    token = tmp_path / "sas"
    with Azurite(tmp_path / "azurite") as azurite:
        box = azurite.container()
        azurite.upload(box, f"acme/m/{FILE}", content)
        table = named(f"{azurite.url}/{box}/{{model}}/{{path}}", "blobs", token_file=token)

        async def test() -> None:
            async with bed.engine(mirrors=(table,)) as engine:
                token.write_text(f"{azurite.sas(box)}\n")
                status = await ready(engine, "acme/m")
                assert engine.counters.mirror_bytes == {"blobs": len(content)}
                await engine.remove(status.entry)
                token.write_text("sv=2024-01-01&sig=wrong")
                await ready(engine, "acme/m")
                assert [name for name, _ in engine.counters.mirror_failures] == ["blobs"]
            check(bed, content)
            assert bed.hub.bytes_sent(FILE) == len(content)

        run(test())
    assert "sig=" not in caplog.text
