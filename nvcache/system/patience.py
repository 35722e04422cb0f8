"""Bounds calls that a disk may keep from returning: each runs on a thread of its own, which is left behind when it does not. It retries nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from nvcache.errors import Code, DiskError

Result = TypeVar("Result")


def within(seconds: float, what: str, call: Callable[[], Result], *, discard: Callable[[Result], None] = lambda _: None) -> Result:
    """What `call` returns or raises, or `DiskError` (disk-stalled) after `seconds`.

    `what` completes "cannot …" and is the call's identity: while one of the same name hangs, another is not started. A call left behind ends when
    the kernel lets go of it; what it then returns is given to `discard`.
    """
    until = monotonic() + seconds
    name = f"disk: {what}"
    for earlier in [thread for thread in threading.enumerate() if thread.name == name]:
        with suppress(RuntimeError):  # listed, but not quite started: it does not hang yet
            earlier.join(max(0.0, until - monotonic()))
        if earlier.is_alive():
            raise DiskError(Code.DISK_STALLED, f"cannot {what}: an earlier attempt still hangs")
    lock = threading.Lock()
    answers: list[Result] = []
    failures: list[BaseException] = []
    abandoned = False

    def work() -> None:
        try:
            answer = call()
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            failures.append(error)
            return
        with lock:
            if abandoned:
                discard(answer)
            else:
                answers.append(answer)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(max(0.0, until - monotonic()))
    with lock:
        abandoned = not answers
    if failures:
        raise failures[0]
    if not answers:
        raise DiskError(Code.DISK_STALLED, f"cannot {what}: no answer within {seconds:g} s")
    return answers[0]
