"""KAITO's views and links killed at every step of a change, then started again; and the one pass that says which entry each name means."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache import settings
from nvcache.core.manifest import Manifest
from nvcache.core.ref import Ref, Scheme, parse_ref
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.kaito import Kaito, Links
from nvcache.engine.shelf import Entry, Shelf
from nvcache.errors import Code, IntegrityError, NvcacheError
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import EntryState
from nvcache.store.layout import Layout
from nvcache.store.views import Views
from tests.unit.store.helpers import add_blob, manifest_of, noise, tree
from tests.unit.store.test_crash import every_step, new_store_fast

OLD = {"config.json": b"{}", "sub/a.txt": b"a", "model.safetensors": noise(5000)}
NEW = {"config.json": b"{}", "sub/b.safetensors": noise(5000), "new/c.txt": b"c", "d.txt": b"d"}
A, B = manifest_of(OLD, commit="a" * 40), manifest_of(NEW, commit="b" * 40)
WIDER = manifest_of({**OLD, **NEW}, commit="a" * 40)
NAME = "org-model"
WHOLE = {"old": OLD, "new": NEW, "wider": {**OLD, **NEW}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing only takes time here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def where(layout: Layout) -> Path:
    """Where KAITO looks, for that store."""
    return layout.root.with_suffix(".links")


def entry(manifest: Manifest, resolved_at: float) -> Entry:
    """A ready entry that `main` was resolved to then."""
    return Entry(manifest, EntryState(names=("main",), resolved_at=resolved_at))


def kaito_of(layout: Layout, shelf: Shelf) -> Kaito:
    """What a daemon that starts has, once it has looked at what is there."""
    views = Views(layout, Blobs(layout))
    chosen = settings.load(flags={"store": layout.root, "kaito_models": where(layout)}, environ={"HOME": "/root"}, uid=1000)

    def never(error: NvcacheError) -> None:
        raise AssertionError(error)

    kaito = Kaito(shelf, views, DaemonExecutor("disk", 1), Links(chosen), never)
    views.prune([(found.manifest, found.hub_id) for found in shelf.entries.values()], kaito=kaito.take_over())
    return kaito


def shelf_of(*entries: Entry) -> Shelf:
    """A shelf with these."""
    shelf = Shelf()
    for each in entries:
        shelf.put(each)
    return shelf


def start(layout: Layout, *entries: Entry) -> None:
    """A daemon's start, on a store with these entries."""

    async def starting() -> None:
        await kaito_of(layout, shelf_of(*entries)).settle()

    asyncio.run(starting())


def with_old(layout: Layout) -> None:
    """The old revision is shown and linked."""
    shutil.rmtree(where(layout), ignore_errors=True)
    where(layout).mkdir()
    for data in {**OLD, **NEW}.values():
        layout.blob(manifest_of({"x": data}).files[0].sha256).parent.mkdir(parents=True, exist_ok=True)
        add_blob(layout, data)
    start(layout, entry(A, 1))
    assert linked(layout) == "old"


def linked(layout: Layout) -> str | None:
    """What KAITO would load: nothing, or one of the revisions, whole and nothing besides."""
    link = where(layout) / NAME
    assert [child.name for child in where(layout).iterdir()] in ([], [NAME])
    if not link.is_symlink():
        return None
    assert os.readlink(link) == str(layout.kaito / NAME)
    found = tree(link)
    return next(name for name, files in WHOLE.items() if files == found)


def change(act: Callable[[Shelf], None], *before: Entry) -> Callable[[Layout], None]:
    """An operation for `every_step`: a daemon that knows `before`, whose shelf then changes."""

    def operation(layout: Layout) -> None:
        async def go() -> None:
            shelf = shelf_of(*before)
            kaito = kaito_of(layout, shelf)
            await kaito.settle()
            act(shelf)
            await kaito.settle()

        asyncio.run(go())

    return operation


