"""The handover between the disks part and the serving part: what is said arrives, and what is no word of it is not believed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nvcache.engine.handover import LocalStripe, PlainDirectory, StripeState, StripeStatus
from nvcache.engine.stripefile import FollowedFile, StripeFiles, last_word, read_object
from nvcache.errors import Code, DiskError
from tests.engine.conftest import run

MOUNTED = StripeState(7, StripeStatus.MOUNTED, "R01", "made anew", "uuid-1", "/mnt/x/store", {"backend": "md", "members": ["nvme0n1"]})
FAILED = DiskError(Code.DISK_IO, "cannot read: Input/output error")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The run directory, as the disks process has it."""
    path = tmp_path / "run" / "disks"
    path.mkdir(parents=True)
    return path


def word(**given: object) -> bytes:
    return json.dumps(asdict(MOUNTED) | given).encode()


async def look(link: FollowedFile) -> StripeState:
    """The next word that differs from the last; the one there is if none comes."""
    try:
        async with asyncio.timeout(1):
            return await link.changed(link.current())
    except TimeoutError:
        return link.current()


# -- one process


def test_a_word_from_the_keepers_thread_wakes_the_engine() -> None:
    async def test() -> None:
        stripe = LocalStripe()
        before = stripe.current()
        assert before.state is StripeStatus.ABSENT
        threading.Timer(0.1, stripe.publish, (MOUNTED,)).start()
        assert await stripe.changed(before) == MOUNTED
        assert await stripe.changed(before) == MOUNTED, "what was said meanwhile must not be waited for"

    run(test())


def test_the_keeper_waits_for_the_generation_it_published_and_not_for_ever() -> None:
    async def test() -> None:
        stripe = LocalStripe()
        began = time.monotonic()
        assert not await asyncio.to_thread(stripe.wait_acknowledged, 8, 0.2)
        assert 0.15 < time.monotonic() - began < 20
        waiting = asyncio.create_task(asyncio.to_thread(stripe.wait_acknowledged, 8, 10.0))
        await stripe.acknowledge(7)
        assert not waiting.done()
        await stripe.acknowledge(8)
        assert await waiting

    run(test())


def test_a_doubt_is_taken_once() -> None:
    stripe = LocalStripe()
    assert not stripe.take_doubt()
    stripe.doubt(FAILED)
    assert stripe.take_doubt()
    assert not stripe.take_doubt()


def test_a_word_after_the_loop_is_closed_hurts_nobody() -> None:
    stripe = LocalStripe()

    async def test() -> None:
        asyncio.create_task(stripe.changed(stripe.current()))  # noqa: RUF006 - it is to be cut short by the loop's end
        await asyncio.sleep(0)

    asyncio.run(test())
    stripe.publish(MOUNTED)
    assert stripe.current() == MOUNTED


def test_a_plain_directory_is_mounted_and_never_changes(tmp_path: Path) -> None:
    async def test() -> None:
        link = PlainDirectory(tmp_path)
        assert link.current().mounted
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.changed(link.current()), 0.1)

    run(test())


# -- two processes


def test_every_field_crosses_the_file(home: Path) -> None:
    async def test() -> None:
        files, link = StripeFiles(home), FollowedFile(home)
        assert link.current().state is StripeStatus.ABSENT
        files.publish(MOUNTED)
        assert await look(link) == MOUNTED
        assert (home / "stripe.json").stat().st_mode & 0o777 == 0o644, "the daemon is another user"
        assert sorted(path.name for path in home.iterdir()) == ["stripe.json"]

    run(test())


def test_an_acknowledgement_counts_for_its_generation_only(home: Path) -> None:
    async def test() -> None:
        files, link = StripeFiles(home), FollowedFile(home)
        assert not files.wait_acknowledged(7, 0)
        await link.acknowledge(7)
        assert files.wait_acknowledged(7, 0)
        assert not files.wait_acknowledged(8, 0.2)
        assert (home.parent / "serve.json").exists(), "beside the run directory, which is not the daemon's to write"

    run(test())


