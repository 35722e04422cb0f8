"""What the pool of workers keeps in mind: a task on its way through it, and a process with the tasks it has. It chooses nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from nvcache.core.manifest import CHUNK
from nvcache.core.plan import Priority
from nvcache.engine.messages import FetchTask, Task, encode
from nvcache.engine.turns import Asking, Held
from nvcache.errors import NvcacheError

NEARLY = 64 * 2**20  # bytes: a fetch with less to go ends about as soon as it could make way
ProgressCallback = Callable[[int, int], None]


class Watch(Protocol):
    """Whoever wants to know where a task's time goes."""

    def runs(self, running: bool) -> None:
        """It has its lanes, or has to wait for them again."""

    def trouble(self, code: str, pause: float, why: str) -> None:
        """A request to its source failed and is made again after `pause` seconds."""


class Turn:
    """A task from its first try to its end: it waits for a place, and then for its answer. All tries keep its place in the order of arrival."""

    def __init__(
        self, number: int, task: Task, priority: Callable[[], Priority], progress: ProgressCallback | None, watch: Watch | None = None
    ) -> None:
        self.number = number
        self.task = task
        self.lanes = task.lanes if isinstance(task, FetchTask) else 1
        self.source = task.source if isinstance(task, FetchTask) else None
        self.priority = priority
        self.progress = progress
        self.watch = watch
        self.preempted = 0  # times
        self.fetched_before = 0  # bytes, in the tries that made way
        self.wait()

    def wait(self) -> None:
        """Begin a try. `answer` becomes the task's result, or None when the try made way."""
        loop = asyncio.get_running_loop()
        self.place: asyncio.Future[Process] = loop.create_future()
        self.answer: asyncio.Future[dict[str, Any] | None] = loop.create_future()
        self.sent = self.stopping = False
        self.stored = self.fetched = 0

    @property
    def asking(self) -> Asking:
        """As one that waits."""
        return Asking(self.number, self.priority(), self.lanes, self.source)

    def held(self, worker: int) -> Held:
        """As one that runs on the process of that index."""
        return Held(self.number, worker, self.priority(), self.lanes, self.source, self.stopping)

    @property
    def movable(self) -> bool:
        """Whether stopping it gains more than it wastes. One that has made way first fetches more than a stop may throw away: no livelock."""
        if not isinstance(self.task, FetchTask) or not self.sent or self.task.size - self.stored < NEARLY:
            return False
        return self.preempted == 0 or self.fetched >= self.lanes * CHUNK

    def told(self, stored: int, fetched: int) -> None:
        """Progress, in bytes of the file that are here and bytes fetched in this try."""
        self.stored, self.fetched = stored, fetched
        if self.progress:
            self.progress(stored, self.fetched_before + fetched)

    def runs(self, running: bool) -> None:
        """It has its lanes, or waits."""
        if self.watch:
            self.watch.runs(running)

    def trouble(self, code: str, pause: float, why: str) -> None:
        """A request failed and is made again after `pause` seconds."""
        if self.watch:
            self.watch.trouble(code, pause, why)

    def done(self, result: dict[str, Any]) -> None:
        """The try ended well."""
        if self.fetched_before:
            result = result | {"fetched": result["fetched"] + self.fetched_before}
        if not self.answer.done():
            self.answer.set_result(result)

    def made_way(self) -> None:
        """The try was stopped for a more urgent one, or for a caller that is gone."""
        self.preempted += 1
        self.fetched_before += self.fetched
        if not self.answer.done():
            self.answer.set_result(None)

    def abandon(self) -> None:
        """The caller is gone: it is told nothing and asked nothing any more."""
        self.progress, self.watch, self.priority = None, None, lambda: Priority.SCRUB

    def failed(self, error: NvcacheError) -> None:
        """The try failed. Nobody need be waiting for it any more."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()


class Process:
    """One worker process and the tasks it has."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lanes: int) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.free = lanes
        self.running: dict[int, Turn] = {}
        self.busy: Counter[str] = Counter()  # lanes by source
        self.rates: dict[str, float] = {}  # bytes a second by source, as it was told
        self.listener: asyncio.Task[None] | None = None

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, without waiting."""
        self.writer.write(encode(message))

    def take(self, turn: Turn) -> None:
        """Give `turn` its lanes."""
        self.running[turn.number] = turn
        self._hold(turn, turn.lanes)
        turn.place.set_result(self)

    def drop(self, turn: Turn) -> None:
        """Take the lanes of `turn` back."""
        del self.running[turn.number]
        self._hold(turn, -turn.lanes)

    def _hold(self, turn: Turn, lanes: int) -> None:
        self.free -= lanes
        if turn.source is not None:
            self.busy[turn.source] += lanes
