"""Calls that may block, on daemon threads that nobody joins at exit: a dead disk or a stalled source can then never keep the daemon from stopping.

The standard ThreadPoolExecutor joins its threads at interpreter exit, which is why this exists. It retries nothing and cancels nothing.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from nvcache.errors import Code, DiskError

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


class DaemonExecutor(Executor):
    """At most `size` daemon threads, started as needed; fits `aiofiles` and `loop.run_in_executor`."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._queue: queue.SimpleQueue[tuple[Future[object], Callable[[], object]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` on a thread of this executor."""
        future: Future[T] = Future()
        self._queue.put((future, lambda: fn(*args, **kwargs)))  # type: ignore[arg-type]  # Future is invariant; only its maker reads it
        with self._lock:
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _work(self) -> None:
        while True:
            future, call = self._queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # noqa: BLE001 - carried to the caller, as every executor does
                    future.set_exception(error)
                else:
                    future.set_result(result)
            del future, call  # an idle thread must not keep results alive
            self._idle.release()

    async def call(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `fn` run on a thread. A cancelled caller leaves the thread to finish alone."""
        return await asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    async def bounded(self, seconds: float, doing: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `call`, but raises `DiskError` (disk-stalled) when there is no answer in `seconds`."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.submit(fn, *args, **kwargs)), seconds)
        except TimeoutError as error:
            raise DiskError(Code.DISK_STALLED, f"cannot {doing}: no answer in {seconds:g} s") from error
