"""The store on real file systems: full ones, read-only ones, ones without direct I/O; and for a user who is not root."""

from __future__ import annotations

import fcntl
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvcache.errors import Code, ConfigError, NvcacheError, SpaceError
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import Catalog, EntryState
from nvcache.store.files import BLOCK, aligned_buffer
from nvcache.store.ingest import Ingest, ingest_key
from nvcache.store.root import Root
from nvcache.store.views import Views
from tests.support.disks import full, mounted
from tests.unit.store.helpers import CHUNK, add_blob, fill, make_ready, manifest_of, noise, plan_of, sha256, tree, write_chunk

FILES = {"config.json": b"{}", "model.safetensors": noise(5 * CHUNK + 3)}
BIG = noise(8 * CHUNK + 99, seed=5)
KEY = ingest_key(sha256(BIG), len(BIG))


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    with mounted("ext4", tmp_path) as point:
        yield point


@pytest.fixture
def root(ext4: Path) -> Iterator[Root]:
    root = Root.open(ext4)
    yield root
    root.close()


def whole_life(path: Path) -> None:
    """Everything a store does, once."""
    root = Root.open(path)
    layout = root.layout
    manifest = make_ready(layout, FILES)
    first = Ingest.open(layout, KEY, len(BIG), chunk_size=CHUNK, direct=root.direct_io)
    fill(first, BIG, [0, 2])
    first.close()
    (layout.ingest_dir(KEY) / "data").chmod(0o444)  # as a commit that was cut short leaves it
    again = Ingest.open(layout, KEY, len(BIG), chunk_size=CHUNK, direct=root.direct_io)
    assert again.recorded().keys() == {0, 2}
    fill(again, BIG, set(range(again.count)) - {0, 2})
    again.sync()
    again.commit(sha256(BIG))
    assert layout.blob(sha256(BIG)).read_bytes() == BIG
    root.close()
    root = Root.open(path)
    root.sweep()
    views, blobs = Views(layout, Blobs(layout)), Blobs(layout)
    assert Catalog(layout).manifests() == {manifest.id: manifest}
    assert views.complete(manifest, "org/model")
    assert tree(layout.view(manifest.id)) == FILES
    held = layout.view(manifest.id) / "config.json"
    with held.open("rb"):
        assert blobs.in_use(sha256(FILES["config.json"])) in (True, None)
    assert blobs.in_use(sha256(FILES["config.json"])) in (False, None)
    views.withdraw(manifest, hub_id="org/model")
    for digest in [digest for digest, _ in blobs.unreferenced(set(), grace=0)]:
        assert blobs.remove_if_unreferenced(digest, grace=0)
    assert blobs.used_bytes() == 0
    root.close()


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "overlay"])
def test_a_store_lives_on(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as point:
        whole_life(point / "store")


def test_a_store_needs_no_root(ext4: Path) -> None:
    (ext4 / "mine").mkdir()
    os.chown(ext4 / "mine", 65534, 65534)

    as_nobody(ext4 / "mine", lambda: whole_life(Path("store")))


def as_nobody(folder: Path, what: Callable[[], None]) -> None:
    """Run `what` as another user, in `folder`, which that user need not be able to walk to."""
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.umask(0o077)
            what()
        except BaseException:  # noqa: BLE001 - a child of a fork must not run on into the parent's tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_store_of_another_user_is_refused(ext4: Path) -> None:
    Root.open(ext4 / "store").close()

    def trespass() -> None:
        with pytest.raises(ConfigError) as caught:
            Root.open(Path("store"))
        assert caught.value.code is Code.STORE_READONLY

    as_nobody(ext4, trespass)


def test_a_read_only_store_is_refused(ext4: Path, tmp_path: Path) -> None:
    Root.open(ext4 / "store").close()
    subprocess.run(["mount", "-o", "remount,ro", str(ext4)], check=True)
    for path in (ext4 / "store", ext4 / "new"):
        with pytest.raises(ConfigError, match="read-only") as caught:
            Root.open(path)
        assert caught.value.code is Code.STORE_READONLY


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_what_does_not_fit_is_refused_with_numbers_and_takes_nothing(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as point:
        root = Root.open(point / "store")
        before = os.statvfs(point).f_bfree
        with pytest.raises(SpaceError, match=r"cannot reserve 134,217,728 bytes: the file system has [\d,]+ bytes free") as caught:
            Ingest.open(root.layout, "big-1", 128 * 2**20, direct=root.direct_io)
        assert caught.value.code is Code.DISK_FULL
        assert sorted(os.listdir(root.layout.ingest)) == ["plans", "receipts"]
        os.sync()
        assert os.statvfs(point).f_bfree >= before - 2
        root.close()


def test_a_full_disk_refuses_every_write_and_harms_nothing(root: Root, ext4: Path) -> None:
    layout, catalog = root.layout, Catalog(root.layout)
    manifest = make_ready(layout, FILES)
    catalog.write_state(manifest.id, EntryState(pin=True))
    state = EntryState(names=tuple(f"name-{number}" for number in range(2000)))
    with full(ext4):
        refused: list[Callable[[], object]] = [
            lambda: Ingest.open(layout, KEY, len(BIG), chunk_size=CHUNK),
            lambda: add_blob(layout, b"small" * 700),
            lambda: catalog.write_state(manifest.id, state),
            lambda: catalog.write_plan(plan_of({f"{number}": b"x" for number in range(100)})),
        ]
        for attempt in refused:
            with pytest.raises(SpaceError) as caught:
                attempt()
            assert caught.value.code is Code.DISK_FULL
        assert os.listdir(layout.tmp) == []
        assert catalog.state(manifest.id) == EntryState(pin=True)
        assert catalog.plans() == {}
        assert tree(layout.view(manifest.id)) == FILES
        assert Views(layout, Blobs(layout)).complete(manifest, "org/model")
        # a bad blob goes all the same, without its note
        assert Blobs(layout).quarantine(sha256(FILES["config.json"]), "x" * 9000).read_bytes() == FILES["config.json"]
        assert not Blobs(layout).has(sha256(FILES["config.json"]), len(FILES["config.json"]))
    add_blob(layout, b"small" * 700)
    catalog.write_state(manifest.id, state)
    assert catalog.state(manifest.id) == state


def test_a_disk_that_fills_up_while_the_journal_grows_costs_one_chunk(root: Root, ext4: Path) -> None:
    """The data has its space; the journal's next block has not."""
    data = noise(600 * BLOCK, seed=6)
    key = ingest_key(sha256(data), len(data))
    ingest = Ingest.open(root.layout, key, len(data), chunk_size=BLOCK)
    with full(ext4), pytest.raises(SpaceError):
        fill(ingest, data)
    done = len(ingest.recorded())
    assert 40 < done < 600  # a block of the file system has room for some 42 records
    ingest.close()
    ingest = Ingest.open(root.layout, key, len(data), chunk_size=BLOCK)
    assert len(ingest.recorded()) == done
    fill(ingest, data, set(range(600)) - ingest.recorded().keys())
    ingest.commit(sha256(data))
    assert root.layout.blob(sha256(data)).read_bytes() == data


def test_a_full_disk_does_not_keep_the_store_from_opening(ext4: Path) -> None:
    root = Root.open(ext4 / "store")
    manifest = make_ready(root.layout, FILES)
    root.close()
    with full(ext4):
        root = Root.open(ext4 / "store")
        root.sweep()
        assert Views(root.layout, Blobs(root.layout)).complete(manifest, "org/model")
        root.close()


def test_a_first_start_on_a_full_disk_fails_cleanly_and_goes_on_later(ext4: Path) -> None:
    with full(ext4), pytest.raises(NvcacheError) as caught:
        Root.open(ext4 / "store")
    assert caught.value.code is Code.DISK_FULL
    whole_life(ext4 / "store")


def test_direct_io_is_on_and_leaves_nothing_in_the_page_cache(root: Root) -> None:
    assert root.direct_io
    ingest = Ingest.open(root.layout, KEY, len(BIG), chunk_size=CHUNK)
    assert fcntl.fcntl(ingest._data, fcntl.F_GETFL) & os.O_DIRECT
    fill(ingest, BIG)
    with (root.layout.ingest_dir(KEY) / "data").open("rb") as file, pytest.raises(BlockingIOError):
        os.preadv(file.fileno(), [bytearray(BLOCK)], 0, os.RWF_NOWAIT)
    ingest.close()


def test_direct_io_refused_at_the_first_write_goes_on_through_the_page_cache(root: Root) -> None:
    ingest = Ingest.open(root.layout, KEY, len(BIG), chunk_size=CHUNK)
    crooked = memoryview(aligned_buffer(2 * CHUNK))[1 : CHUNK + 1]  # not on a page: the kernel says EINVAL
    crooked[:] = BIG[:CHUNK]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: ingest.write(0, crooked, CHUNK, 1), range(4)))
    assert not fcntl.fcntl(ingest._data, fcntl.F_GETFL) & os.O_DIRECT
    for index in range(ingest.count):
        write_chunk(ingest, BIG, index)
    ingest.commit(sha256(BIG))
    assert root.layout.blob(sha256(BIG)).read_bytes() == BIG


def test_a_blob_with_all_the_links_the_disk_allows_is_copied(root: Root, ext4: Path) -> None:
    digest = add_blob(root.layout, b"popular")
    (ext4 / "links").mkdir()
    blob = root.layout.blob(digest)
    made = 0
    try:
        while True:
            os.link(blob, ext4 / "links" / str(made))
            made += 1
    except OSError:
        assert made > 60_000
    manifest = manifest_of({"a.txt": b"popular"})
    views = Views(root.layout, Blobs(root.layout))
    views.publish(manifest, hub_id="org/model", names=["main"])
    assert views.complete(manifest, "org/model")
    shown = root.layout.view(manifest.id) / "a.txt"
    assert shown.read_bytes() == b"popular"
    assert shown.stat().st_nlink == 1
