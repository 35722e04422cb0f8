"""What the disks part and the serving part say to each other: the state of the stripe one way, "I let go" and "look at it" the other.

It touches no disk and opens no store. Between two processes the same is said in two files (`stripefile`); here is what one process needs, and what
both share. A stripe in any state but mounted is not to be used: the serving part closes every descriptor it has there and acknowledges the
generation.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from nvcache.errors import DiskError


class StripeStatus(StrEnum):
    """Whether the stripe may be used, and if not, what becomes of it."""

    ABSENT = "absent"  # there is none, for the reason given
    MOUNTED = "mounted"  # use it
    WITHDRAWING = "withdrawing"  # let go of it: it is about to be unmounted
    LOST = "lost"  # let go of it: its contents are gone


@dataclass(frozen=True, slots=True)
class StripeState:
    """What the disks part says. Every word of it has a `generation` of its own, and a later one a larger.

    `code` is a `DiskCode` or None, `store` the store's directory while it is mounted, `fs_uuid` says which contents it has. `details` are what
    GET /v1/stripe shows besides: case, backend, filesystem, array, members, mount, read_ahead, tuning, warnings, and disks (each with name, serial,
    model, size, verdict, code, reason).
    """

    generation: int
    state: StripeStatus
    code: str | None = None
    reason: str = ""
    fs_uuid: str | None = None
    store: str | None = None
    details: dict[str, object] = field(default_factory=dict)

    @property
    def mounted(self) -> bool:
        """Whether the store may be opened."""
        return self.state is StripeStatus.MOUNTED and self.store is not None

    def same_contents(self, other: StripeState) -> bool:
        """Whether both are the same mounted store: nothing has to be closed between them."""
        return self.mounted and other.mounted and (self.fs_uuid, self.store) == (other.fs_uuid, other.store)


class StripeLink(Protocol):
    """What the engine follows. All methods belong to the event loop."""

    def current(self) -> StripeState:
        """The last word, from memory."""
        ...

    async def changed(self, after: StripeState) -> StripeState:
        """Wait for another word than `after` and return it."""
        ...

    async def acknowledge(self, generation: int) -> None:
        """Say that nothing of ours is open on the stripe since it was told to let go."""
        ...

    def doubt(self, error: DiskError) -> None:
        """Ask the disks part to look at its disks now: one of them failed us."""
        ...


class PlainDirectory:
    """A directory that somebody else looks after, as a stripe that is always mounted."""

    def __init__(self, store: Path, keep_free: int = 0) -> None:
        """`keep_free` are the bytes that others who use the file system need free."""
        self.keep_free = keep_free
        self._state = StripeState(1, StripeStatus.MOUNTED, store=str(store), details={"backend": "directory"})

    def current(self) -> StripeState:
        """Mounted."""
        return self._state

    async def changed(self, after: StripeState) -> StripeState:
        """Never, once that is known."""
        while after == self._state:
            await asyncio.Event().wait()
        return self._state

    async def acknowledge(self, generation: int) -> None:
        """Nobody asks for it."""

    def doubt(self, error: DiskError) -> None:
        """Nobody looks: whoever mounted it watches it."""


class LocalStripe:
    """The handover inside one process. `publish`, `wait_acknowledged` and `take_doubt` belong to the thread of the disks part."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._state = StripeState(0, StripeStatus.ABSENT, reason="the disks are being looked at")
        self._acknowledged = -1
        self._doubted = False
        self._follower: asyncio.Future[None] | None = None

    # -- the disks part

    def publish(self, state: StripeState) -> None:
        """Say what the stripe is now. Never waits for the other side."""
        with self._lock:
            self._state = state
            follower, self._follower = self._follower, None
        if follower is not None:
            with suppress(RuntimeError):  # its loop is closed: the daemon is at its end
                follower.get_loop().call_soon_threadsafe(_wake, follower)

    def wait_acknowledged(self, generation: int, seconds: float) -> bool:
        """Wait at most `seconds` until the serving part has let go since `generation`; whether it has."""
        with self._lock:
            return self._lock.wait_for(lambda: self._acknowledged == generation, seconds)

    def take_doubt(self) -> bool:
        """Whether the serving part met a failing disk since the last call."""
        with self._lock:
            doubted, self._doubted = self._doubted, False
            return doubted

    # -- the serving part

    def current(self) -> StripeState:
        """What was published last."""
        with self._lock:
            return self._state

    async def changed(self, after: StripeState) -> StripeState:
        """Wait for another word than `after`; one follower at a time."""
        while True:
            with self._lock:
                if self._state != after:
                    return self._state
                follower = self._follower = asyncio.get_running_loop().create_future()
            await follower

    async def acknowledge(self, generation: int) -> None:
        """Everything of ours is closed."""
        with self._lock:
            self._acknowledged = generation
            self._lock.notify_all()

    def doubt(self, error: DiskError) -> None:
        """The disks part sees it at its next look."""
        with self._lock:
            self._doubted = True


def _wake(follower: asyncio.Future[None]) -> None:
    if not follower.done():
        follower.set_result(None)
