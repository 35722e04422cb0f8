"""The pool of worker processes: hands tasks out, carries their progress and results back, restarts what died. It knows nothing of models.

A worker has as many lanes as it may hold chunk buffers; a task costs lanes, and waits in order of priority until some worker has them free.
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
from collections.abc import Callable, Coroutine
from typing import Any

from nvcache.core.plan import Priority
from nvcache.engine.messages import FetchTask, Task, encode, error_from_dict, task_to_dict
from nvcache.errors import Code, DiskError, Interrupted
from nvcache.system.run import start_service

log = logging.getLogger(__name__)
STOP_GRACE = 10.0  # seconds a cancelled task may take before its process is killed
STOP_ALL_GRACE = 3.0  # seconds for all workers together when the daemon stops
TRIES = 3  # of a task whose process dies under it
SILENCE = 60.0  # seconds without a word from a worker after which it is taken for stuck, and killed: it speaks every few seconds
LINE_LIMIT = 64 * 2**20  # the chunk digests of a 50 TB file are 25 MB; a line is never longer than this
ProgressCallback = Callable[[int, int], None]


class _Running:
    """A task in a worker: its answer, and who is told of its progress."""

    def __init__(self, cost: int, progress: ProgressCallback | None) -> None:
        self.cost = cost
        self.progress = progress
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()


class _Process:
    """One worker process and the tasks it has."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lanes: int) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.free = lanes
        self.running: dict[int, _Running] = {}
        self.listener: asyncio.Task[None] | None = None

    def tell(self, message: dict[str, Any]) -> None:
        self.writer.write(encode(message))

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


