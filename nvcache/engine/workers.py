"""The pool of worker processes: hands tasks out, carries their progress and results back, restarts what died. It knows nothing of models.

A worker has as many lanes as it may hold chunk buffers; a task costs lanes, and waits for its turn (see `turns`) until some worker has them free and
its source's limit allows them. A fetch that makes way for a more urgent task goes back to the queue, and on from its journal.
Cancelling a task tells the worker; a worker that does not stop within `STOP_GRACE` seconds is killed, and only its own tasks fail.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

from nvcache import logs
from nvcache.core.plan import Priority
from nvcache.engine.messages import FetchTask, Task, error_from_dict, task_to_dict
from nvcache.engine.process import Process, ProgressCallback, Turn, Watch
from nvcache.engine.status import Counters
from nvcache.engine.turns import Limit, Start, choose, shares
from nvcache.errors import Code, DiskError, Interrupted, NvcacheError
from nvcache.system.run import start_service

log = logging.getLogger(__name__)
STOP_GRACE = 10.0  # seconds a cancelled task may take before its process is killed
STOP_ALL_GRACE = 1.0  # seconds for all workers together when the store is closed; they leave at once unless they are stuck
TRIES = 3  # of a task whose process dies under it
SILENCE = 60.0  # seconds without a word from a worker after which it is taken for stuck, and killed: it speaks every few seconds
LINE_LIMIT = 64 * 2**20  # the chunk digests of a 50 TB file are 25 MB; a line is never longer than this
REST = 2.0  # seconds a fetch that made way stays away at least: demand comes in waves, and going on costs reading what is here
Locate = Callable[[], Awaitable[dict[str, Any]]]


class Workers:
    """`count` processes with `lanes` each, started at the first task. All methods belong to the event loop.

    `limits` are by source; `doubt` is told of reads that fail without failing a task.
    """

    def __init__(
        self,
        count: int,
        lanes: int,
        hello: dict[str, Any],
        env: dict[str, str],
        counters: Counters,
        doubt: Callable[[NvcacheError], None],
        limits: Mapping[str, Limit],
    ) -> None:
        self.count = count
        self.lanes = lanes
        self._counters = counters
        self._doubt = doubt
        self._hello = hello
        self._env = env
        self._limits = limits
        self._processes: list[Process] = []
        self._alive: set[asyncio.subprocess.Process] = set()  # also what is about to serve, or killed and not dead yet
        self._numbers = itertools.count(1)
        self._waiting: dict[str | None, list[tuple[Priority, int, Turn]]] = {}  # a heap for each source
        self._stale = False  # priorities have changed, and the heaps do not know yet
        self._starting = asyncio.Lock()
        self._cleanups: set[asyncio.Task[None]] = set()
        self._stopping = False

    def lanes_for(self, files: int) -> int:
        """How many lanes one of `files` large files gets when they are fetched side by side."""
        return max(1, min(self.lanes, max(2, self.count * self.lanes // max(1, files))))

    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        return [process.process.pid for process in self._processes]

    def prepare(self, count: int | None = None) -> None:
        """Start the processes that are missing (of `count`, by default of all), without waiting: a task is about to come."""
        if len(self._processes) < (count or self.count) and not self._stopping:
            self._own(self._start_missing(count))

    async def run(
        self,
        task: Task,
        *,
        priority: Callable[[], Priority],
        locate: Locate | None = None,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """Run `task` on some worker and return its result. `progress(stored, fetched)` is called on the event loop.

        `priority` is asked when the task is queued, when others need its lanes, and after `reconsider`. `locate` gives the `remote` of a `FetchTask`
        once it has its lanes: what was signed before it waited may have run out. `watch` is told when it has lanes and of what its source does.
        Tasks may be repeated, and are when their process died or they made way. Raises what the task or `locate` raised, `DiskError` (worker-died)
        when that happened `TRIES` times, `Interrupted` (stopping). A cancelled caller cancels the task.
        """
        if isinstance(task, FetchTask):
            most = self._limits.get(task.source, Limit()).connections
            task = replace(task, lanes=min(task.lanes, most or task.lanes))
        turn = Turn(next(self._numbers), task, priority, progress, watch)
        deaths = 0
        while True:
            try:
                result = await self._try(turn, locate)
            except DiskError as error:
                deaths += 1
                if error.code is not Code.WORKER_DIED or deaths == TRIES:
                    raise
                log.warning("a task is given to another worker: %s", error)
            else:
                if result is not None:
                    return result
                turn.runs(False)
                await asyncio.sleep(REST)
            turn.wait()

    def reconsider(self) -> None:
        """Priorities have changed: ask all that wait for theirs again, in a moment."""
        if not self._stale:
            self._stale = True
            asyncio.get_running_loop().call_soon(self._reorder)

    async def stop(self) -> None:
        """Cancel everything and end the processes, by force after `STOP_ALL_GRACE` seconds. Returns when none is left; a dead disk may hold one."""
        self._stopping = True
        self._fail_waiting(_stopping())
        try:
            async with asyncio.timeout(STOP_ALL_GRACE), self._starting:  # one that is being started would be left behind
                pass
        except TimeoutError:
            log.warning("a worker is still being started")
        listeners = [process.listener for process in self._processes if process.listener]
        for process in self._processes:
            process.writer.close()  # the worker leaves at once when its control socket ends
        await self._ends(STOP_ALL_GRACE)
        for owned in [*listeners, *self._cleanups]:
            owned.cancel()
        await asyncio.gather(*listeners, *self._cleanups, return_exceptions=True)
        for child in self._alive:
            _kill(child)
        await self._ends(None)

    async def _ends(self, grace: float | None) -> None:
        """Wait until no process is left, at most `grace` seconds."""
        waits = [asyncio.create_task(child.wait()) for child in self._alive]
        if waits:
            await asyncio.wait(waits, timeout=grace)
        for wait in waits:
            wait.cancel()

    # -- one task

    async def _try(self, turn: Turn, locate: Locate | None) -> dict[str, Any] | None:
        """One try of a task: its result, or None when it made way."""
        await self._start_missing()
        process = await self._acquire(turn)
        turn.runs(True)
        try:
            task = turn.task
            if locate is not None and isinstance(task, FetchTask):
                task = replace(task, remote=await locate())
            process.tell({"do": "task", "id": turn.number, "log": logs.current(), **task_to_dict(task)})
            turn.sent = True
        finally:
            if not turn.sent:
                process.drop(turn)
            self._hand_out()  # it could not make way before
        try:
            return await asyncio.shield(turn.answer)
        except asyncio.CancelledError:
            turn.abandon()
            self._end(process, turn)
            raise

    async def _acquire(self, turn: Turn) -> Process:
        if self._stopping:
            raise _stopping()
        heapq.heappush(self._waiting.setdefault(turn.source, []), (turn.priority(), turn.number, turn))
        self._hand_out()
        try:
            return await turn.place
        except asyncio.CancelledError:
            if not turn.place.cancelled() and turn.place.exception() is None:
                turn.place.result().drop(turn)
            self._hand_out()
            raise

    def _end(self, process: Process, turn: Turn) -> None:
        """Have a task stopped that was sent."""
        if not turn.stopping and not turn.answer.done():
            process.tell({"do": "cancel", "id": turn.number})
            self._own(self._await_stop(process, turn.answer))
        turn.stopping = True

    async def _await_stop(self, process: Process, answer: asyncio.Future[dict[str, Any] | None]) -> None:
        done, _ = await asyncio.wait({answer}, timeout=STOP_GRACE)
        if not done:
            log.warning("worker %d ignored a cancellation for %g s and is killed", process.process.pid, STOP_GRACE)
            _kill(process.process)

    # -- whose turn it is

    def _hand_out(self) -> None:
        """Give lanes to whose turn it is, and stop what is to make way for it."""
        while not self._stopping:
            heads = {turn.number: turn for queue in self._waiting.values() if (turn := _head(queue)) is not None}
            held = [turn.held(i) for i, process in enumerate(self._processes) for turn in process.running.values() if turn.stopping or turn.movable]
            step = choose([turn.asking for turn in heads.values()], [process.free for process in self._processes], self._room(), held)
            if step is None:
                break
            if isinstance(step, Start):
                turn = heads[step.number]
                heapq.heappop(self._waiting[turn.source])
                self._processes[step.worker].take(turn)
            else:
                self._preempt(step.victims)
        if not self._stopping:
            self._share()

    def _preempt(self, victims: tuple[int, ...]) -> None:
        for process in self._processes:
            for number in process.running.keys() & victims:
                turn = process.running[number]
                name = turn.task.name if isinstance(turn.task, FetchTask) else ""
                log.info("the fetch of %s makes way for one that somebody waits for", name)
                self._counters.preemptions += 1
                self._end(process, turn)

    def _room(self) -> dict[str, int]:
        """How many more lanes each limited source allows."""
        limited = {source: limit.connections for source, limit in self._limits.items() if limit.connections}
        return {source: most - sum(process.busy[source] for process in self._processes) for source, most in limited.items()}

    def _share(self) -> None:
        """Tell each worker its part of the limited bandwidths, where that has changed."""
        for source, limit in self._limits.items():
            if limit.bandwidth:
                for process, rate in zip(self._processes, shares(limit.bandwidth, [p.busy[source] for p in self._processes]), strict=True):
                    if rate and process.rates.get(source) != rate:
                        process.rates[source] = rate
                        process.tell({"do": "rate", "source": source, "bytes_per_second": rate})

    def _reorder(self) -> None:
        self._stale = False
        for source, queue in self._waiting.items():
            self._waiting[source] = [(turn.priority(), number, turn) for _, number, turn in queue if not turn.place.done()]
            heapq.heapify(self._waiting[source])
        self._hand_out()

    def _fail_waiting(self, error: NvcacheError) -> None:
        """Tell all that wait for lanes that there will be none."""
        for _, _, turn in itertools.chain.from_iterable(self._waiting.values()):
            if not turn.place.done():
                turn.place.set_exception(error)
        self._waiting.clear()

    # -- the processes

    async def _start_missing(self, count: int | None = None) -> None:
        async with self._starting:
            while len(self._processes) < min(count or self.count, self.count) and not self._stopping:
                self._processes.append(await self._start())
        self._hand_out()

    async def _start(self) -> Process:
        ours, theirs = socket.socketpair()
        try:
            argv = [sys.executable, "-P", "-m", "nvcache.engine.worker"]
            child = await start_service(argv, control=theirs, env=self._env)
            self._alive.add(child)
            self._own(self._reap(child))
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
        except OSError as error:
            ours.close()
            raise DiskError(Code.WORKER_DIED, f"cannot start a worker process: {error.strerror}") from error
        except asyncio.CancelledError:
            ours.close()  # with it a worker that began ends
            raise
        finally:
            theirs.close()
        process = Process(child, reader, writer, self.lanes)
        process.tell(self._hello)
        process.listener = asyncio.create_task(self._listen(process), name=f"worker-{child.pid}")
        return process

    async def _listen(self, process: Process) -> None:
        """Own one process until it ends: carry its events, then fail what it left undone."""
        try:
            async with asyncio.timeout(SILENCE) as silence:
                while line := await process.reader.readline():
                    silence.reschedule(asyncio.get_running_loop().time() + SILENCE)
                    self._event(process, json.loads(line))
        except TimeoutError:
            log.warning("worker %d has said nothing for %g s and is killed", process.process.pid, SILENCE)
        except (ConnectionError, ValueError) as error:
            log.warning("worker %d sent nothing readable: %s", process.process.pid, type(error).__name__)
        finally:
            _kill(process.process)
            if process in self._processes:
                self._processes.remove(process)
            process.writer.close()
            self._orphan(process)
            self._hand_out()
        status = await process.process.wait()
        if not self._stopping:
            self._counters.worker_restarts += 1
            log.warning("worker %d ended with status %s", process.process.pid, status)
            if any(self._waiting.values()):
                await self._replace()

    def _orphan(self, process: Process) -> None:
        """Tell the tasks of a process that ended. One that was to make way has."""
        for turn in process.running.values():
            if self._stopping:
                turn.failed(_stopping())
            elif turn.stopping:
                turn.made_way()
            else:
                turn.failed(DiskError(Code.WORKER_DIED, f"cannot finish the task: worker process {process.process.pid} died"))

    async def _reap(self, child: asyncio.subprocess.Process) -> None:
        await child.wait()
        self._alive.discard(child)

    async def _replace(self) -> None:
        """Start a worker for those who wait; when that fails they are told, not left waiting."""
        try:
            await self._start_missing()
        except DiskError as error:
            if not self._processes:
                self._fail_waiting(error)

    def _event(self, process: Process, message: dict[str, Any]) -> None:
        if message["event"] == "alive":
            return
        if message["event"] == "doubt":
            self._doubt(DiskError(Code.DISK_IO, message["why"]))
            return
        if message["event"] == "pause":
            self._counters.throttled_seconds += message["seconds"]
            for other in self._processes:
                if other is not process:
                    other.tell({"do": "pause", "origin": message["origin"], "seconds": message["seconds"]})
            return
        turn = process.running.get(message["id"])
        if turn is None:
            return
        if message["event"] == "trouble":
            self._counters.source_failed(turn.source or "", message["code"])
            turn.trouble(message["code"], message["pause"], message["why"])
            return
        if message["event"] == "progress":
            could = turn.movable
            turn.told(message["stored"], message["fetched"])
            if could is turn.movable:
                return
        else:
            process.drop(turn)
            _answer(turn, message)
        self._hand_out()

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._cleanups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a worker could not be looked after: %s", error)


def _head(queue: list[tuple[Priority, int, Turn]]) -> Turn | None:
    """The first that still waits."""
    while queue and queue[0][2].place.done():
        heapq.heappop(queue)
    return queue[0][2] if queue else None


def _answer(turn: Turn, message: dict[str, Any]) -> None:
    if message["event"] == "done":
        turn.done(message["result"])
        return
    error = error_from_dict(message["error"])
    if turn.stopping and error.code is Code.CANCELLED:
        turn.made_way()
    else:
        turn.failed(error)


def _kill(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        child.kill()


def _stopping() -> Interrupted:
    return Interrupted(Code.STOPPING, "cannot go on: the daemon is stopping")
