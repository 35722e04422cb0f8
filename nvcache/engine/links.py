"""Chooses what the engine follows, by the settings, and owns it: a plain directory, one that is checked, another process, or a keeper of our own.

It looks at no disk itself: `core.directory` judges a directory, `keeper` keeps a stripe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from nvcache.core.directory import DirectoryRules, refused_directory, to_leave
from nvcache.core.disk_codes import DISK_CODES, DiskCode
from nvcache.engine.blocking import DaemonExecutor, owned
from nvcache.engine.handover import LocalStripe, PlainDirectory, StripeLink, StripeState, StripeStatus
from nvcache.engine.stripefile import FollowedFile
from nvcache.errors import Code, ConfigError, DiskError, NvcacheError
from nvcache.settings import Settings

log = logging.getLogger(__name__)
LOOK_EVERY = 2.0  # seconds between two looks whether a directory is still on the file system it was on
LOOK_TIMEOUT = 10.0  # a look that takes longer tells nothing
KEEP_AGAIN = 5.0  # seconds until a keeper that could not begin is started again
KEEPER_STOP = 1.5  # seconds the keeper is given at the end; it works on in no half-done step that a next start would not heal


@asynccontextmanager
async def stripe_link(settings: Settings) -> AsyncIterator[StripeLink]:
    """What the engine is to follow. Raises `ConfigError` (disks-refused) for a directory that `backend = directory` may not use, `DiskError`."""
    if settings.follow:
        yield FollowedFile(settings.run_directory)
    elif settings.backend in ("md", "lvm"):
        async with _kept(settings) as stripe:
            yield stripe
    elif settings.backend == "directory":
        yield await DaemonExecutor("directory", 1).call(checked_directory, settings)
    else:
        yield PlainDirectory(settings.store)


class WatchedDirectory(PlainDirectory):
    """A directory that is not to be used once another file system is in its place: `P06`. It is used again when the first one is back."""

    def __init__(self, store: Path, device: int, keep_free: int = 0) -> None:
        """`device` is the st_dev of the file system that was judged; `keep_free` are the bytes that others need free there."""
        super().__init__(store, keep_free)
        self._store = store
        self._device = device
        self._mounted = self._state
        self._looks = DaemonExecutor("directory", 1)

    async def changed(self, after: StripeState) -> StripeState:
        """Look every now and then where the path leads."""
        while self._state == after:
            await asyncio.sleep(LOOK_EVERY)
            with suppress(DiskError):  # no answer is no news
                here = await self._looks.bounded(LOOK_TIMEOUT, f"look at {self._store}", _device, self._store)
                if (here == self._device) is not self._state.mounted:
                    self._state = self._word(here)
        return self._state

    def _word(self, here: int | None) -> StripeState:
        generation = self._state.generation + 1
        if here == self._device:
            return StripeState(generation, StripeStatus.MOUNTED, store=str(self._store), details=self._mounted.details)
        reason = f"{self._store} is not there any more" if here is None else f"another file system than at the start is at {self._store}"
        return StripeState(generation, StripeStatus.ABSENT, DiskCode.P06, reason, details=self._mounted.details)


def checked_directory(settings: Settings) -> WatchedDirectory:
    """The store's directory, if a node may use it. Blocks, bounded. Raises `ConfigError` (disks-refused), `DiskError` (disk-io, disk-stalled)."""
    from nvcache.system.directory import directory_facts
    from nvcache.system.sysfs import Kernel

    store = settings.store
    rules = DirectoryRules(settings.allow_os_disk, settings.allow_any_filesystem, settings.max_bytes, settings.min_free)
    facts = directory_facts(Kernel(), store)
    refused = refused_directory(facts, rules)
    device = _device(store) or _device(store.parent)
    if refused is None and device is not None:
        return WatchedDirectory(store, device, to_leave(facts))
    code, reason = refused or (DiskCode.P06, f"{store} vanished while it was looked at")
    raise ConfigError(
        Code.DISKS_REFUSED, f"cannot use {store} for the store: {code} {reason}", hint=DISK_CODES[code].remedy, facts={"disk_code": code}
    )


def _device(path: Path) -> int | None:
    """The st_dev of what is at `path`; None when nothing is."""
    try:
        return path.stat().st_dev
    except OSError:
        return None


@asynccontextmanager
async def _kept(settings: Settings) -> AsyncIterator[LocalStripe]:
    """A stripe with a keeper on a thread of its own; the stripe stays mounted afterwards."""
    from nvcache.engine.keeper import Keeper  # late: other backends need none of it

    stripe, thread = LocalStripe(), DaemonExecutor("keeper", 1)
    keeper = Keeper(settings, stripe.publish, stripe.wait_acknowledged, stripe.take_doubt)
    keeping = owned(_keep(lambda: thread.call(keeper.run), keeper.without), "keeper")
    try:
        yield stripe
    finally:
        keeper.stop()
        await asyncio.wait({keeping}, timeout=KEEPER_STOP)
        keeping.cancel()


async def _keep(run: Callable[[], Awaitable[None]], without: Callable[[str], None]) -> None:
    """Have the keeper run until it is stopped; while it cannot begin, have it say why: so one alone counts the generations."""
    while True:
        try:
            return await run()
        except NvcacheError as error:
            log.warning("the disks are not looked after: %s", error, extra={"facts": {"code": error.code}})
            without(str(error))
        await asyncio.sleep(KEEP_AGAIN)
