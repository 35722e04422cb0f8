"""What keeps the stories: how many of models that are gone, that nothing is lost or told twice, and that a bad disk costs notes and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nvcache.core.ref import EntryId
from nvcache.core.timeline import WORDS, Kind
from nvcache.engine import timeline
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.timeline import Timeline
from nvcache.errors import Code, Interrupted
from nvcache.store.layout import Layout
from nvcache.store.timeline import DAEMON, Timelines
from tests.unit.store.helpers import new_store

HERE = EntryId("hf--org--here", "1" * 40)


def entry(number: int) -> EntryId:
    return EntryId(f"hf--org--gone-{number:03}", "2" * 40)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_store(tmp_path / "store")


@asynccontextmanager
async def keeping(layout: Layout) -> AsyncIterator[Timeline]:
    """One that is opened and closed as a session does."""
    disk = DaemonExecutor("disk", 2)
    kept = Timeline(Timelines(layout), disk, lambda: {HERE.slug})
    await disk.call(kept.load)
    async with asyncio.timeout(30):
        yield kept
        await kept.close()
        await asyncio.wrap_future(disk.close(lambda: Interrupted(Code.STOPPING, "cannot: the test is over")))


def test_stories_of_models_that_are_gone_are_bounded_and_the_oldest_go(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "GONE", 5)

    async def test() -> None:
        async with keeping(layout) as kept:
            kept.started("1.2.3")
            for number in range(20):
                kept.note(HERE, Kind.LEASED, who=str(number))
                kept.note(entry(number), Kind.REMOVED)
                await kept.of(HERE.slug)  # by then it is written
                if number == 18:
                    kept.note(entry(14), Kind.HIT)
            assert [event.kind for event in await kept.of(HERE.slug)].count(Kind.LEASED) == 20
        assert len(Timelines(layout).read(DAEMON)) == 1
        left = set(Timelines(layout).names())
        assert left >= {HERE.slug, entry(14).slug, entry(18).slug, entry(19).slug}
        assert len(left) == 5 + 1
        monkeypatch.setattr(timeline, "GONE", 2)
        async with keeping(layout):
            pass
        assert len(Timelines(layout).read(HERE.slug)) == 20
        assert len(set(Timelines(layout).names()) - {HERE.slug}) == 2

    asyncio.run(test())


def test_notes_are_told_before_they_are_written_in_order_and_once(layout: Layout) -> None:
    async def test() -> None:
        async with keeping(layout) as kept:
            for number in range(300):
                kept.note(HERE, Kind.CHECKED, what=str(number))
                if number % 50 == 0:
                    assert [event.what for event in await kept.of(HERE.slug)] == [str(seen) for seen in range(number + 1)]
        assert [event.what for event in Timelines(layout).read(HERE.slug)] == [str(number) for number in range(300)]

    asyncio.run(test())


def test_one_file_that_cannot_be_written_costs_no_other_and_is_told_once(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    layout.timeline(entry(1).slug).mkdir()

    async def test() -> None:
        async with keeping(layout) as kept:
            for _ in range(3):
                kept.note(entry(1), Kind.REMOVED)
                kept.note(HERE, Kind.LEASED)
                await kept.of(HERE.slug)
            assert len(await kept.of(HERE.slug)) == 3
        assert caplog.text.count("what happens is not noted") == 1

    asyncio.run(test())


def test_after_the_end_nothing_is_noted_and_nothing_complains(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with keeping(layout) as kept:
            kept.note(HERE, Kind.LEASED)
        kept.note(HERE, Kind.RELEASED)
        await asyncio.sleep(0)
        assert [event.kind for event in Timelines(layout).read(HERE.slug)] == [Kind.LEASED]
        assert caplog.text == ""

    asyncio.run(test())


def test_a_store_without_the_folder_is_opened_all_the_same(layout: Layout) -> None:
    layout.timelines.rmdir()
    layout.timelines.write_text("not a directory")

    async def test() -> None:
        async with keeping(layout) as kept:
            await asyncio.to_thread(kept.at_start, HERE, Kind.REMOVED, bytes=1)

    asyncio.run(test())


def test_texts_are_masked_and_cut(layout: Layout) -> None:
    async def test() -> None:
        async with keeping(layout) as kept:
            kept.note(HERE, Kind.RETRIED, what="cannot fetch https://u:p@host/x?sig=abc " + "y" * 1000, source="https://u:p@host")
            (event,) = await kept.of(HERE.slug)
            assert event.source == "https://***@host"
            assert event.what is not None
            assert event.what.startswith("cannot fetch https://***@host/x?*** ")
            assert (len(event.what), event.what[-1]) == (WORDS, "…")

    asyncio.run(test())
