"""Our own reading is no use of a model: who asks the kernel is not answered with it."""

from __future__ import annotations

import asyncio

from nvcache.engine.reads import Reads


def test_a_question_waits_for_the_piece_that_is_read_and_no_other_begins_meanwhile() -> None:
    async def test() -> None:
        reads, told = Reads(), list[str]()

        async def ask() -> bool:
            told.append("asked")
            await asyncio.sleep(0)
            return False

        async def another() -> None:
            async with reads.piece() as piece:
                piece.runs(True)
                told.append("another")

        async with asyncio.timeout(30):
            async with reads.piece() as piece:
                piece.runs(True)
                question = asyncio.create_task(reads.beside(ask))
                await asyncio.sleep(0)
                later = asyncio.create_task(another())
                for _ in range(10):
                    await asyncio.sleep(0)
                assert told == []
            await asyncio.gather(question, later)
        assert told == ["asked", "another"]

    asyncio.run(test())


def test_what_was_found_in_use_while_a_piece_was_read_is_asked_again() -> None:
    """The piece had waited for a worker, and got one just then."""

    async def test() -> None:
        reads = Reads()
        answers = [True, True, False]
        async with reads.piece() as piece:

            async def ask() -> bool:
                piece.runs(True)
                piece.runs(False)
                return answers.pop(0)

            assert await reads.beside(ask) is False
        assert answers == []

    asyncio.run(test())


def test_what_others_use_is_believed_at_once() -> None:
    async def test() -> None:
        reads, asked = Reads(), list[int]()

        async def ask() -> bool:
            asked.append(1)
            return True

        assert await reads.beside(ask) is True
        assert asked == [1]

    asyncio.run(test())
