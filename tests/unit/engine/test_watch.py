"""Changes of all models for one reader: each once, as it is when he asks, and at the end why."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from nvcache.core.ref import EntryId
from nvcache.core.states import ModelState
from nvcache.engine.status import ErrorInfo, ModelStatus
from nvcache.engine.watch import Bell, Changes, Watchers
from nvcache.errors import Code, DiskError

ONE, TWO = EntryId("hf--org--one", "1" * 40), EntryId("hf--org--two", "2" * 40)
READY = ModelStatus(str(ONE), "hf://org/one", ONE.revision, ModelState.READY, 1, 2)


def test_many_changes_are_taken_once_and_what_is_gone_is_absent() -> None:
    async def test() -> None:
        watchers = Watchers({ONE: READY}.get, Bell())
        async with watchers.watch_all(()) as changes:
            assert changes.take() == []
            for _ in range(1000):
                watchers.changed(ONE)
                watchers.changed(TWO)
            async with asyncio.timeout(5):
                await changes.wait()
            one, two = changes.take()
            assert one == READY
            assert isinstance(two, ModelStatus)
            assert (two.entry, two.state) == (str(TWO), ModelState.ABSENT)
            assert changes.take() == []
            watchers.close(ErrorInfo.of(DiskError(Code.NO_STRIPE, "cannot use the cache: it is away")))
            async with asyncio.timeout(5):
                await changes.wait()
            assert changes.over
            assert [each.code for each in changes.take() if isinstance(each, ErrorInfo)] == [Code.NO_STRIPE]
        watchers.changed(ONE)
        assert changes.take()[0] != READY, "a reader that left is told nothing more"

    asyncio.run(test())


def test_what_was_here_is_taken_in_parts_each_as_it_is_by_then() -> None:
    known = {ONE: READY, TWO: replace(READY, entry=str(TWO))}
    changes = Changes(known.get, [ONE, TWO])
    assert (changes.more, changes.waiting) == (True, True)
    changes.ring(ONE, TWO)
    assert [each.entry for each in changes.take_here(1)] == [str(ONE)]
    changes.ring(ONE)
    known[TWO] = replace(READY, entry=str(TWO), pinned=True)
    assert changes.take_here(5) == [known[TWO]]
    assert (changes.more, changes.take_here(5), changes.waiting) == (False, [], True)
    assert changes.take() == [READY], "what changed after it was taken, and nothing twice"
    assert not changes.waiting


def test_a_daemon_that_stops_gives_no_reason() -> None:
    changes = Changes({}.get)
    changes.close(None)
    assert changes.over
    assert changes.take() == []
