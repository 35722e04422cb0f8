"""Calls that may hang: bounded, one of a kind at a time, and cleaned up after when they come back late."""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from nvcache.errors import Code, DiskError
from nvcache.system.patience import within


def test_it_returns_or_raises_what_the_call_does() -> None:
    assert within(5, "add", lambda: 1 + 1) == 2
    assert within(5, "answer nothing", lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(5, "divide", lambda: 1 // 0)


def test_calls_in_quick_succession_do_not_take_each_other_for_hanging() -> None:
    assert [within(5, "count", lambda at=at: at) for at in range(300)] == list(range(300))


def test_a_call_that_hangs_is_left_and_its_late_answer_discarded() -> None:
    release, discarded = threading.Event(), threading.Event()
    answers: list[int] = []

    def slow() -> int:
        release.wait(10)
        return 7

    def discard(answer: int) -> None:
        answers.append(answer)
        discarded.set()

    begun = monotonic()
    with pytest.raises(DiskError, match=r"cannot read a disk: no answer within 0\.2 s") as found:
        within(0.2, "read a disk", slow, discard=discard)
    assert found.value.code is Code.DISK_STALLED
    with pytest.raises(DiskError, match="an earlier attempt still hangs"):
        within(0.2, "read a disk", lambda: pytest.fail("a second one was started"))
    assert within(5, "read another disk", lambda: 1) == 1
    assert monotonic() - begun < 8
    assert answers == []
    release.set()
    assert discarded.wait(5)
    assert answers == [7]
    assert within(5, "read a disk", lambda: 8) == 8


def test_many_at_once_are_all_answered() -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda at=at: found.append(within(10, "look at a disk", lambda: at))) for at in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(40))


def test_one_waits_for_another_of_its_kind() -> None:
    running, most = 0, 0
    lock, begun, pause = threading.Lock(), threading.Event(), threading.Event()

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        begun.set()
        pause.wait(0.05)
        with lock:
            running -= 1

    first = threading.Thread(target=within, args=(5, "open a disk", call))
    first.start()
    begun.wait(5)
    within(5, "open a disk", call)
    first.join()
    assert running == 0
    assert most == 1