class Workers:
    """`count` processes with `lanes` each, started at the first task. All methods belong to the event loop."""

    def __init__(self, count: int, lanes: int, hello: dict[str, Any], env: dict[str, str]) -> None:
        self.count = count
        self.lanes = lanes
        self.restarts = 0
        self.throttled_seconds = 0.0
        self._hello = hello
        self._env = env
        self._processes: list[_Process] = []
        self._numbers = itertools.count(1)
        self._waiting: list[tuple[int, int, int, asyncio.Future[_Process]]] = []
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

    async def run(self, task: Task, *, priority: Priority = Priority.DEMAND, progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Run `task` on some worker and return its result. `progress(stored, fetched)` is called on the event loop.

        Tasks may be repeated, and are when their process died. Raises what the task raised, `DiskError` (worker-died) when that happened `TRIES`
        times, `Interrupted` (stopping). A cancelled caller cancels the task.
        """
        for attempt in range(1, TRIES + 1):
            try:
                return await self._run_once(task, priority, progress)
            except DiskError as error:
                if error.code is not Code.WORKER_DIED or attempt == TRIES:
                    raise
                log.warning("a task is given to another worker: %s", error)
        raise AssertionError("unreachable")

    async def _run_once(self, task: Task, priority: Priority, progress: ProgressCallback | None) -> dict[str, Any]:
        await self._start_missing()
        cost = task.lanes if isinstance(task, FetchTask) else 1
        process = await self._acquire(cost, priority)
        number = next(self._numbers)
        running = process.running[number] = _Running(cost, progress)
        process.tell({"do": "task", "id": number, **task_to_dict(task)})
        try:
            return await asyncio.shield(running.answer)
        except asyncio.CancelledError:
            running.progress = None
            process.tell({"do": "cancel", "id": number})
            self._own(self._await_stop(process, running))
            raise

    async def stop(self) -> None:
        """Cancel everything and end the processes, by force after `STOP_ALL_GRACE` seconds."""
        self._stopping = True
        for *_, future in self._waiting:
            if not future.done():
                future.set_exception(_stopping())
        self._waiting.clear()
        try:
            async with asyncio.timeout(STOP_ALL_GRACE), self._starting:  # one that is being started would be left behind
                pass
        except TimeoutError:
            log.warning("a worker is still being started")
        for process in self._processes:
            process.writer.close()  # the worker leaves at once when its control socket ends
        waits = [process.process.wait() for process in self._processes]
        if waits:
            try:
                async with asyncio.timeout(STOP_ALL_GRACE):
                    await asyncio.gather(*waits)
            except TimeoutError:
                for process in self._processes:
                    process.kill()
        listeners = [process.listener for process in self._processes if process.listener]
        for owned in [*listeners, *self._cleanups]:
            owned.cancel()
        await asyncio.gather(*listeners, *self._cleanups, return_exceptions=True)

    async def _acquire(self, cost: int, priority: Priority) -> _Process:
        if self._stopping:
            raise _stopping()
        future: asyncio.Future[_Process] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (int(priority), next(self._numbers), cost, future))
        self._hand_out()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result(), cost)
            raise

    def _hand_out(self) -> None:
        while self._waiting:
            _, _, cost, future = self._waiting[0]
            if future.done():
                heapq.heappop(self._waiting)
                continue
            best = max(self._processes, key=lambda process: process.free, default=None)
            if best is None or best.free < cost:
                return
            heapq.heappop(self._waiting)
            best.free -= cost
            future.set_result(best)

    def _release(self, process: _Process, cost: int) -> None:
        process.free += cost
        self._hand_out()

    async def _start_missing(self, count: int | None = None) -> None:
        async with self._starting:
            while len(self._processes) < min(count or self.count, self.count) and not self._stopping:
                self._processes.append(await self._start())
        self._hand_out()

    async def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        try:
            argv = [sys.executable, "-P", "-m", "nvcache.engine.worker"]
            child = await start_service(argv, control=theirs, env=self._env)
        except OSError as error:
            ours.close()
            raise DiskError(Code.WORKER_DIED, f"cannot start a worker process: {error.strerror}") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_LIMIT)
        process = _Process(child, reader, writer, self.lanes)
        process.tell(self._hello)
        process.listener = asyncio.create_task(self._listen(process), name=f"worker-{child.pid}")
        return process

    async def _listen(self, process: _Process) -> None:
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
            process.kill()
            if process in self._processes:
                self._processes.remove(process)
            process.writer.close()
            status = process.process.returncode
            for running in process.running.values():
                if not running.answer.done():
                    running.answer.set_exception(
                        _stopping()
                        if self._stopping
                        else DiskError(Code.WORKER_DIED, f"cannot finish the task: worker process {process.process.pid} died")
                    )
                    running.answer.exception()  # retrieved here: its waiter may be gone
        status = await process.process.wait()
        if not self._stopping:
            self.restarts += 1
            log.warning("worker %d ended with status %s", process.process.pid, status)
            if self._waiting:
                await self._replace()

    async def _replace(self) -> None:
        """Start a worker for those who wait; when that fails they are told, not left waiting."""
        try:
            await self._start_missing()
        except DiskError as error:
            if not self._processes:
                for *_, future in self._waiting:
                    if not future.done():
                        future.set_exception(error)
                self._waiting.clear()

    def _event(self, process: _Process, message: dict[str, Any]) -> None:
        if message["event"] == "alive":
            return
        if message["event"] == "pause":
            self.throttled_seconds += message["seconds"]
            for other in self._processes:
                if other is not process:
                    other.tell({"do": "pause", "origin": message["origin"], "seconds": message["seconds"]})
            return
        running = process.running.get(message["id"])
        if running is None:
            return
        if message["event"] == "progress":
            if running.progress:
                running.progress(message["stored"], message["fetched"])
            return
        del process.running[message["id"]]
        self._release(process, running.cost)
        if running.answer.done():
            return
        if message["event"] == "done":
            running.answer.set_result(message["result"])
        else:
            running.answer.set_exception(error_from_dict(message["error"]))
            running.answer.exception()  # retrieved here: its waiter may be gone

    async def _await_stop(self, process: _Process, running: _Running) -> None:
        done, _ = await asyncio.wait({running.answer}, timeout=STOP_GRACE)
        if not done:
            log.warning("worker %d ignored a cancellation for %g s and is killed", process.process.pid, STOP_GRACE)
            process.kill()

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._cleanups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a worker could not be looked after: %s", error)


def _stopping() -> Interrupted:
    return Interrupted(Code.STOPPING, "cannot go on: the daemon is stopping")
