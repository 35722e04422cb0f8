"""Opening a store: first start, recognition, refusals, the lock, the sweep."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nvcache.core.ref import EntryId, parse_ref
from nvcache.errors import Code, ConfigError, DiskError, IntegrityError, RequestError
from nvcache.store.catalog import Catalog, EntryState
from nvcache.store.ingest import Ingest, ingest_key
from nvcache.store.layout import Layout
from nvcache.store.root import Root
from tests.unit.store.helpers import CHUNK, add_blob, fill, new_store, noise, plan_of, sha256, tree

DATA = noise(3 * CHUNK)


def modes(layout: Layout) -> dict[str, int]:
    return {str(path.relative_to(layout.root)): stat.S_IMODE(path.stat().st_mode) for path in layout.root.rglob("*") if path.is_dir()}


def test_an_empty_directory_becomes_a_store_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        layout = new_store(tmp_path / "deep" / "store")
    finally:
        os.umask(old)
    found = modes(layout)
    private = {"ingest", "ingest/plans", "ingest/receipts", "state", "timelines", "quarantine", "leases", "tmp"}
    assert {name for name, mode in found.items() if mode == 0o700} == private
    assert all(mode == 0o755 for name, mode in found.items() if name not in private)
    assert len([name for name in found if name.startswith("blobs/sha256/")]) == 256
    assert stat.S_IMODE(layout.root.stat().st_mode) == 0o755
    assert json.loads(layout.format_file.read_bytes())["format"] == 1
    assert os.listdir(layout.tmp) == []


def test_a_store_keeps_its_id_and_its_content(tmp_path: Path) -> None:
    first = Root.open(tmp_path / "store")
    digest = add_blob(first.layout, DATA)
    first.close()
    first.close()
    again = Root.open(tmp_path / "store")
    again.sweep()
    assert again.store_id == first.store_id
    assert len(again.store_id) == 32
    assert again.layout.blob(digest).read_bytes() == DATA
    again.close()


def test_a_store_made_at_format_time_is_empty_as_long_as_its_folders_are(tmp_path: Path) -> None:
    """Whoever formats the stripe makes the folders that pods mount, and no more."""
    for folder in ("models", "hub"):
        (tmp_path / "store" / folder).mkdir(parents=True)
    root = Root.open(tmp_path / "store", make=False)
    assert root.layout.format_file.exists()
    root.close()


@pytest.mark.parametrize("foreign", ["models/somebody/else", "hub/models--a--b", "models"])
def test_folders_of_that_name_with_something_in_them_are_foreign(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "store" / foreign
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ConfigError) as error:
        Root.open(tmp_path / "store")
    assert error.value.code is Code.STORE_FOREIGN
    assert [str(found.relative_to(tmp_path / "store")) for found in (tmp_path / "store").rglob("*") if found.is_file()] == [foreign]


def test_a_store_that_is_missing_is_made_only_where_it_may(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as error:
        Root.open(tmp_path / "mnt" / "store", make=False)
    assert error.value.code is Code.NO_STRIPE
    assert not any(tmp_path.iterdir())


def test_a_store_behind_a_symlink_and_a_fresh_file_system_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "store").symlink_to("disk")
    new_store(tmp_path / "store")
    assert (tmp_path / "disk" / "format.json").exists()


@pytest.mark.parametrize("name", ["README", ".bashrc", "blobs"])
def test_a_directory_that_holds_something_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot use .* as a store: it holds") as caught:
        Root.open(tmp_path)
    assert caught.value.code is Code.STORE_FOREIGN
    assert tree(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("content", [b'{"format": 2, "store_id": "x"}', b'{"format": 1}', b"[1]", b"", b'{"format"', b"\xff\xfe"])
def test_an_unknown_format_is_refused_untouched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "format.json").write_bytes(content)
    with pytest.raises(ConfigError, match="format") as caught:
        Root.open(tmp_path)
    assert caught.value.code is Code.STORE_FORMAT
    assert tree(tmp_path) == {"format.json": content}


def test_a_second_daemon_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    root = Root.open(tmp_path / "store")
    script = f"import sys; from pathlib import Path; from nvcache.store.root import Root; Root.open(Path({str(tmp_path / 'store')!r}))"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"the process {os.getpid()} uses it" in other.stderr
    with pytest.raises(ConfigError) as caught:
        Root.open(tmp_path / "store")
    assert caught.value.code is Code.STORE_LOCKED
    root.close()
    Root.open(tmp_path / "store").close()


@pytest.mark.parametrize("path", ["file", "file/deeper"])
def test_a_file_in_its_place_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not a directory") as caught:
        Root.open(tmp_path / path)
    assert caught.value.code is Code.STORE_FOREIGN
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("path", ["/proc/nvcache-test", "/proc/nvcache-test/deeper"])
def test_a_place_where_no_directory_can_be_made_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="the directory cannot be made there") as caught:
        Root.open(Path(path))
    assert caught.value.code in (Code.STORE_UNFIT, Code.STORE_READONLY)
    assert "--store" in caught.value.hint


@pytest.mark.parametrize(("call", "says"), [("link", "cannot make a hard link in"), ("fsync", "cannot sync a file in")])
def test_a_file_system_that_lacks_something_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, says: str) -> None:
    new_store(tmp_path / "store")

    def lacking(*_: object, **__: object) -> None:
        if "probe" in str(os.listdir(tmp_path / "store" / "tmp")):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, call, lacking)
    with pytest.raises(ConfigError, match=says) as caught:
        Root.open(tmp_path / "store")
    assert caught.value.code is Code.STORE_UNFIT
    assert os.listdir(tmp_path / "store" / "tmp") == []


def test_direct_io_is_probed_and_the_probe_leaves_nothing(tmp_path: Path) -> None:
    root = Root.open(tmp_path / "store")
    assert isinstance(root.direct_io, bool)
    assert os.listdir(root.layout.tmp) == []
    root.close()


def test_everybody_may_read_who_has_the_store_and_what_was_used_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        layout = new_store(tmp_path / "store")
        Catalog(layout).touch(plan_of({}).id, 1e9)
        Catalog(layout).touch(plan_of({}).id, 2e9)
    finally:
        os.umask(old)
    used = layout.use_file(plan_of({}).id)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (layout.lock, layout.format_file, used)] == [0o644] * 3
    assert used.stat().st_mtime == 2e9


def test_the_sweep_forgets_entries_that_have_neither_manifest_nor_plan(tmp_path: Path) -> None:
    root = Root.open(tmp_path / "store")
    layout, catalog = root.layout, Catalog(root.layout)
    ready, filling, gone = (plan_of({}, commit=letter * 40).id for letter in "abc")
    layout.manifest(ready).write_text("cannot be read just now")
    catalog.write_plan(plan_of({}, commit="b" * 40))
    for entry in (ready, filling, gone):
        catalog.write_state(entry, EntryState(pin=True))
        catalog.touch(entry, 1e9)
    root.sweep()
    assert sorted(os.listdir(layout.state)) == [f"{ready}.json", f"{filling}.json"]
    assert sorted(os.listdir(layout.use)) == [str(ready), str(filling)]
    root.close()


def test_the_sweep_empties_tmp_and_drops_ingests_without_a_plan(tmp_path: Path) -> None:
    root = Root.open(tmp_path / "store")
    layout = root.layout
    plan = plan_of({"model.safetensors": DATA})
    Catalog(layout).write_plan(plan)
    kept, dropped = ingest_key(sha256(DATA), len(DATA)), ingest_key("another", len(DATA))
    for key in (kept, dropped):
        ingest = Ingest.open(layout, key, len(DATA), chunk_size=CHUNK)
        fill(ingest, DATA, [1])
        ingest.close()
    (layout.ingest / "stray").write_text("x")
    (layout.tmp / "view-1" / "sub").mkdir(parents=True)
    (layout.tmp / "view-1" / "sub" / "file").write_text("x")
    (layout.tmp / "link").symlink_to(tmp_path)
    (layout.quarantine / "keep").write_text("evidence")
    for _ in range(2):
        root.sweep()
        assert sorted(os.listdir(layout.ingest)) == sorted([kept, "plans", "receipts"])
        assert os.listdir(layout.tmp) == []
        assert os.listdir(layout.quarantine) == ["keep"]
        assert tmp_path.exists()
    ingest = Ingest.open(layout, kept, len(DATA), chunk_size=CHUNK)
    assert ingest.recorded().keys() == {1}
    ingest.close()
    root.close()


@pytest.mark.parametrize("left", [["data", "journal"], ["data"], []], ids=str)
def test_the_sweep_drops_an_ingest_that_became_a_blob(tmp_path: Path, left: list[str]) -> None:
    root = Root.open(tmp_path / "store")
    layout = root.layout
    Catalog(layout).write_plan(plan_of({"model.safetensors": DATA}))
    key = ingest_key(sha256(DATA), len(DATA))
    Ingest.open(layout, key, len(DATA), chunk_size=CHUNK).close()
    os.link(layout.ingest_dir(key) / "data", layout.blob(sha256(DATA)))
    for name in set(os.listdir(layout.ingest_dir(key))).difference(left):  # its removal was cut short
        (layout.ingest_dir(key) / name).unlink()
    root.sweep()
    assert layout.blob(sha256(DATA)).stat().st_nlink == 1
    assert not layout.ingest_dir(key).exists()
    root.close()


def test_paths_are_where_the_format_says() -> None:
    layout = Layout(Path("/s"))
    entry = EntryId("hf--org--m", "c" * 40)
    digest = "ab" * 32
    assert layout.blob(digest) == Path(f"/s/blobs/sha256/ab/{digest}")
    assert layout.view(entry) == Path(f"/s/models/hf--org--m/{'c' * 40}")
    assert layout.manifest(entry) == Path(f"/s/manifests/hf--org--m@{'c' * 40}.json")
    assert layout.plan(entry) == Path(f"/s/ingest/plans/hf--org--m@{'c' * 40}.json")
    assert layout.state_file(entry) == Path(f"/s/state/hf--org--m@{'c' * 40}.json")
    assert layout.use_file(entry) == Path(f"/s/use/hf--org--m@{'c' * 40}")
    assert layout.hub_repo("org/m") == Path("/s/hub/models--org--m")
    assert layout.hub_repo("gpt2") == Path("/s/hub/models--gpt2")


def test_the_longest_entry_is_a_file_name() -> None:
    entry = EntryId(parse_ref("file:///" + "x" * 250 + "/" + "y" * 250).slug, "f" * 64)
    assert len(Layout(Path("/s")).manifest(entry).name.encode()) <= 255


@pytest.mark.parametrize("digest", ["", "ab", "../../../etc/passwd", "AB" * 32, "g" * 64, "a" * 65])
def test_no_path_is_made_of_what_is_no_digest(digest: str) -> None:
    with pytest.raises(IntegrityError):
        Layout(Path("/s")).blob(digest)


@pytest.mark.parametrize("hub_id", ["", "../x", "a/b/c", "a--b", "/abs", "a/..", "a b"])
def test_no_path_is_made_of_what_is_no_hub_name(hub_id: str) -> None:
    with pytest.raises(RequestError):
        Layout(Path("/s")).hub_repo(hub_id)
