"""A stripe that comes, goes and is lost under a working engine: nothing is held, nobody hangs, and what was there comes back."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nvcache.core.states import JobState, ModelState
from nvcache.engine import follow, lookup
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeStatus
from nvcache.engine.status import ErrorInfo, JobStatus
from nvcache.errors import Code, ConfigError, DiskError, NvcacheError
from nvcache.store.views import Views
from tests.engine.conftest import Bed, DisksPart, end_of, ready, repo, run, until, weights, wish
from tests.support.disks import mounted
from tests.support.faults import Kind

MB = 1_000_000
PROMISED = 5.0  # seconds from the word to the acknowledgement


def family(pid: int) -> Iterator[int]:
    """A process and its children."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def held_below(place: Path) -> list[str]:
    """What this process and its workers have open, mapped or as working directory below `place`, by the kernel's own view."""
    found = []
    for pid in family(os.getpid()):
        proc = Path(f"/proc/{pid}")
        try:
            links = [*(proc / "fd").iterdir(), proc / "cwd", proc / "root"]
            maps = (proc / "maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for link in links:
            try:
                target = os.readlink(link)
            except FileNotFoundError:
                continue
            if target.startswith(f"{place}/"):
                found.append(f"{pid} {link.name} {target}")
        found += [f"{pid} maps {line}" for line in maps if f" {place}/" in line]
    return found


async def open_on(engine: Engine) -> None:
    """Wait until the engine serves."""
    await until(engine.problems, lambda problems: not problems)


async def gone(engine: Engine, place: Path, disks: DisksPart) -> None:
    """The engine let go in time, and that is true."""
    took = await disks.acknowledged(PROMISED)
    assert took < PROMISED
    assert held_below(place) == []
    assert engine.models() == []
    assert engine.leases() == []
    with pytest.raises(DiskError) as error:
        await engine.ensure(wish("acme/m"))
    assert error.value.code is Code.NO_STRIPE
    assert error.value.retryable


# -- coming and going


def test_a_stripe_that_comes_back_whole_costs_no_byte(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            await until(engine.problems, lambda problems: "stripe.json is not there" in problems[0])
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            before = await ready(engine, "acme/m", pin=True)
            lease = await engine.lease("acme/m", "pod", 600)
            assert held_below(bed.store), "the test must see what is held"
            disks.say(StripeStatus.WITHDRAWING, "R01", "nvme1n1 vanished")
            await gone(engine, bed.store, disks)
            assert "R01 nvme1n1 vanished" in engine.problems()[0]
            sent = bed.hub.bytes_sent()
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            after = await engine.model("acme/m")
            assert (after.state, after.revision, after.path, after.pinned) == (ModelState.READY, before.revision, before.path, True)
            assert [held.lease for held in engine.leases()] == [lease.lease], "leases are on the disk as well"
            assert not [job for job in engine.jobs() if not job.state.ended]
            assert bed.hub.bytes_sent() == sent
            assert engine.counters.stripe_losses == 0

    run(test())


def test_what_a_lost_stripe_held_is_fetched_onto_the_next(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 5 * MB), "config.json": b"{}", "extra.md": b"x"})
    bed.hub.repos["acme/n"] = repo({"model.safetensors": weights(2, 5 * MB), "config.json": b"{}"})
    first, second = tmp_path / "a" / "store", tmp_path / "b" / "store"

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(first, "uuid-a")
            await open_on(engine)
            m = await ready(engine, "acme/m", pin=True, exclude=("*.md",))
            n = await ready(engine, "acme/n")
            await engine.lease("acme/n", "pod", 600)
            bed.hub.repos["acme/m"].push({"model.safetensors": weights(3, 5 * MB), "config.json": b"{}"})  # main moves on
            disks.say(StripeStatus.WITHDRAWING, "R01", "nvme1n1 vanished")
            await gone(engine, first, disks)
            disks.say(StripeStatus.LOST, "R01", "nvme1n1 vanished")
            await gone(engine, first, disks)
            assert engine.counters.stripe_losses == 1
            fetched = engine.counters.fetched_bytes
            disks.mounted(second, "uuid-b")
            await open_on(engine)
            models = await until(lambda: engine.models(ModelState.READY), lambda found: len(found) == 2)
            assert {model.entry: model.pinned for model in models} == {m.entry: True, n.entry: False}
            assert {model.path for model in models} == {str(second / "models" / model.entry.replace("@", "/")) for model in (m, n)}
            again = next(model for model in models if model.entry == m.entry)
            assert again.files == m.files == 2, "the selection is kept"
            assert (await engine.model("acme/m@main")).revision == m.revision, "the moving name is kept"
            assert (second / "hub/models--acme--n/refs/main").read_text() == n.revision
            assert engine.leases() == []
            assert engine.counters.fetched_bytes > fetched, "counters go on"
            assert engine.counters.stripe_losses == 1, "one loss is one loss"

    run(test())


