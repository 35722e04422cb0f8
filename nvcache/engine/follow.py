"""Follows the stripe: has a `Session` open on it while it is mounted, and nothing when it is not. It answers no call and looks at no disk.

A word that the stripe goes ends the session within seconds and closes everything of it before that is acknowledged. What a lost store had is
remembered and fetched again onto the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor, owned
from nvcache.engine.declared import Declared
from nvcache.engine.handover import PlainDirectory, StripeLink, StripeState, StripeStatus
from nvcache.engine.hold import Hold
from nvcache.engine.jobs import Jobs
from nvcache.engine.kaito import Links
from nvcache.engine.otel import Spans
from nvcache.engine.refill import Memory
from nvcache.engine.session import Lasting, Session
from nvcache.engine.status import Counters
from nvcache.engine.watch import Bell
from nvcache.errors import FACTS, Code, DiskError, Interrupted, NvcacheError
from nvcache.settings import Settings

log = logging.getLogger(__name__)
OPEN_TIMEOUT = 60.0  # seconds opening and reading the store may take before the disk counts as stalled
CLOSE_TIMEOUT = 4.0  # seconds until the end of a session counts as stuck: whoever unmounts is promised five, and may be heard half a second late
RETRY_FIRST, RETRY_MOST = 1.0, 60.0  # seconds between two tries to open a store
ASK_AGAIN = 5.0  # seconds a caller is told to wait while there is no store
DOUBT_EVERY = 1.0  # seconds between two doubts about the disks that are passed on
DISK_FAILED = frozenset({Code.DISK_IO, Code.DISK_STALLED})


class Follower:
    """Opens and ends sessions as `link` says. All methods belong to one event loop; `jobs`, `counters` and `net` outlive every session."""

    def __init__(self, settings: Settings, link: StripeLink, jobs: Jobs, counters: Counters, net: DaemonExecutor, spans: Spans | None = None) -> None:
        self.state = link.current()  # the last word about the stripe
        self.bell = Bell()  # rings whenever anything that is told here changed
        self.session: Session | None = None  # also one that is still being loaded
        self._settings = settings
        self._link = link
        self._plain = isinstance(link, PlainDirectory)
        self._jobs = jobs
        self._counters = counters
        self.declared = Declared(settings.models)
        self._lasting = Lasting(jobs, counters, net, self.bell, Links(settings), self.declared, spans)
        self._problems: tuple[str, ...] = ("the daemon is starting",)
        self._following: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()  # the first store was opened, or could not be
        self._failure: NvcacheError | None = None  # why the last try to open it failed
        self._hold: Hold | None = None
        self._leaving: set[asyncio.Task[None]] = set()  # ends of sessions that a disk holds up
        self._memory = Memory(None)
        self._contents: str | None = None  # the fs_uuid that is served, or was when it was last heard of
        self._doubted = float("-inf")

    async def start(self) -> None:
        """Begin; a plain directory is open when this returns, unless its disk does not answer. Raises what opening that one raises."""
        self._following = owned(self._follow(), "follow-stripe")
        if not self._plain:
            return
        await self._tried.wait()
        if self._failure is not None and self._failure.code is not Code.DISK_STALLED:
            await self.stop()
            raise self._failure

    async def stop(self) -> None:
        """End the session; plans stay for the next start. Bounded."""
        self._problems = ("the daemon is stopping",)
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        await self._let_go(None)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why no call is served, in words, or what is wrong with the store; empty when nothing is."""
        return self._problems or (self.session.problems if self.session is not None else ())

    @property
    def causes(self) -> tuple[str, ...]:
        """`problems` for who may not know a model: what failed when the store was opened names one, maybe, so its code stands for it."""
        if self._failure is None or self._problems != (str(self._failure),):
            return self.problems
        return (f"the store is not open: {FACTS[self._failure.code].meaning} ({self._failure.code}); the daemon's log says more",)

    def ready(self) -> Session:
        """The session that serves. Raises `DiskError` (no-stripe)."""
        if self.session is None or not self.session.loaded:
            refusal = self._no_stripe()
            raise refusal()
        return self.session

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Session]:
        """The session, for one call. Raises `DiskError` (no-stripe), also when it ends during the call."""
        session = self.ready()
        async with session.serving():
            yield session

    def doubt(self, error: NvcacheError) -> None:
        """Something failed. If it was the disk, whoever keeps the disks should look."""
        now = clock.monotonic()
        if isinstance(error, DiskError) and error.code in DISK_FAILED and now - self._doubted >= DOUBT_EVERY:
            self._doubted = now
            self._link.doubt(error)

    # -- words about the stripe

    async def _follow(self) -> None:
        """Do what each word about the stripe asks for; a later word cuts short what an earlier one began."""
        self._say(self.state)
        while True:
            state = self.state
            acting = owned(self._have(state) if state.mounted else self._do_without(state), f"stripe-{state.generation}")
            try:
                while (news := await self._link.changed(self.state)).same_contents(state):
                    self.state = news
                    self.bell.ring()
            finally:
                acting.cancel()
                await asyncio.wait({acting})
            self.state = news
            self._say(news)
            if state.mounted or not news.mounted:  # else the store that is opened next takes over what an earlier life left
                self._unlink()
            await self._let_go(self._no_stripe())
            if news.state is StripeStatus.LOST:
                self._count_loss(None)

    def _say(self, state: StripeState) -> None:
        self._problems = (f"the store {state.store} is being opened" if state.mounted else _words(state),)
        self.bell.ring()
        if not self._plain:
            facts = {"state": state.state, "code": state.code, "generation": state.generation, "fs_uuid": state.fs_uuid}
            log.log(logging.INFO if state.mounted else logging.WARNING, "%s", _words(state), extra={"facts": facts})

    async def _have(self, state: StripeState) -> None:
        """Open the store, again and again until it is open."""
        pause = RETRY_FIRST
        while not await self._open(state):
            await self._let_go(self._no_stripe())
            await asyncio.sleep(pause)
            pause = min(RETRY_MOST, pause * 2)

    async def _open(self, state: StripeState) -> bool:
        """Try once, for as long as the disk takes: while a call hangs there is no second one. After `OPEN_TIMEOUT` that is told as a problem."""
        opening = asyncio.create_task(self._load(state), name="open-store")
        try:
            if not (await asyncio.wait({opening}, timeout=OPEN_TIMEOUT))[0]:
                self._failed(DiskError(Code.DISK_STALLED, f"cannot open the store {state.store}: no answer in {OPEN_TIMEOUT:g} s"))
            await opening
        except NvcacheError as error:
            self._failed(error)
            return False
        finally:
            opening.cancel()
        self._failure, self._problems = None, ()
        self._tried.set()
        self.bell.ring()
        return True

    async def _load(self, state: StripeState) -> None:
        hold = self._hold = Hold(Path(state.store or ""), make=self._plain)
        root = await hold.take()
        keep_free = max(self._settings.min_free, self._link.keep_free if isinstance(self._link, PlainDirectory) else 0)
        session = self.session = Session(self._settings.model_copy(update={"min_free": keep_free}), hold, root, self._lasting, doubt=self.doubt)
        await session.load(self._memory, refill=state.fs_uuid != self._memory.fs_uuid)
        self._count_loss(state.fs_uuid)

    def _failed(self, error: NvcacheError) -> None:
        log.error("the store is not open: %s", error, extra={"facts": {"code": error.code}})
        self._failure, self._problems = error, (str(error),)
        self.bell.ring()
        self.doubt(error)
        if isinstance(error, DiskError):
            self._unlink()
        self._tried.set()

    async def _do_without(self, state: StripeState) -> None:
        """There is no stripe to use: say so to whoever wants to unmount it, once nothing of ours is open there or leads there."""
        if self._leaving:
            await asyncio.wait(self._leaving)
        await self._link.acknowledge(state.generation)

    async def _let_go(self, why: Callable[[], NvcacheError] | None) -> None:
        """End the session, if there is one, with `why` (None: the daemon stops). Returns after `CLOSE_TIMEOUT` at most; the rest goes on alone."""
        hold, session = self._hold, self.session
        self._hold = self.session = None
        if session is not None:
            if session.loaded:
                self._memory = session.refiller.remember(self._contents)
            session.refuse(why or _stopping, jobs=why is not None)
        if hold is not None:
            leaving = owned(hold.release(why or _stopping) if session is None else session.leave(), "leave-store")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=CLOSE_TIMEOUT)
        self._jobs.give_up()
        if self._leaving:
            log.error("something has files of the store open still: the disk does not answer")

    def _unlink(self) -> None:
        """Have no link of KAITO's lead to the store that goes; what is put there meanwhile by a session that ends soon is overtaken."""
        if self._lasting.links.wanted:
            unlinking = owned(self._lasting.links.clear(), "unlink")
            self._leaving.add(unlinking)
            unlinking.add_done_callback(self._leaving.discard)

    def _count_loss(self, contents: str | None) -> None:
        """What is served now is `contents`, None for nothing; what was served before and is not the same is lost."""
        if self._contents is not None and self._contents != contents:
            self._counters.stripe_losses += 1
            self.bell.ring()
        self._contents = contents

    def _no_stripe(self) -> Callable[[], NvcacheError]:
        """Makes the error that tells why there is no store, as of now."""
        facts: dict[str, object] = {"stripe": self.state.state, "disk_code": self.state.code}
        message = f"cannot use the cache: {'; '.join(self._problems)}"
        return lambda: DiskError(Code.NO_STRIPE, message, retry_after_s=ASK_AGAIN, facts=dict(facts))


def _words(state: StripeState) -> str:
    """A word about the stripe, for people."""
    why = " ".join(part for part in (state.code, state.reason) if part)
    return f"the stripe is {state.state}{f': {why}' if why else ''}"


def _stopping() -> NvcacheError:
    return Interrupted(Code.STOPPING, "cannot go on: the daemon is stopping")
