"""A task on its way through the pool: when it may make way, and what it counts."""

from __future__ import annotations

import asyncio

from nvcache.core.manifest import CHUNK
from nvcache.core.plan import Priority
from nvcache.engine.messages import FetchTask
from nvcache.engine.process import NEARLY, Turn


def test_a_fetch_that_made_way_gets_on_before_it_does_again() -> None:
    async def test() -> None:
        seen: list[tuple[int, int]] = []
        turn = Turn(1, FetchTask("key", 2**30, "w", 2, "hf"), lambda: Priority.DECLARED, lambda stored, fetched: seen.append((stored, fetched)))
        assert not turn.movable
        turn.sent = True
        assert turn.movable
        turn.told(5 * CHUNK, 5 * CHUNK)
        turn.made_way()
        assert await turn.answer is None
        turn.wait()
        turn.sent = True
        for fetched, movable in ((0, False), (2 * CHUNK - 1, False), (2 * CHUNK, True)):  # what a stop of two lanes may throw away
            turn.told(4 * CHUNK + fetched, fetched)
            assert turn.movable is movable
        turn.told(2**30 - NEARLY + 1, 2**30)
        assert not turn.movable
        turn.done({"fetched": 60 * CHUNK})
        assert await turn.answer == {"fetched": 65 * CHUNK}
        assert seen[:2] == [(5 * CHUNK, 5 * CHUNK), (4 * CHUNK, 5 * CHUNK)]

    asyncio.run(test())
