"""Keeps the Node as the engine is: follows its changes and writes what differs. What to write `core.signals` decides; serving never waits for it.

A change is told within `DEBOUNCE`; every `RESYNC` the Node is read and compared anew, and a heartbeat is written. After a failure that may pass the
next try waits (`Retry-After`, else doubling, with jitter). What is refused for want of rights or by an admission policy is not tried before the next
`RESYNC` and holds up nothing else. The log is told each reason once, until things go well again.

At a graceful stop everything stays as it is. The models are whole and stay usable by their paths while no daemon runs, and only a daemon removes
any. To withdraw the labels at each upgrade would leave pods pending, and have autoscalers and KAITO make new GPU nodes for want of a label that is
back ten seconds later; whoever needs the daemon itself waits for its socket. A daemon that never comes back shows in the condition's heartbeat, and
the next one withdraws first what is no longer true.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from nvcache.core import retry
from nvcache.core.signals import MODEL_LABELS, Facts, NodeFacts, change, left_out, news
from nvcache.engine import clock
from nvcache.engine.engine import Engine
from nvcache.errors import NvcacheError
from nvcache.kubernetes.outbox import EVERY, Outbox
from nvcache.kubernetes.reading import Reader, refusal
from nvcache.kubernetes.server import ApiServer, CallFailed
from nvcache.settings import Settings

DEBOUNCE = 0.5  # seconds from a change until it is written, so that a burst of them is one write
LOOK = 30.0  # seconds between two looks at the models' files, and between two rounds that no change asked for
RESYNC = 300.0  # seconds until the Node is read anew and the heartbeat written
BACKOFF_MOST = 60.0  # seconds between two tries while the API server fails
ASKED_MOST = 300.0  # seconds that a Retry-After is honoured at most
CONFLICTS = 3  # tries in a row to remove the taint while others write the Node
REFUSAL_SECONDS = 10.0  # a daemon that cannot begin spends at most these on telling why

T = TypeVar("T")
log = logging.getLogger(__name__)


async def follow(settings: Settings, engine: Engine) -> None:
    """Tell the cluster of `engine` until cancelled."""
    signals = Signals(settings, engine.counters.count_signal_failure)
    reader = Reader(engine)
    failures = 0
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_keep_looking(engine), name="signals-look")
            while True:
                try:
                    await signals.tell(reader.read())
                except CallFailed as failure:
                    failures += 1
                    waiting = retry.backoff(failures, random.random(), BACKOFF_MOST)  # noqa: S311 - spreads load
                    await asyncio.sleep(max(waiting, min(ASKED_MOST, failure.asked_s or 0.0)))
                else:
                    failures = 0
                    await engine.changes.listen(LOOK)
                    await asyncio.sleep(DEBOUNCE)
    finally:
        await signals.close()


async def tell_refusal(settings: Settings, error: NvcacheError) -> None:
    """Tell the cluster why the daemon of this node cannot begin. Bounded; that it cannot be told is in the log."""
    signals = Signals(settings)
    try:
        async with asyncio.timeout(REFUSAL_SECONDS):
            await signals.tell(refusal(error))
    except (TimeoutError, CallFailed):
        log.info("the cluster was not told why the daemon cannot begin")
    finally:
        await signals.close()


async def _keep_looking(engine: Engine) -> None:
    """Look at the files of ready models every now and then: a label is believed by whoever never asks the daemon."""
    while True:
        await asyncio.sleep(LOOK)
        with suppress(NvcacheError):  # no store: there is nothing to look at
            await engine.look()


class Signals:
    """What is told of one node. `failed` is called at each call that failed."""

    def __init__(self, settings: Settings, failed: Callable[[], None] = lambda: None) -> None:
        assert settings.node_name is not None  # noqa: S101 - the settings see to it
        self._taint = settings.startup_taint
        self._failed = failed
        self._server = ApiServer(settings.node_name)
        self._outbox = Outbox(settings.node_name)
        self._node: NodeFacts | None = None  # as the last answer showed it
        self._before: Facts | None = None  # what was told last
        self._resync = float("-inf")  # when to read the Node anew, monotonic
        self._refused: set[str] = set()  # kinds of calls that wait for that
        self._complaints: dict[str, str] = {}  # what the log was told, by kind of call
        self._left_out = 0

    async def close(self) -> None:
        """Close the connections."""
        await self._server.close()

    async def tell(self, facts: Facts | None) -> None:
        """Have the Node show `facts`; None: nothing is known yet. Raises `CallFailed` where it is worth trying again."""
        if facts is None:
            return
        due = clock.monotonic() >= self._resync
        if due:
            self._refused.clear()
            self._node = await self._call("node", self._server.node)
            self._resync = clock.monotonic() + RESYNC * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load
        if self._node is None:
            return
        self._outbox.put(news(self._before, facts, self._node.condition), clock.monotonic())
        self._before = facts
        try:
            await self._write(facts, self._node, heartbeat=due)
        except CallFailed:
            self._resync = float("-inf")  # whatever the Node is now
            raise
        await self._send(self._node.uid)

    async def _write(self, facts: Facts, node: NodeFacts, *, heartbeat: bool) -> None:
        """What differs: the labels first, for pods are sent by them; the taint last, for it lets pods in."""
        wanted = change(facts, node, self._taint, clock.stamp(), heartbeat=heartbeat)
        if wanted.labels or wanted.annotations:
            self._node = await self._call("labels", lambda: self._server.write_metadata(wanted)) or self._node
        if wanted.condition is not None:
            shown = wanted.condition
            self._node = await self._call("condition", lambda: self._server.write_condition(shown)) or self._node
        if wanted.taints is not None:
            await self._remove_taint(facts)
        left, self._left_out = self._left_out, left_out(facts)
        if self._left_out and not left:
            log.warning("%d labels of models are left out: a node has at most %d of them, for pinned models first", self._left_out, MODEL_LABELS)

    async def _remove_taint(self, facts: Facts) -> None:
        """Write the taints without ours as the Node was when it was read; if somebody else was faster, read it again."""
        for _ in range(CONFLICTS):
            node = self._node
            taints = change(facts, node, self._taint, "").taints if node is not None else None
            if node is None or taints is None:
                return
            version = node.version
            try:
                after = await self._call("taint", lambda: self._server.write_taints(taints, version))  # noqa: B023 - awaited here
            except CallFailed as failure:
                if failure.status != 409:
                    raise
                fresh = await self._call("node", self._server.node)
                if fresh is None:  # refused: what is known of the Node has to do until it is read anew
                    return
                self._node = fresh
                continue
            if after is not None:
                self._node = after
                log.info("the taint %s is removed from the node: every declared model is ready", self._taint)
            return
        beaten = CallFailed("others kept writing the node", 409)
        self._complain("taint", beaten)
        raise beaten

    async def _send(self, uid: str) -> None:
        """Send the events that wait. That the server will not have them just now holds up nothing else."""
        while (event := self._outbox.next(clock.monotonic())) is not None:
            name = self._outbox.name(event)
            try:
                await self._call("events", lambda: self._server.send(event, name, uid))  # noqa: B023 - awaited here
            except CallFailed as failure:
                return self._outbox.hold(clock.monotonic() + max(EVERY, min(ASKED_MOST, failure.asked_s or 0.0)))
            self._outbox.sent()
        return None

    async def _call(self, kind: str, call: Callable[[], Awaitable[T]]) -> T | None:
        """The answer, or None where only somebody else can help. Raises `CallFailed` that may pass."""
        if kind in self._refused:
            return None
        try:
            answer = await call()
        except CallFailed as failure:
            if failure.status != 409:  # somebody was faster, which is nobody's fault
                self._failed()
                self._complain(kind, failure)
            if failure.passing:
                raise
            self._refused.add(kind)
            return None
        if self._complaints.pop(kind, None) is not None:
            log.info("the cluster can be told again (%s)", kind)
        return answer

    def _complain(self, kind: str, failure: CallFailed) -> None:
        cause = str(failure.status or failure)
        if self._complaints.get(kind) != cause:
            self._complaints[kind] = cause
            log.warning("cannot tell the cluster (%s): %s; serving goes on, and it is tried again", kind, failure)
