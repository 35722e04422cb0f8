"""What the engine follows, by the settings: a directory that is checked and watched, and a keeper of our own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nvcache import settings
from nvcache.engine import links
from nvcache.engine.engine import Engine
from nvcache.engine.handover import LocalStripe, PlainDirectory, StripeStatus
from nvcache.engine.keeper import Keeper, _Loss
from nvcache.engine.links import WatchedDirectory, checked_directory, stripe_link
from nvcache.engine.lock import KEEPER_LOCK, run_lock
from nvcache.engine.stripe import Report, Stripe
from nvcache.engine.stripefile import FollowedFile
from nvcache.errors import Code, ConfigError
from nvcache.settings import Settings
from tests.engine.conftest import Bed, ready, repo, run, until
from tests.support.disks import mounted


def given(place: Path, **flags: Any) -> Settings:
    """Settings for a daemon in `place`."""
    return settings.load(
        flags={"socket": place / "s.sock", "run_directory": place / "run" / "disks", **flags}, environ={"HOME": str(place)}, uid=1000
    )


def call(*argv: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(argv, check=True, capture_output=True)


def test_each_backend_has_its_link(tmp_path: Path) -> None:
    async def test() -> None:
        async with stripe_link(given(tmp_path)) as link:
            assert type(link) is PlainDirectory
        async with stripe_link(given(tmp_path, follow=True)) as link:
            assert type(link) is FollowedFile

    run(test())


def test_a_directory_on_the_os_disk_is_refused_with_its_code_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        checked_directory(given(tmp_path, backend="directory", store="/etc/nvcache"))
    assert error.value.code is Code.DISKS_REFUSED
    assert error.value.facts == {"disk_code": "P01"}
    assert "P01" in str(error.value)
    assert error.value.hint


def test_a_directory_on_a_disk_is_served_until_something_else_is_in_its_place(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOOK_EVERY", 0.05)
    bed.hub.repos["acme/m"] = repo({"config.json": b"{}"})

    async def test(point: Path) -> None:
        async with stripe_link(given(tmp_path, backend="directory", store=point / "nvcache")) as link:
            assert type(link) is WatchedDirectory
            async with bed.engine(link, store=point / "nvcache") as engine:
                status = await ready(engine, "acme/m")
                assert engine.stripe()["backend"] == "directory"
                with mounted("tmpfs", tmp_path / "cover") as cover:
                    call("mount", "--bind", str(cover), str(point))
                    try:
                        await until(engine.problems, lambda problems: bool(problems) and "P06" in problems[0])
                        await asyncio.sleep(0.3)
                        assert engine.models() == []
                        assert not any(cover.iterdir()), "nothing is written to what is not ours"
                    finally:
                        call("umount", str(point))
                await until(engine.problems, lambda problems: not problems)
                assert (await engine.model("acme/m")).path == status.path

    with mounted("ext4", tmp_path / "disk") as point:
        run(test(point))


def test_a_keeper_of_our_own_is_stopped_with_the_daemon_and_its_refusal_is_told(tmp_path: Path) -> None:
    """A second keeper cannot begin: what it says reaches /readyz, and it is tried again."""
    chosen = given(tmp_path, backend="md", mount=tmp_path / "mnt", expected_disks=None, settle_seconds=0)

    async def test() -> None:
        async with stripe_link(chosen) as link:
            engine = Engine(chosen, link)
            await engine.start()
            try:
                await until(engine.problems, lambda problems: "the stripe is absent: N" in problems[0])
                assert engine.stripe()["state"] is StripeStatus.ABSENT
                async with stripe_link(chosen) as second:
                    await until(second.current, lambda state: f"the process {os.getpid()} does so" in state.reason)
            finally:
                await engine.stop()

    run(test())
    assert not (tmp_path / "mnt" / "store").exists()


def test_what_was_acknowledged_before_the_keeper_began_does_not_count_for_its_stripe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it could not begin there was no stripe, and the daemon said that it had nothing open."""
    chosen = given(tmp_path, backend="md", mount=tmp_path / "mnt")
    there = Report("Unchanged", "C1", None, "our stripe is mounted", store=str(tmp_path / "mnt/store"), fs_uuid="uuid-1")
    heard: list[bool] = []
    lost = threading.Event()

    def let_go(_stripe: Stripe, _number: str) -> None:
        lost.set()

    def wait_acknowledged(stripe: LocalStripe, generation: int, _seconds: float) -> bool:
        heard.append(real(stripe, generation, 0.0))  # this daemon never lets go of it
        return heard[-1]

    real = LocalStripe.wait_acknowledged
    monkeypatch.setattr(links, "KEEP_AGAIN", 0.05)
    monkeypatch.setattr(LocalStripe, "wait_acknowledged", wait_acknowledged)
    monkeypatch.setattr(Stripe, "ensure", lambda _stripe: there)
    monkeypatch.setattr(Stripe, "let_go", let_go)
    monkeypatch.setattr(Keeper, "_lost", lambda _keeper, _report: _Loss("a disk vanished"))
    lock = chosen.run_directory / KEEPER_LOCK

    async def test() -> None:
        generations = [0]
        with ExitStack() as teardown:
            teardown.enter_context(run_lock(lock, "take the stripe apart"))
            async with stripe_link(chosen) as link:
                for another in ("4711", "4712"):
                    state = await until(link.current, lambda state: "does so just now" in state.reason and state.generation > generations[-1])
                    generations.append(state.generation)
                    await link.acknowledge(state.generation)
                    lock.write_text(another)  # so that the next refusal names somebody else, and is another word
                teardown.close()
                state = await until(link.current, lambda state: state.mounted)
                assert state.generation > generations[-1], "a later word has a larger generation"
                assert await asyncio.to_thread(lost.wait, 30)

    run(test())
    assert heard[0] is False, "it has let go of nothing since the stripe was mounted"
