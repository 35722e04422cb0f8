"""Which looks at the file lead to what: half-written ones, broken ones, a disk that does not answer. The engine is real, but has no store."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nvcache.engine import reload
from nvcache.engine.engine import Engine
from nvcache.settings import Given, take
from nvcache.settings.file import Glance, glance

HOME = {"HOME": "/home/somebody"}


class Bed:
    """A daemon's file and what follows it; `look` is one look as `run` has them, `lines` what the log was told since."""

    def __init__(self, place: Path, caplog: pytest.LogCaptureFixture, **flags: object) -> None:
        caplog.set_level(logging.INFO, reload.__name__)
        self.file = place / "nvcache.toml"
        self.file.write_text("")
        given = Given.of(config=self.file, flags=flags, environ=HOME, uid=1000)
        self.engine = Engine(take(given))
        self.reloader = reload.Reloader(self.engine, given, asyncio.Event())
        self._caplog = caplog

    async def look(self, *, asked: bool = False) -> None:
        await self.reloader._look(asked=asked)

    def declared(self) -> list[str]:
        return [str(ref) for ref in self.engine.declared.refs]

    def lines(self) -> list[str]:
        found = [record.getMessage().replace(str(self.file), "FILE") for record in self._caplog.records if record.name == reload.__name__]
        self._caplog.clear()
        return found


def drive(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_a_file_counts_when_two_looks_found_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        bed = Bed(tmp_path, caplog)
        for text in ("[[models]]\nref = 'a/b'", "[[models]]\nref = 'a/bc'", "[[models]]\nref = 'a/bcd'\n"):  # somebody is writing
            bed.file.write_text(text)
            await bed.look()
        assert (bed.declared(), bed.lines()) == ([], [])
        await bed.look()
        assert bed.declared() == ["hf://a/bcd"]
        assert bed.lines() == ["config file FILE was read again: declared now: hf://a/bcd"]
        await bed.look()
        assert bed.lines() == []

    drive(test)


def test_what_changed_before_the_first_look_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        bed = Bed(tmp_path, caplog)
        bed.file.write_text('allow = ["az://*"]')
        await bed.look()
        await bed.look()
        assert bed.engine.settings.allow == ("az://*",)
        bed.lines()
        unchanged = Bed(tmp_path, caplog)
        await unchanged.look()
        await unchanged.look()
        assert unchanged.lines() == [], "nothing changed, nothing is told"

    drive(test)


def test_a_broken_file_is_told_once_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        bed = Bed(tmp_path, caplog)
        bed.file.write_text("[[models]]\nref = 'a/b'\n")
        await bed.look(asked=True)
        bed.lines()
        bed.file.write_text("lanes = 0\n")
        for _ in range(4):
            await bed.look()
        why = "cannot use setting lanes from config file FILE: input should be greater than or equal to 1 (at line 1)"
        assert bed.lines() == [f"{why}; nothing is changed (correct the setting named in the message)"]
        assert bed.engine.config_failure == why.replace("FILE", str(bed.file))
        assert bed.declared() == ["hf://a/b"]
        await bed.look(asked=True)
        assert len(bed.lines()) == 1, "who asks is told"
        bed.file.write_text("[[models]]\nref = 'a/b'\n")
        await bed.look()
        await bed.look()
        assert bed.lines() == ["config file FILE was read again: nothing changed"]
        assert bed.engine.config_failure is None

    drive(test)


def test_a_pipe_in_its_place_is_told_and_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        bed = Bed(tmp_path, caplog)
        bed.file.unlink()
        os.mkfifo(bed.file)
        for asked in (False, False, True):
            await bed.look(asked=asked)
        why = "cannot read config file FILE: it is not a file; nothing is changed (name the file with --config or NVCACHE_CONFIG)"
        assert bed.lines() == [why, why], "once, and who asks"
        bed.file.unlink()
        bed.file.write_text("[[models]]\nref = 'a/b'\n")
        await bed.look()
        await bed.look()
        assert (bed.declared(), bed.engine.config_failure) == (["hf://a/b"], None)

    drive(test)


def test_other_settings_wait_for_a_restart_and_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        bed = Bed(tmp_path, caplog, workers=3)
        bed.file.write_text("lanes = 7\nworkers = 9\n")
        for _ in range(3):
            await bed.look()
        assert bed.lines() == ["config file FILE: what changed of lanes counts after a restart of the daemon"], "the flag hides the other"
        bed.file.write_text("lanes = 7\nworkers = 9\nmin_free = 1\n[[models]]\nref = 'a/b'\n")
        for _ in range(3):
            await bed.look()
        assert [line.partition("what changed of ")[2] for line in bed.lines()][1:] == ["min_free, lanes counts after a restart of the daemon"]
        assert (bed.engine.settings.lanes, bed.engine.settings.workers) == (4, 3)

    drive(test)


def test_a_disk_that_does_not_answer_is_told_and_looked_at_by_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, looks = threading.Event(), []

    def slow(path: Path, before: Glance | None) -> Glance:
        looks.append(path)
        assert answers.wait(20)
        return glance(path, before)

    answers.set()
    monkeypatch.setattr(reload, "POLL", 0.01)
    monkeypatch.setattr(reload, "glance", slow)

    async def test() -> None:
        bed = Bed(tmp_path, caplog)
        running = asyncio.create_task(bed.reloader.run())
        while len(looks) < 4:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(reload, "LOOK_SECONDS", 0.01)
        answers.clear()
        while bed.engine.config_failure is None:
            await asyncio.sleep(0.01)
        assert "no answer in 0.01 s" in bed.engine.config_failure
        count = len(looks)
        await asyncio.sleep(0.1)  # ten times as long as between two looks
        assert len(looks) == count
        monkeypatch.setattr(reload, "LOOK_SECONDS", 10)
        answers.set()
        while bed.engine.config_failure is not None:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})

    drive(test)