def test_a_doubt_crosses_once_and_only_about_what_is_published(home: Path) -> None:
    async def test() -> None:
        files, link = StripeFiles(home), FollowedFile(home)
        files.publish(MOUNTED)
        await look(link)
        link.doubt(FAILED)
        await link.acknowledge(0)  # written after the doubt, and with it
        assert files.take_doubt()
        assert not files.take_doubt()
        for _ in range(20):  # some within one tick of the clock
            link.doubt(FAILED)
            await link.acknowledge(0)
            assert files.take_doubt(), "each further failure is a further doubt"
        link.doubt(FAILED)
        await link.acknowledge(0)
        files.publish(StripeState(8, StripeStatus.MOUNTED, fs_uuid="uuid-2", store="/mnt/x/store"))
        assert not files.take_doubt(), "it was about the stripe before"

    run(test())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSON"),
        (word()[:-20], "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "JSON object"),
        (b"{}", "no state"),
        (word(generation="7"), "no state"),
        (word(generation=True), "no state"),
        (word(generation=-1), "no state"),
        (word(state="fine"), "fine"),
        (word(reason=None), "no state"),
        (word(details=[]), "no state"),
        (word(store=5), "no state"),
        (word(store=None), "not where"),
        (word(fs_uuid=None), "not where"),
        (word(store="relative/store"), "not where"),
        (b'{"x": "' + b"x" * 1_100_000 + b'"}', "larger"),
    ],
)
def test_what_is_no_word_is_not_believed_and_said(home: Path, content: bytes, why: str) -> None:
    async def test() -> None:
        link = FollowedFile(home)
        StripeFiles(home).publish(MOUNTED)
        assert (await look(link)).mounted
        (home / "stripe.json").write_bytes(content)
        seen = await look(link)
        assert seen.state is StripeStatus.ABSENT
        assert why in seen.reason
        StripeFiles(home).publish(MOUNTED)
        assert (await look(link)) == MOUNTED, "a good word counts again"

    run(test())


def test_a_word_that_somebody_else_could_have_written_is_not_believed(home: Path) -> None:
    async def test() -> None:
        link = FollowedFile(home)
        StripeFiles(home).publish(MOUNTED)
        (home / "stripe.json").chmod(0o666)
        assert "others may write" in (await look(link)).reason

    run(test())
    (home / "stripe.json").chmod(0o644)
    with pytest.raises(ValueError, match=f"belongs to user {os.geteuid()}"):
        read_object(home / "stripe.json", 1000, (os.geteuid() + 1,))


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "dangling"])
def test_neither_side_follows_links_or_waits_for_pipes(home: Path, kind: str) -> None:
    elsewhere = home.parent / "elsewhere.json"
    elsewhere.write_bytes(json.dumps(asdict(MOUNTED) | {"acknowledged": 7}).encode())

    def plant(path: Path) -> None:
        match kind:
            case "link":
                path.symlink_to(elsewhere)
            case "pipe":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case "dangling":
                path.symlink_to(home / "nothing")

    async def test() -> None:
        plant(home / "stripe.json")
        plant(home.parent / "serve.json")
        began = time.monotonic()
        assert (await look(FollowedFile(home))).state is StripeStatus.ABSENT
        files = StripeFiles(home)
        assert not files.wait_acknowledged(7, 0)
        assert not files.take_doubt()
        assert time.monotonic() - began < 20

    run(test())


@pytest.mark.parametrize(
    "content",
    [
        b'{"acknowledged": true}',
        b'{"acknowledged": "1"}',
        b'{"acknowledged": 1.0}',
        b"[" * 60_000,
        b'{"acknowledged": 1, "x": "' + b"y" * 70_000 + b'"}',
        b"1",
    ],
)
def test_a_hostile_answer_is_no_answer(home: Path, content: bytes) -> None:
    (home.parent / "serve.json").write_bytes(content)
    assert not StripeFiles(home).wait_acknowledged(1, 0)