def test_when_another_revision_takes_the_name(tmp_path: Path) -> None:
    ends = []
    for layout in every_step(tmp_path, with_old, change(lambda shelf: shelf.put(entry(B, 2)), entry(A, 1))):
        ends.append(linked(layout))
        assert ends[-1] in (None, "old", "new")
        start(layout, entry(A, 1), entry(B, 2))
        assert linked(layout) == "new"
        assert tree(layout.kaito) == {f"{NAME}/{path}": data for path, data in NEW.items()}
    assert (ends[0], ends[-1], None in ends) == ("old", "new", True)


def remove(shelf: Shelf) -> None:
    """As a removal says it."""
    shelf.entries[A.id].removing = True


def degrade(shelf: Shelf) -> None:
    """As a repair says it."""
    shelf.entries[A.id].broken = IntegrityError(Code.DEGRADED, "cannot serve it: it went bad")


@pytest.mark.parametrize("act", [remove, degrade])
def test_when_it_is_taken_away(tmp_path: Path, act: Callable[[Shelf], None]) -> None:
    for layout in every_step(tmp_path, with_old, change(act, entry(A, 1))):
        assert linked(layout) in (None, "old")
        start(layout)
        assert linked(layout) is None
        assert not list(layout.kaito.iterdir())
    assert linked(layout) is None


def test_when_it_gets_more_files_it_keeps_its_link(tmp_path: Path) -> None:
    for layout in every_step(tmp_path, with_old, change(lambda shelf: shelf.put(entry(WIDER, 1)), entry(A, 1))):
        found = tree(where(layout) / NAME)
        assert OLD.items() <= found.items()
        start(layout, entry(WIDER, 1))
        assert linked(layout) == "wider"


def test_a_withdrawal_waits_for_no_publication(tmp_path: Path) -> None:
    """The link of what went bad goes while another model is being shown, however long that takes."""
    layout = new_store_fast(tmp_path / "store")
    with_old(layout)
    other = manifest_of(NEW, repo="org/other")

    async def go() -> None:
        shelf = shelf_of(entry(A, 1))
        kaito = kaito_of(layout, shelf)
        await kaito.settle()
        gate = asyncio.get_running_loop().create_future()
        shelf.put(entry(other, 1))
        real, kaito._change = kaito._change, lambda *args, **named: waiting(real, *args, **named)  # type: ignore[method-assign]

        async def waiting(call: Callable[..., object], *args: object, **named: object) -> object:
            await gate
            return await call(*args, **named)  # type: ignore[misc]

        showing = asyncio.create_task(kaito.settle())
        await asyncio.sleep(0)
        degrade(shelf)
        hiding = asyncio.create_task(kaito.settle())
        async with asyncio.timeout(10):
            while (where(layout) / NAME).is_symlink():
                await asyncio.sleep(0.01)
        assert not showing.done()
        assert (layout.kaito / NAME).exists()
        gate.set_result(None)
        await asyncio.gather(showing, hiding)
        assert not (layout.kaito / NAME).exists()
        assert [child.name for child in where(layout).iterdir()] == ["org-other"]

    asyncio.run(go())


REFS = ["org/x", "org/y", "file:///x"]
ENTRIES = st.lists(
    st.tuples(st.sampled_from(REFS), st.sampled_from("abcd"), st.sampled_from([(), ("main",), ("v1",), ("main", "v1")]), st.integers(0, 9)),
    max_size=6,
    unique_by=(lambda found: found[:2], lambda found: found[3]),
)


@given(ENTRIES)
def test_standing_is_find_for_every_name_at_once(found: list[tuple[str, str, tuple[str, ...], int]]) -> None:
    shelf = Shelf()
    for ref, digit, names, moment in found:
        is_file = ref.startswith("file")
        manifest = Manifest(parse_ref(ref).at(digit * (64 if is_file else 40)), asked=ref, endpoint="", files=(), verified_at="", version="0")
        shelf.put(Entry(manifest, EntryState(names=names, resolved_at=moment, alias="org/z" if is_file else None)))
    standing = {name: entry.id for name, entry in shelf.standing().items()}
    names = {entry.hub_id for entry in shelf.entries.values() if entry.hub_id}
    assert standing == {name: shelf.find(Ref(Scheme.HF, name)) for name in names}
