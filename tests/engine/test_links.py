"""What the engine follows, by the settings: a directory that is checked and watched, and a keeper of our own."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nvcache import settings
from nvcache.engine import links
from nvcache.engine.engine import Engine
from nvcache.engine.handover import PlainDirectory, StripeStatus
from nvcache.engine.links import WatchedDirectory, checked_directory, stripe_link
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
