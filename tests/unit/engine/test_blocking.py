"""The threads for calls that may block: closing them refuses, drops what waits, and tells when the last call has ended."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nvcache.engine.blocking import DaemonExecutor


class Closed(Exception):  # noqa: N818
    """What the tests refuse with."""


def test_a_closed_executor_refuses_drops_what_waits_and_is_done_with_the_last_call() -> None:
    threads, go, began = DaemonExecutor("test", 1), threading.Event(), threading.Event()

    def work() -> str:
        began.set()
        assert go.wait(10)
        return "done"

    running = threads.submit(work)
    assert began.wait(10)
    abandoned, waiting = threads.submit(work), threads.submit(work)
    assert abandoned.cancel(), "its caller was cancelled"
    ended = threads.close(Closed)
    with pytest.raises(Closed):
        waiting.result(10)
    with pytest.raises(Closed):
        threads.submit(work)
    assert not ended.done()
    assert not ended.cancel(), "whoever stops waiting for the end does not end it"
    go.set()
    assert running.result(10) == "done"
    ended.result(10)
    assert threads.close(Closed) is ended


def test_an_idle_one_and_an_unused_one_are_closed_at_once() -> None:
    threads = DaemonExecutor("test", 4)
    for _ in range(8):
        threads.submit(lambda: None).result(10)
    threads.close(Closed).result(10)
    DaemonExecutor("test", 4).close(Closed).result(0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_a_cancellation_that_comes_with_the_answer_is_not_lost() -> None:
    async def ask_for_ever(threads: DaemonExecutor) -> None:
        while True:
            await threads.bounded(10.0, "look", lambda: None)

    async def test() -> None:
        threads = DaemonExecutor("test", 1)
        for _ in range(300):
            asking = asyncio.create_task(ask_for_ever(threads))
            await asyncio.sleep(0.0005)
            asking.cancel()
            done, _ = await asyncio.wait({asking}, timeout=5)
            assert done, "the task goes on as if nobody had cancelled it"

    asyncio.run(test())
