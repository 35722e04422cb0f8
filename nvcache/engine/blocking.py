"""Calls that may block, on daemon threads that nobody joins at exit: a dead disk or a stalled source can then never keep the daemon from stopping.

The standard ThreadPoolExecutor joins its threads at interpreter exit, which is why this exists. It retries nothing and cancels nothing.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from contextvars import copy_context
from typing import Any, ParamSpec, TypeVar

from nvcache.errors import Code, DiskError

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when the caller is cancelled meanwhile; the cancellation is then raised afterwards.

    For steps that must not be left half-way in memory while a thread goes on with them on the disk.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                continue  # asked again: it is as cancelled as it can be
        if not task.cancelled():
            task.exception()  # seen; the cancellation is what the caller gets
        raise


def owned(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task whose defects reach the log at once, not when somebody awaits it. The caller cancels it."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_defect)
    return task


def _tell_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended unexpectedly", task.get_name(), exc_info=error)


class DaemonExecutor(Executor):
    """At most `size` daemon threads, started as needed; fits `aiofiles` and `loop.run_in_executor`."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._queue: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._refusal: Callable[[], Exception] | None = None
        self._ended: Future[None] = Future()
        self._ended.set_running_or_notify_cancel()  # whoever stops waiting for it must not end it

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` on a thread of this executor, in a copy of the caller's context. Raises what `close` was given once it is closed."""
        future: Future[T] = Future()
        context = copy_context()
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            self._queue.put((future, lambda: context.run(fn, *args, **kwargs)))  # type: ignore[arg-type]  # Future is invariant; only its maker reads it
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # noqa: BLE001 - carried to the caller, as every executor does
                    future.set_exception(error)
                else:
                    future.set_result(result)
            del future, call, work  # an idle thread must not keep results alive
            self._idle.release()
        with self._lock:
            self._threads.remove(threading.current_thread())
            last = not self._threads
        if last:
            self._ended.set_result(None)

    def close(self, refusal: Callable[[], Exception]) -> Future[None]:
        """Take no more calls, which raise `refusal()` from now on, and drop those that wait. Done when the last running call has ended."""
        with self._lock:
            if self._refusal is not None:
                return self._ended
            self._refusal = refusal
            with suppress(queue.Empty):
                while (work := self._queue.get_nowait()) is not None:
                    if work[0].set_running_or_notify_cancel():
                        work[0].set_exception(refusal())
            for _ in self._threads:
                self._queue.put(None)
            idle = not self._threads
        if idle:
            self._ended.set_result(None)
        return self._ended

    async def call(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `fn` run on a thread. A cancelled caller leaves the thread to finish alone."""
        return await asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    async def bounded(self, seconds: float, doing: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `call`, but raises `DiskError` (disk-stalled) when there is no answer in `seconds`."""
        try:
            # Not asyncio.wait_for: up to Python 3.11 it loses a cancellation that comes together with the answer.
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(self.submit(fn, *args, **kwargs))
        except TimeoutError as error:
            raise DiskError(Code.DISK_STALLED, f"cannot {doing}: no answer in {seconds:g} s") from error
