"""Has the daemon follow its file while it runs: the declared models and `allow` are taken over when it changes or somebody asks. It fetches nothing.

A file is taken over when two looks in a row found the same in it, so that nobody's half-written one counts. One that cannot be used changes nothing
and is told once. What else changed in it counts from the next start, which is told as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.engine import Engine
from nvcache.errors import Code, ConfigError, Interrupted
from nvcache.settings import LIVE, Given, ModelSetting, Settings, take
from nvcache.settings.file import Glance, glance, unreadable

POLL = 2.0  # seconds between two looks at the file
LOOK_SECONDS = 10.0  # seconds after which a look that does not end is told; there is no second one meanwhile

T = TypeVar("T")
log = logging.getLogger(__name__)


class Reloader:
    """Follows the file of `given`, which has one, until `run` is cancelled. `asked` is set to have it read at once (SIGHUP)."""

    def __init__(self, engine: Engine, given: Given, asked: asyncio.Event) -> None:
        assert given.config is not None  # noqa: S101 - the caller looked
        self._engine = engine
        self._given = given
        self._path = given.config
        self._asked = asked
        self._thread = DaemonExecutor("config", 1)
        self._seen: Glance | None = None
        self._known: str | None = None  # the content that was taken over or refused; None at first, for it may have changed since the start
        self._waiting: tuple[str, ...] = ()  # the settings that were told to need a restart

    async def run(self) -> None:
        """Look, again and again."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._asked.wait()
                asked = self._asked.is_set()
                self._asked.clear()
                await self._look(asked=asked)
        finally:
            self._thread.close(lambda: Interrupted(Code.STOPPING, "cannot read the settings: the daemon is stopping"))

    async def _look(self, *, asked: bool) -> None:
        before = self._seen
        self._seen = await self._patiently(lambda: glance(self._path, before))
        if asked or (self._seen == before and self._seen.content != self._known):
            self._known = self._seen.content
            await self._take_over(asked=asked)

    async def _take_over(self, *, asked: bool) -> None:
        try:
            settings = await self._patiently(self._read)
        except ConfigError as error:
            self._fail(str(error), error.hint)
            return
        failed, self._engine.config_failure = self._engine.config_failure, None
        news = _news(self._engine.settings, settings)
        if news or asked or failed:
            log.info("config file %s was read again: %s", self._path, "; ".join(news) or "nothing changed")
        self._engine.converge(settings)
        self._tell_rest(settings, asked=asked)

    def _read(self) -> Settings:
        """The settings as the file has them now. Raises `ConfigError` (bad-config). Blocks."""
        if self._seen is not None and not self._seen.identity:  # such as a pipe, which would be waited for until somebody writes into it
            raise unreadable(self._path, self._seen.content)
        return take(self._given)

    def _tell_rest(self, settings: Settings, *, asked: bool) -> None:
        """Name the settings that count from the next start."""
        now = self._engine.settings
        names = tuple(name for name in Settings.model_fields if name not in LIVE and getattr(settings, name) != getattr(now, name))
        if names and (asked or names != self._waiting):
            log.warning("config file %s: what changed of %s counts after a restart of the daemon", self._path, ", ".join(names))
        self._waiting = names

    def _fail(self, why: str, hint: str) -> None:
        log.error("%s; nothing is changed (%s)", why, hint, extra={"facts": {"code": Code.BAD_CONFIG}})
        self._engine.config_failure = why

    async def _patiently(self, work: Callable[[], T]) -> T:
        """Await `work` on the thread, for as long as its disk takes."""
        working = asyncio.ensure_future(self._thread.call(work))
        try:
            if not (await asyncio.wait({working}, timeout=LOOK_SECONDS))[0]:
                self._known = None  # it is taken over anew when the disk answers
                self._fail(f"cannot read config file {self._path}: no answer in {LOOK_SECONDS:g} s", "look at the disk that it lies on")
            return await working
        finally:
            working.cancel()


def _news(before: Settings, after: Settings) -> list[str]:
    """What is taken over, in words."""
    news = []
    if added := _named(model for model in after.models if model not in before.models):
        news.append(f"declared now: {added}")
    if gone := _named(model for model in before.models if model not in after.models):
        news.append(f"declared no more: {gone}")
    if after.allow != before.allow:
        news.append(f"allow is {', '.join(after.allow) or 'empty'}")
    return news


def _named(models: Iterable[ModelSetting]) -> str:
    return ", ".join(str(model.reference) for model in models)
