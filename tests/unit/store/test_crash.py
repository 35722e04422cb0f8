"""Killed at every step: a child runs an operation and kills itself before its k-th system call of note, for every k; then the store is looked at.

Steps are the calls that change something on the disk, as Python's audit hooks report them, and every write; a write that is the last step is done by
half. Syncing is no step: a killed process loses nothing that the kernel has.
"""

from __future__ import annotations

import bisect
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from nvcache.core.manifest import Manifest
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import Catalog
from nvcache.store.files import aligned_buffer, durable_write, round_up
from nvcache.store.ingest import Ingest, ingest_key
from nvcache.store.layout import Layout
from nvcache.store.root import Root
from nvcache.store.views import Views
from tests.unit.store.helpers import CHUNK, COMMIT, add_blob, fill, make_ready, manifest_of, noise, plan_of, sha256, tree

DATA = noise(3 * CHUNK + 17)
DIGEST, KEY = sha256(DATA), ingest_key(sha256(DATA), len(DATA))
CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.utime", "os.symlink"}
FEW = {"config.json": b"{}", "sub/a.txt": b"a"}
FILES = {**FEW, "model.safetensors.index.json": b'{"weight_map": {}}', "sub/b.safetensors": noise(5000), "new/c.txt": b"c"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing only takes time here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


def survives(operation: Callable[[], None], kill_at: int) -> bool:
    """Run `operation` in a child that dies before step `kill_at` (from 1); True when it came to its end first."""
    child = os.fork()
    if child == 0:
        try:
            _arm(kill_at)
            operation()
        except BaseException:  # noqa: BLE001 - a child of a fork must not run on into the parent's tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def _arm(kill_at: int) -> None:
    steps = 0

    def step() -> bool:
        nonlocal steps
        steps += 1
        return steps == kill_at

    def hook(event: str, args: Any) -> None:
        changes = event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull)
        if changes and step():
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(name: str) -> None:
        real = getattr(os, name)

        def call(fd: int, data: Any, *args: Any) -> Any:
            if step():
                real(fd, memoryview(data)[: len(data) // 2], *args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(fd, data, *args)

        setattr(os, name, call)

    for name in ("write", "pwrite"):
        dying(name)
    sys.addaudithook(hook)


def every_step(folder: Path, prepare: Callable[[Layout], None], operation: Callable[[Layout], None]) -> Iterator[Layout]:
    """A store as `operation` left it after 0, 1, 2 … of its steps; the last one is of the whole operation."""
    for kill_at in range(1, 1000):
        layout = new_store_fast(folder / str(kill_at))
        prepare(layout)
        done = survives(lambda layout=layout: operation(layout), kill_at)  # type: ignore[misc]
        yield layout
        if done:
            assert kill_at > 3
            return
        shutil.rmtree(layout.root)
    raise AssertionError("the operation does not end")


def new_store_fast(path: Path) -> Layout:
    """A store in which only the blob folders that are used exist: making all 256 a hundred times takes too long."""
    layout = Layout(path)
    for folder in (layout.plans, layout.receipts, layout.manifests, layout.models, layout.hub, layout.state, layout.use, layout.leases):
        folder.mkdir(parents=True)
    layout.quarantine.mkdir()
    layout.tmp.mkdir()
    for data in (DATA, *FILES.values()):
        layout.blob(sha256(data)).parent.mkdir(parents=True, exist_ok=True)
    return layout


def add_blobs(layout: Layout, *contents: bytes) -> None:
    for data in contents or FILES.values():
        add_blob(layout, data)


def sweep(layout: Layout) -> None:
    Root(layout, "test", -1, True).sweep()


def the_views_are_true(layout: Layout, *versions: Manifest) -> None:
    """What a pod may rely on at any instant: each thing it can see is whole, and all that it leads to is there."""
    contents = {sha256(data): data for data in FILES.values()}
    wholes = [{file.path: contents[file.sha256] for file in manifest.files} for manifest in versions]
    flat = layout.view(versions[0].id)
    if flat.exists():
        assert any(tree(flat).items() >= whole.items() for whole in wholes)
    repo = layout.hub_repo("org/model")
    snapshot, listing, ref = repo / "snapshots" / COMMIT, repo / "trees" / f"{COMMIT}.json", repo / "refs" / "main"
    if ref.exists():
        assert ref.read_bytes() == COMMIT.encode()
        assert listing.exists()
    if listing.exists():
        listed = json.loads(listing.read_bytes())["files"].keys()
        assert any(listed == whole.keys() for whole in wholes)
        assert snapshot.exists()
        assert listed <= tree(snapshot).keys()
    if snapshot.exists():
        assert any(tree(snapshot).items() >= whole.items() for whole in wholes)
    for manifest in Catalog(layout).manifests().values():
        assert Views(layout, Blobs(layout)).complete(manifest, "org/model")
        assert ref.exists() or manifest.id != versions[0].id


def test_a_durable_write_is_old_or_new(tmp_path: Path) -> None:
    seen = set()
    for layout in every_step(
        tmp_path,
        lambda layout: durable_write(layout.root / "x", b"old" * 100),
        lambda layout: durable_write(layout.root / "x", b"new" * 500, temp=layout.tmp),
    ):
        seen.add((layout.root / "x").read_bytes())
        sweep(layout)
        assert not list(layout.tmp.iterdir())
    assert seen == {b"old" * 100, b"new" * 500}


def test_an_ingest_killed_anywhere_is_resumed_and_never_believed_wrongly(tmp_path: Path) -> None:
    def ingest(layout: Layout) -> None:
        blob = Ingest.open(layout, KEY, len(DATA), chunk_size=CHUNK)
        fill(blob, DATA, set(range(blob.count)) - blob.recorded().keys())
        blob.sync()
        blob.commit(DIGEST)

    kept = 0
    for layout in every_step(tmp_path, lambda layout: Catalog(layout).write_plan(plan_of({"model.safetensors": DATA})), ingest):
        blob = layout.blob(DIGEST)
        if blob.exists():
            assert blob.read_bytes() == DATA
        sweep(layout)
        again = Ingest.open(layout, KEY, len(DATA), chunk_size=CHUNK)
        for index, digest in again.recorded().items():
            read = again.read(index, memoryview(aligned_buffer(round_up(CHUNK))))
            assert xxhash.xxh3_64_intdigest(read) == digest
        kept = max(kept, len(again.recorded()))
        again.close()
        ingest(layout)
        assert blob.read_bytes() == DATA
        assert blob.stat().st_nlink == 1
        assert not layout.ingest_dir(KEY).exists()
    assert kept == 4


def test_a_publication_killed_anywhere_shows_nothing_half_and_is_taken_up(tmp_path: Path) -> None:
    manifest = manifest_of(FILES)

    def publish(layout: Layout) -> None:
        Views(layout, Blobs(layout)).publish(manifest, hub_id="org/model", names=["main", "v1"])
        Catalog(layout).write_manifest(manifest)

    for layout in every_step(tmp_path, add_blobs, publish):
        the_views_are_true(layout, manifest)
        sweep(layout)
        publish(layout)
        the_views_are_true(layout, manifest)
        assert Catalog(layout).manifests() == {manifest.id: manifest}
        assert {nlink for _, _, nlink in Blobs(layout).walk()} == {3}


def test_widening_killed_anywhere_never_shows_less(tmp_path: Path) -> None:
    narrow, wide = manifest_of(FEW), manifest_of(FILES)

    def prepare(layout: Layout) -> None:
        make_ready(layout, FEW)
        add_blobs(layout)

    def widen(layout: Layout) -> None:
        Views(layout, Blobs(layout)).publish(wide, hub_id="org/model", names=["main"])
        Catalog(layout).write_manifest(wide)

    for layout in every_step(tmp_path, prepare, widen):
        for view in (layout.view(narrow.id), layout.hub_repo("org/model") / "snapshots" / COMMIT):
            assert tree(view).items() >= FEW.items()
            assert tree(view).items() <= FILES.items()
            assert "model.safetensors.index.json" not in tree(view) or tree(view) == FILES  # an index comes after what it names
        listed = json.loads((layout.hub_repo("org/model") / "trees" / f"{COMMIT}.json").read_bytes())["files"].keys()
        assert listed in (FEW.keys(), FILES.keys())
        sweep(layout)
        widen(layout)
        the_views_are_true(layout, wide)


@pytest.mark.parametrize("other", [False, True], ids=["the only revision", "one of two"])
def test_a_removal_killed_anywhere_shows_nothing_half_and_is_taken_up(tmp_path: Path, other: bool) -> None:
    manifest = manifest_of(FILES)

    def prepare(layout: Layout) -> None:
        if other:
            make_ready(layout, FEW, commit="d" * 40)
        make_ready(layout, FILES)

    def remove(layout: Layout) -> None:
        blobs, catalog = Blobs(layout), Catalog(layout)
        Views(layout, blobs).withdraw(manifest, hub_id="org/model")
        catalog.remove_manifest(manifest.id)
        for sha256_ in manifest.blobs:
            blobs.remove_if_unreferenced(sha256_, grace=0)

    for layout in every_step(tmp_path, prepare, remove):
        if manifest.id not in Catalog(layout).manifests():
            the_views_are_true(layout, manifest)
            assert not layout.view(manifest.id).exists()
        if (layout.hub_repo("org/model") / "refs" / "main").exists():
            assert (layout.hub_repo("org/model") / "trees" / f"{COMMIT}.json").exists()
        sweep(layout)
        remove(layout)
        views = Views(layout, Blobs(layout))
        left = [(kept, "org/model") for kept in Catalog(layout).manifests().values()]
        assert len(left) == other
        assert all(views.complete(*kept) for kept in left)
        assert views.prune(left) == []
        assert {sha for sha, _, _ in Blobs(layout).walk()} == ({sha256(data) for data in FEW.values()} if other else set())


def test_a_quarantine_killed_anywhere_loses_nothing(tmp_path: Path) -> None:
    def quarantine(layout: Layout) -> None:
        Blobs(layout).quarantine(DIGEST, "bad")

    for layout in every_step(tmp_path, lambda layout: add_blobs(layout, DATA), quarantine):
        there, aside = layout.blob(DIGEST), layout.quarantine / DIGEST
        assert there.exists() != aside.exists()
        if aside.exists():
            assert aside.read_bytes() == DATA
        assert (there if there.exists() else aside).read_bytes() == DATA


def test_a_first_start_killed_anywhere_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def finishes(kill_at: int) -> bool:
        done = survives(lambda: Root.open(path).close(), kill_at)
        root = Root.open(path)
        root.sweep()
        root.close()
        assert not list(path.glob(".tmp-*"))
        assert len(list((path / "blobs" / "sha256").iterdir())) == 256
        shutil.rmtree(path)
        return done

    last = bisect.bisect_left(range(1000), True, key=finishes)
    assert last > 260
    for kill_at in (*range(1, 14), *range(last - 12, last)):  # between them it makes 256 folders, one like the other
        assert not finishes(kill_at)