def test_what_changed_since_the_loss_is_fetched_as_it_is_now(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    """A source without commits keeps no old revision: the model comes back all the same."""
    place = tmp_path / "weights"
    place.mkdir()
    (place / "model.safetensors").write_bytes(weights(1, MB))

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(tmp_path / "a" / "store", "uuid-a")
            await open_on(engine)
            before = await ready(engine, f"file://{place}", alias="acme/m", pin=True)
            disks.say(StripeStatus.LOST, "R01", "nvme1n1 vanished")
            await gone(engine, tmp_path / "a" / "store", disks)
            (place / "README.md").write_text("new")
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            await open_on(engine)
            (after,) = await until(lambda: engine.models(ModelState.READY), bool)
            assert (after.files, after.hub_id, after.pinned) == (2, "acme/m", True)
            assert after.revision != before.revision

    run(test())


def test_a_loss_between_two_looks_is_noticed_by_the_contents(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(tmp_path / "a" / "store", "uuid-a")
            await open_on(engine)
            await ready(engine, "acme/m")
            disks.say(StripeStatus.LOST)
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            await until(lambda: engine.stripe()["fs_uuid"], lambda uuid: uuid == "uuid-b")
            await until(lambda: engine.models(ModelState.READY), lambda found: len(found) == 1)
            assert (tmp_path / "b/store/manifests").exists()
            assert engine.counters.stripe_losses == 1
            assert held_below(tmp_path / "a") == []

    run(test())


def test_news_about_the_same_contents_disturbs_nobody(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(bed.store, "uuid-a", warnings=[])
            await open_on(engine)
            session = engine.session
            await ready(engine, "acme/m")
            disks.mounted(bed.store, "uuid-a", warnings=["W01: a disk is not in the stripe"])
            await until(lambda: engine.stripe()["warnings"], bool)
            assert engine.session is session
            assert engine.problems() == ()

    run(test())


# -- what is under way


def test_a_fill_and_a_verification_at_full_speed_let_go_in_time(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    """On a real file system: the test unmounts it, which the kernel refuses while anything is held."""
    bed.hub.repos["acme/m"] = repo({f"model-{n}.safetensors": weights(n, 200 * MB) for n in range(3)})
    bed.hub.repos["acme/done"] = repo({"model.safetensors": weights(9, 200 * MB)})
    mount = ExitStack()
    store = mount.enter_context(mounted("ext4", tmp_path / "disk", megabytes=1500)) / "store"

    async def verify_for_ever(engine: Engine) -> None:
        while True:
            await end_of(engine, await engine.verify("acme/done"))

    async def test() -> None:
        async with bed.engine(disks.link, workers=2, max_bytes=1000 * MB) as engine:
            disks.mounted(store, "uuid-a")
            await open_on(engine)
            await ready(engine, "acme/done")
            bed.hub.faults.add("model-*", Kind.TRICKLE, times=None, after=2 * MB, seconds=0.1)  # of six connections: some 100 MB/s
            fill = await engine.ensure(wish("acme/m"))
            assert isinstance(fill, JobStatus)
            verifying = asyncio.create_task(verify_for_ever(engine))
            await until(
                lambda: "\n".join(held_below(store)),
                lambda held: "/ingest/" in held and "/blobs/sha256/" in held and engine.job(fill.id).progress.bytes_done > 20 * MB,
            )
            disks.say(StripeStatus.WITHDRAWING, "R01", "nvme1n1 vanished")
            await gone(engine, store, disks)
            await asyncio.to_thread(mount.close)
            with pytest.raises(DiskError):
                await verifying
            for job in engine.jobs():
                assert job.state.ended
                assert job.error is None or job.error.code is Code.NO_STRIPE, job.error
            assert engine.job(fill.id).state is JobState.FAILED
            bed.hub.faults.clear()
            disks.say(StripeStatus.LOST, "R01", "nvme1n1 vanished")
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            await open_on(engine)
            await until(lambda: engine.models(ModelState.READY), lambda found: len(found) == 2)

    try:
        run(test())
    finally:
        mount.close()


def test_a_fill_goes_on_where_it_was_when_the_same_stripe_comes_back(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 100 * MB)})
    stall = bed.hub.faults.add("*.safetensors", Kind.STALL, times=None, after=40 * MB, seconds=60)

    async def test() -> None:
        async with bed.engine(disks.link, stall_timeout=20.0) as engine:
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            fill = await engine.ensure(wish("acme/m"))
            assert isinstance(fill, JobStatus)
            await until(lambda: engine.job(fill.id).progress.bytes_done, lambda done: done > 35 * MB)
            disks.say(StripeStatus.WITHDRAWING)
            await gone(engine, bed.store, disks)
            bed.hub.faults.clear()
            assert stall.hits
            sent = bed.hub.bytes_sent("*.safetensors")
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            await until(lambda: engine.models(ModelState.READY), lambda found: len(found) == 1)
            assert bed.hub.bytes_sent("*.safetensors") - sent < 90 * MB

    run(test())


def test_a_wish_that_had_no_plan_yet_is_not_forgotten(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    bed.hub.repos["acme/m"] = repo()
    bed.hub.faults.add("*/api/models/*", Kind.STALL, times=None, origin="hub", seconds=60)

    async def test() -> None:
        async with bed.engine(disks.link, stall_timeout=20.0) as engine:
            disks.mounted(tmp_path / "a" / "store", "uuid-a")
            await open_on(engine)
            fill = await engine.ensure(wish("acme/m", pin=True))
            assert isinstance(fill, JobStatus)
            await until(lambda: engine.job(fill.id).state, lambda state: state is JobState.RESOLVING)
            disks.say(StripeStatus.LOST)
            await gone(engine, tmp_path / "a", disks)
            ended = engine.job(fill.id)
            assert ended.state is JobState.FAILED
            assert ended.error is not None
            assert ended.error.code is Code.NO_STRIPE
            bed.hub.faults.clear()
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            await open_on(engine)
            models = await until(lambda: engine.models(ModelState.READY), lambda found: len(found) == 1)
            assert models[0].pinned

    run(test())


def test_calls_that_wait_end_with_the_reason(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link, stall_timeout=20.0) as engine:
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            status = await ready(engine, "acme/m")
            bed.hub.faults.add("*/api/models/*", Kind.STALL, times=None, origin="hub", seconds=60)
            assert engine.session is not None
            await engine.session.do.entry_locks.acquire(next(iter(engine.session.do.shelf.entries)))  # somebody works on it
            async with engine.watch(status.entry) as watcher:
                assert (await watcher.get()) is not None
                waiting = [
                    asyncio.create_task(call)
                    for call in (
                        engine.dry_run(wish("acme/other")),
                        engine.ensure(wish("acme/m")),  # waits for the source before it serves the last known revision
                        engine.remove("acme/m"),
                        engine.pin("acme/m", True),
                    )
                ]
                await asyncio.sleep(0.3)
                assert not any(task.done() for task in waiting)
                disks.say(StripeStatus.WITHDRAWING)
                await disks.acknowledged(PROMISED)
                for ended in await asyncio.gather(*waiting, return_exceptions=True):
                    assert isinstance(ended, NvcacheError), ended
                    assert ended.code is Code.NO_STRIPE, ended
                last = await watcher.get()
                assert isinstance(last, ErrorInfo)
                assert last.code is Code.NO_STRIPE

    run(test())


def test_a_worker_that_ignores_the_end_is_killed(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo({"model.safetensors": weights(1, 300 * MB)})

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            fill = await engine.ensure(wish("acme/m"))
            assert isinstance(fill, JobStatus)
            await until(lambda: engine.job(fill.id).progress.bytes_done, lambda done: done > 20 * MB)
            assert engine.session is not None
            pids = engine.session.do.workers.pids()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            disks.say(StripeStatus.WITHDRAWING)
            await gone(engine, bed.store, disks)
            for pid in pids:
                assert not Path(f"/proc/{pid}").exists()

    run(test())


def test_a_second_loss_during_the_refill_forgets_nothing(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    bed.hub.repos |= {f"acme/{name}": repo({"model.safetensors": weights(n, 3 * MB)}) for n, name in enumerate("abc")}

    async def test() -> None:
        async with bed.engine(disks.link, stall_timeout=20.0) as engine:
            disks.mounted(tmp_path / "a" / "store", "uuid-a")
            await open_on(engine)
            for name in "abc":
                await ready(engine, f"acme/{name}")
            bed.hub.faults.add("*.safetensors", Kind.STALL, times=None, seconds=60)
            disks.say(StripeStatus.LOST)
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            await until(lambda: [job for job in engine.jobs() if not job.state.ended], lambda jobs: len(jobs) == 3)
            disks.say(StripeStatus.LOST)
            await gone(engine, tmp_path / "b", disks)
            bed.hub.faults.clear()
            disks.mounted(tmp_path / "c" / "store", "uuid-c")
            await open_on(engine)
            await until(lambda: engine.models(ModelState.READY), lambda found: len(found) == 3)
            assert engine.counters.stripe_losses == 2

    run(test())


def test_what_its_source_no_longer_has_is_told_and_holds_up_nobody(bed: Bed, disks: DisksPart, tmp_path: Path) -> None:
    bed.hub.repos |= {f"acme/{name}": repo({"model.safetensors": weights(n, 3 * MB)}) for n, name in enumerate("ab")}

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(tmp_path / "a" / "store", "uuid-a")
            await open_on(engine)
            for name in "ab":
                await ready(engine, f"acme/{name}")
            del bed.hub.repos["acme/a"]
            disks.say(StripeStatus.LOST)
            disks.mounted(tmp_path / "b" / "store", "uuid-b")
            models = await until(engine.models, lambda found: {model.state for model in found} == {ModelState.READY, ModelState.FAILED})
            failed = next(model for model in models if model.state is ModelState.FAILED)
            assert failed.ref.startswith("hf://acme/a@")
            assert failed.error is not None
            assert failed.error.code is Code.REPOSITORY_NOT_FOUND

    run(test())


# -- what does not open


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience for a test."""
    monkeypatch.setattr(follow, "OPEN_TIMEOUT", 0.5)
    monkeypatch.setattr(follow, "RETRY_FIRST", 0.1)


def hang(store: Path) -> None:
    """A store whose opening blocks in the kernel, as on a disk that does not answer."""
    store.mkdir(parents=True, exist_ok=True)
    os.mkfifo(store / "format.json")


def let_go(store: Path) -> None:
    """The disk answers after all: with the end of the file."""
    os.close(os.open(store / "format.json", os.O_WRONLY))


@pytest.mark.usefixtures("hurried")
def test_a_disk_that_does_not_answer_leaves_the_api_up_and_is_not_acknowledged_too_early(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            hang(bed.store)
            disks.mounted(bed.store, "uuid-a")
            await until(engine.problems, lambda problems: bool(problems) and "no answer in 0.5 s" in problems[0])
            with pytest.raises(DiskError) as error:
                await engine.model("acme/m")
            assert error.value.code is Code.NO_STRIPE
            await until(disks.files.take_doubt, bool)  # whoever keeps the disks is asked to look
            disks.say(StripeStatus.WITHDRAWING)
            assert not await asyncio.to_thread(disks.files.wait_acknowledged, disks.generation, PROMISED), "a thread is in there still"
            let_go(bed.store)
            await disks.acknowledged(PROMISED)
            assert held_below(bed.store) == []
            (bed.store / "format.json").unlink()
            disks.mounted(bed.store, "uuid-b")
            await open_on(engine)
            await ready(engine, "acme/m")

    run(test())


@pytest.mark.usefixtures("hurried")
def test_a_plain_directory_on_such_a_disk_leaves_the_api_up_as_well(bed: Bed) -> None:
    async def test() -> None:
        hang(bed.store)
        async with bed.engine() as engine:
            assert "no answer in 0.5 s" in engine.problems()[0]
            let_go(bed.store)
            await until(engine.problems, lambda problems: "format.json cannot be read" in problems[0])
            (bed.store / "format.json").unlink()
            await open_on(engine)

    run(test())


def test_a_plain_directory_that_is_somebody_elses_ends_the_start(bed: Bed) -> None:
    async def test() -> None:
        bed.store.mkdir()
        (bed.store / "thesis.tex").touch()
        with pytest.raises(ConfigError) as error:
            async with bed.engine():
                pass
        assert error.value.code is Code.STORE_FOREIGN

    run(test())


@pytest.mark.usefixtures("hurried")
def test_a_stripe_with_something_else_on_it_is_a_problem_and_is_tried_again(bed: Bed, disks: DisksPart) -> None:
    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(bed.store, "uuid-a")
            (bed.store / "thesis.tex").touch()
            await until(engine.problems, lambda problems: bool(problems) and "thesis.tex" in problems[0])
            (bed.store / "thesis.tex").unlink()
            await open_on(engine)

    run(test())


@pytest.mark.usefixtures("hurried")
def test_a_store_that_is_not_there_is_never_made(bed: Bed, disks: DisksPart) -> None:
    """It would lie on the node's own disk: the stripe's mount does not reach this process."""

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.say(StripeStatus.MOUNTED, fs_uuid="uuid-a", store=str(bed.store))
            await until(engine.problems, lambda problems: bool(problems) and "is not there" in problems[0])
            assert not bed.store.exists()
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)

    run(test())


# -- doubts


def test_a_failing_disk_is_doubted_at_once(bed: Bed, disks: DisksPart) -> None:
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            await ready(engine, "acme/m")
            assert not disks.files.take_doubt()
            plans = bed.store / "ingest" / "plans"
            plans.rmdir()
            plans.touch()  # every access fails in the kernel, as on a broken file system
            bed.hub.repos["acme/n"] = repo({"model.safetensors": weights(2, MB)})
            job = await end_of(engine, await engine.ensure(wish("acme/n")))
            assert job.error is not None
            assert job.error.code is Code.DISK_IO
            await until(disks.files.take_doubt, bool)

    run(test())


def test_bytes_that_cannot_be_read_are_doubted_while_they_are_verified(bed: Bed, disks: DisksPart) -> None:
    """A file that ends early is read like a disk that fails: EIO."""
    bed.hub.repos["acme/m"] = repo()

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            status = await ready(engine, "acme/m")
            assert engine.session is not None
            manifest = engine.manifest(status.entry)
            assert manifest is not None
            blob = engine.session.do.layout.blob(manifest.by_path["model.safetensors"].sha256)
            job = await engine.verify("acme/m")
            blob.chmod(0o644)
            os.truncate(blob, 16 * 2**20)
            await until(disks.files.take_doubt, bool)
            await end_of(engine, job)

    run(test())


def test_the_stop_of_a_daemon_without_a_stripe_is_quick(bed: Bed, disks: DisksPart) -> None:
    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            await until(engine.problems, lambda problems: "is not there" in problems[0])
            began = time.monotonic()
        assert time.monotonic() - began < 10

    run(test())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_descriptors_or_memory_withdraws_no_model(bed: Bed, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It says nothing of the disk: the model is unknown for a moment, and ready when there is enough again."""
    bed.hub.repos["acme/m"] = repo({"config.json": b"{}"})

    def refused(*_args: object) -> bool:
        raise OSError(number, os.strerror(number))

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            with monkeypatch.context() as patch:
                patch.setattr(Views, "_shown", refused)
                patch.setattr(lookup, "CHECK_EVERY", 0.0)
                assert (await engine.model("acme/m")).state is ModelState.UNKNOWN
            await until(lambda: engine.models()[0].state, lambda state: state is ModelState.READY)
            await asyncio.sleep(lookup.CHECK_EVERY)
            assert (await engine.model("acme/m")).state is ModelState.READY
            assert engine.jobs()[-1].kind == "fill", "nothing was repaired"

    run(test())


def test_a_loop_that_was_late_is_not_a_disk_that_does_not_answer(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the files ended in time, but so much else was to be done that nobody heard of it before the time was over."""
    bed.hub.repos["acme/m"] = repo({"config.json": b"{}"})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            assert engine.session is not None
            asked = engine.session.lookup
            (entry,) = engine.session.do.shelf.entries.values()
            entry.checked = (float("-inf"), True)
            monkeypatch.setattr(lookup, "CHECK_TIMEOUT", 0.05)
            asking = asyncio.create_task(engine.model("acme/m"))
            await asyncio.sleep(0)
            late, limit = time.monotonic() + 2 * lookup.CHECK_TIMEOUT, time.monotonic() + 30
            while (asked._checking or time.monotonic() < late) and time.monotonic() < limit:
                time.sleep(0.001)  # the loop is held up on purpose
            assert not asking.done()
            assert (await asking).state is ModelState.READY

    run(test())