def test_the_disks_process_writes_through_no_link(home: Path, tmp_path: Path) -> None:
    """Whoever may rename the run directory must not make root write elsewhere."""
    away = tmp_path / "away"
    away.mkdir()
    home.rmdir()
    home.symlink_to(away)
    with pytest.raises(DiskError) as error:
        StripeFiles(home).publish(MOUNTED)
    assert error.value.code is Code.DISK_IO
    assert not any(away.iterdir())


def test_a_generation_that_goes_back_is_not_believed_until_the_file_began_anew(home: Path) -> None:
    async def test() -> None:
        files, link = StripeFiles(home), FollowedFile(home)
        files.publish(MOUNTED)
        assert await look(link) == MOUNTED
        files.publish(StripeState(3, StripeStatus.MOUNTED, fs_uuid="old", store="/mnt/old/store"))
        seen = await look(link)
        assert seen.state is StripeStatus.ABSENT
        assert "generation 3" in seen.reason
        (home / "stripe.json").unlink()
        assert "is not there" in (await look(link)).reason
        files.publish(StripeState(3, StripeStatus.MOUNTED, fs_uuid="old", store="/mnt/old/store"))
        assert (await look(link)).mounted

    run(test())


def test_a_disks_process_that_starts_again_goes_on_counting(home: Path) -> None:
    first = StripeFiles(home).next_generation()
    assert first > 1_700_000_000
    StripeFiles(home).publish(StripeState(first + 50, StripeStatus.ABSENT))
    assert StripeFiles(home).next_generation() == first + 51
    (home / "stripe.json").write_bytes(b"torn")
    assert StripeFiles(home).next_generation() >= first


def test_a_word_that_is_said_again_is_written_again_only_where_it_is_gone(home: Path) -> None:
    file, files = home / "stripe.json", StripeFiles(home)
    files.publish(MOUNTED)
    first = file.stat()
    os.utime(file, (1, 1))
    files.publish(MOUNTED)
    assert (file.stat().st_ino, file.stat().st_mtime >= first.st_mtime) == (first.st_ino, True)
    shutil.rmtree(home.parent)  # as when somebody empties /run
    files.publish(MOUNTED)
    assert last_word(home)[0] == MOUNTED


def test_a_directory_that_is_gone_for_good_ends_the_disks_process(home: Path) -> None:
    """So a container's mount of a directory that was removed in the host: nobody would ever read what is written there."""
    files = StripeFiles(home / "deep" / "disks")
    files.publish(MOUNTED)
    shutil.rmtree(home / "deep")
    (home / "deep").write_text("in the way")
    with pytest.raises(DiskError) as error:
        files.publish(MOUNTED)
    assert error.value.code is Code.DISK_IO


def test_whoever_reads_meanwhile_sees_whole_files_only(home: Path) -> None:
    """Both files are replaced while two threads read them as fast as they can."""
    files, link = StripeFiles(home), FollowedFile(home)
    seen: list[int] = []
    torn: list[Exception] = []
    done = threading.Event()

    def read(path: Path, field: str) -> None:
        while not done.is_set():
            try:
                seen.append(read_object(path, 1_000_000)[field])
            except FileNotFoundError:
                continue
            except ValueError as error:
                torn.append(error)

    async def test() -> None:
        readers = [
            threading.Thread(target=read, args=(home / "stripe.json", "generation")),
            threading.Thread(target=read, args=(home.parent / "serve.json", "acknowledged")),
        ]
        for reader in readers:
            reader.start()
        details: dict[str, Any] = {"disks": [{"name": f"nvme{n}n1", "reason": "x" * 200} for n in range(32)]}
        for generation in range(300):
            files.publish(StripeState(generation, StripeStatus.ABSENT, details=details))
            await link.acknowledge(generation)
        done.set()
        for reader in readers:
            reader.join(10)

    run(test())
    assert not torn
    assert len(set(seen)) > 2


def test_a_directory_that_cannot_be_written_is_said_and_ends_nothing(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        link = FollowedFile(home)
        (home.parent / "serve.json").mkdir()
        await link.acknowledge(1)

    run(test())
    assert "cannot answer the disks process" in caplog.text
    assert sorted(path.name for path in home.parent.iterdir()) == ["disks", "serve.json"], "no half-written file stays"
