"""The views: what they show, widening, withdrawal, planted symlinks, and the real huggingface_hub on them."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nvcache.core.digest import git_blob_header
from nvcache.errors import Code, DiskError, IntegrityError, RequestError
from nvcache.store.blobs import Blobs
from nvcache.store.layout import Layout
from nvcache.store.views import Views, tree_listing
from tests.unit.store.helpers import COMMIT, add_blob, make_ready, manifest_of, new_store, noise, sha256, tree

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": noise(100_000, 1),
    "model-00002-of-00002.safetensors": noise(70_000, 2),
    "deep/er/notes.txt": b"hello",
    "empty.txt": b"",
}
OTHER = "d" * 40


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_store(tmp_path / "store")


@pytest.fixture
def views(layout: Layout) -> Views:
    return Views(layout, Blobs(layout))


def snapshot(layout: Layout, commit: str = COMMIT) -> Path:
    return layout.hub / "models--org--model" / "snapshots" / commit


def test_both_views_show_every_file_as_the_blob_itself(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    for view in (layout.view(manifest.id), snapshot(layout)):
        assert tree(view) == FILES
        for file in manifest.files:
            assert (view / file.path).samefile(layout.blob(file.sha256))
            assert not (view / file.path).is_symlink()
        assert stat.S_IMODE((view / "deep").stat().st_mode) == 0o755
        assert stat.S_IMODE((view / "config.json").stat().st_mode) == 0o444
    repo = layout.hub_repo("org/model")
    assert (repo / "refs" / "main").read_bytes() == COMMIT.encode()
    assert stat.S_IMODE((repo / "refs" / "main").stat().st_mode) == 0o644
    assert views.names("org/model") == {"main": COMMIT}
    assert views.complete(manifest, "org/model")
    assert os.listdir(layout.tmp) == []
    assert sum(size for _, size, _ in Blobs(layout).walk()) == sum(map(len, FILES.values()))
    assert {nlink for _, _, nlink in Blobs(layout).walk()} == {3}


def test_modes_do_not_depend_on_the_umask(layout: Layout) -> None:
    old = os.umask(0o077)
    try:
        manifest = make_ready(layout, FILES)
    finally:
        os.umask(old)
    for folder in (layout.view(manifest.id).parent, layout.hub_repo("org/model"), snapshot(layout).parent, snapshot(layout) / "deep" / "er"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((layout.hub_repo("org/model") / "trees" / f"{COMMIT}.json").stat().st_mode) == 0o644


def test_publishing_again_changes_nothing(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    before = {path: path.stat().st_ino for path in layout.hub.rglob("*")}
    views.publish(manifest, hub_id="org/model", names=["main"])
    assert {path: path.stat().st_ino for path in layout.hub.rglob("*")} == before


def test_no_hub_name_no_hub_view(layout: Layout, views: Views) -> None:
    manifest = manifest_of(FILES)
    for data in FILES.values():
        add_blob(layout, data)
    views.publish(manifest, hub_id=None, names=["main"])
    assert views.complete(manifest, None)
    assert not views.complete(manifest, "org/model")
    assert os.listdir(layout.hub) == []
    views.withdraw(manifest, hub_id=None)
    assert os.listdir(layout.models) == []


def test_a_wider_entry_gets_links_added_and_the_listing_replaced(layout: Layout, views: Views) -> None:
    few = {"config.json": FILES["config.json"]}
    narrow = make_ready(layout, few)
    folder = layout.view(narrow.id).stat().st_ino
    for data in FILES.values():
        add_blob(layout, data)
    wide = manifest_of(FILES)
    assert not views.complete(wide, "org/model")
    views.publish(wide, hub_id="org/model", names=["main"])
    assert views.complete(wide, "org/model")
    assert not views.complete(narrow, "org/model")
    assert layout.view(wide.id).stat().st_ino == folder  # a pod that mounts just this directory sees the new files too
    assert tree(snapshot(layout)) == FILES


def test_a_replaced_blob_is_relinked(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    file = manifest.files[0]
    Blobs(layout).quarantine(file.sha256, "test")
    add_blob(layout, FILES[file.path])
    views.publish(manifest, hub_id="org/model", names=[])
    for view in (layout.view(manifest.id), snapshot(layout)):
        assert (view / file.path).samefile(layout.blob(file.sha256))
    assert (layout.quarantine / file.sha256).stat().st_nlink == 1


def test_the_listing_is_what_the_hub_says_of_the_files(layout: Layout) -> None:
    manifest = manifest_of(FILES)
    listing = json.loads(tree_listing(manifest))
    assert listing["format_version"] == 1
    assert listing["files"].keys() == FILES.keys()
    assert listing["files"]["config.json"] == {"size": 8, "blob_id": manifest.by_path["config.json"].source.hex}  # type: ignore[union-attr]
    shard = manifest.by_path["model-00001-of-00002.safetensors"]
    entry = listing["files"][shard.path]
    assert (entry["size"], entry["lfs_sha256"], entry["lfs_size"]) == (100_000, shard.sha256, 100_000)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{shard.sha256}\nsize 100000\n".encode()
    git = subprocess.run(["git", "hash-object", "--stdin"], input=pointer, capture_output=True, check=True)
    assert entry["blob_id"] == git.stdout.decode().strip()
    assert git_blob_header(3) == b"blob 3\0"


def test_a_listing_digest_is_shortened_to_a_commit(layout: Layout, views: Views) -> None:
    manifest = manifest_of(FILES, commit="e" * 64)
    assert views.hub_commit(manifest) == "e" * 40
    for data in FILES.values():
        add_blob(layout, data)
    views.publish(manifest, hub_id="org/model", names=["current"])
    assert views.names("org/model") == {"current": "e" * 40}
    assert views.complete(manifest, "org/model")


def test_refs_nest_move_and_change_shape(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    views.publish(manifest, hub_id="org/model", names=["refs/pr/1", "a", "v1.0"])
    views.publish(manifest, hub_id="org/model", names=["a/b"])
    assert views.names("org/model") == {"main": COMMIT, "refs/pr/1": COMMIT, "a/b": COMMIT, "v1.0": COMMIT}
    views.publish(manifest, hub_id="org/model", names=["a"])
    later = make_ready(layout, FILES, commit=OTHER)
    assert views.names("org/model") == {"main": OTHER, "refs/pr/1": COMMIT, "a": COMMIT, "v1.0": COMMIT}
    views.withdraw(manifest, hub_id="org/model")
    assert views.names("org/model") == {"main": OTHER}
    assert views.complete(later, "org/model")
    assert not snapshot(layout).exists()
    (layout.hub_repo("org/model") / "refs" / "torn").write_text("123")
    assert views.names("org/model") == {"main": OTHER}


def test_withdrawal_leaves_nothing_and_may_be_repeated(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    for _ in range(2):
        views.withdraw(manifest, hub_id="org/model")
        assert (os.listdir(layout.models), os.listdir(layout.hub), os.listdir(layout.tmp)) == ([], [], [])
    assert {nlink for _, _, nlink in Blobs(layout).walk()} == {1}
    assert not views.complete(manifest, "org/model")
    views.publish(manifest, hub_id="org/model", names=["main"])
    assert views.complete(manifest, "org/model")


def test_two_entries_share_their_blobs_and_one_goes(layout: Layout, views: Views) -> None:
    first = make_ready(layout, FILES)
    second = make_ready(layout, FILES, hub_id="org/fork", commit=OTHER)
    assert {nlink for _, _, nlink in Blobs(layout).walk()} == {5}
    views.withdraw(first, hub_id="org/model")
    assert views.complete(second, "org/fork")
    assert list(Blobs(layout).unreferenced(set(), grace=0)) == []


@pytest.mark.parametrize(
    "hurt", ["file gone", "file short", "file another", "file a symlink", "blob replaced", "folder gone", "folder a symlink", "listing", "snapshot"]
)
def test_what_is_missing_is_seen_and_mended(layout: Layout, views: Views, tmp_path: Path, hurt: str) -> None:
    manifest = make_ready(layout, FILES)
    view = layout.view(manifest.id)
    match hurt:
        case "file gone":
            (view / "config.json").unlink()
        case "file short":
            (view / "config.json").unlink()
            (view / "config.json").write_text("{}")
        case "file another":
            (view / "config.json").unlink()
            (view / "config.json").write_text('{"a": 2}')
        case "blob replaced":  # as by a repair: the view still shows the old bytes
            blob = layout.blob(manifest.by_path["config.json"].sha256)
            blob.rename(tmp_path / "old")
            blob.write_bytes(FILES["config.json"])
        case "file a symlink":
            (view / "config.json").unlink()
            (view / "config.json").symlink_to(layout.blob(manifest.by_path["config.json"].sha256))
        case "folder gone":
            (view / "deep" / "er" / "notes.txt").unlink()
            (view / "deep" / "er").rmdir()
        case "folder a symlink":
            (view / "deep").rename(tmp_path / "deep")
            (view / "deep").symlink_to(tmp_path / "deep")
        case "listing":
            (layout.hub_repo("org/model") / "trees" / f"{COMMIT}.json").write_text("{}")
        case "snapshot":
            snapshot(layout).rename(tmp_path / "snapshot")
    assert not views.complete(manifest, "org/model")
    views.publish(manifest, hub_id="org/model", names=["main"])
    assert views.complete(manifest, "org/model")
    assert tree(view) == tree(snapshot(layout)) == FILES


def test_a_view_of_copies_is_complete_where_the_blobs_can_have_no_more_links(layout: Layout, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    for data in FILES.values():
        add_blob(layout, data)
    manifest = manifest_of(FILES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        views.publish(manifest, hub_id="org/model", names=["main"])
    for data in FILES.values():
        add_blob(layout, data)  # fetched again for another model, and found
    assert tree(layout.view(manifest.id)) == FILES
    assert views.complete(manifest, "org/model")
    shown = layout.view(manifest.id) / "config.json"
    shown.unlink()
    shown.write_text('{"a": 2}')
    assert not views.complete(manifest, "org/model")


@pytest.mark.parametrize("place", ["deep", "deep/er", "config.json", "."])
def test_a_planted_symlink_is_replaced_and_what_it_points_to_untouched(layout: Layout, views: Views, tmp_path: Path, place: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "notes.txt").write_text("mine")
    manifest = make_ready(layout, {"config.json": FILES["config.json"]})
    for data in FILES.values():
        add_blob(layout, data)
    planted = layout.view(manifest.id) / place
    if place == ".":
        views.withdraw(manifest, hub_id=None)
        planted = layout.view(manifest.id)
    planted.unlink(missing_ok=True)
    planted.parent.mkdir(exist_ok=True, parents=True)
    planted.symlink_to(victim)
    wide = manifest_of(FILES)
    views.publish(wide, hub_id="org/model", names=["main"])
    assert tree(victim) == {"notes.txt": b"mine"}
    assert views.complete(wide, "org/model")
    assert not planted.is_symlink()


def test_planted_symlinks_in_the_hub_tree_are_not_followed(layout: Layout, views: Views, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "main").write_text("mine")
    repo = layout.hub_repo("org/model")
    repo.mkdir()
    (repo / "refs").symlink_to(tmp_path / "victim")
    (repo / "snapshots").symlink_to(tmp_path / "victim")
    make_ready(layout, FILES)
    assert tree(tmp_path / "victim") == {"main": b"mine"}
    assert views.names("org/model") == {"main": COMMIT}


@pytest.mark.parametrize("place", ["models/hf--org--model", "hub/models--org--model", "refs", "trees", "snapshots"])
@pytest.mark.parametrize("how", ["withdraw", "prune"])
def test_removal_does_not_follow_planted_symlinks(layout: Layout, views: Views, tmp_path: Path, place: str, how: str) -> None:
    manifest = make_ready(layout, FILES)
    other = make_ready(layout, FILES, commit=OTHER)
    planted = layout.root / place if "/" in place else layout.hub_repo("org/model") / place
    victim = tmp_path / "victim"
    planted.rename(victim)
    planted.symlink_to(victim)
    before = tree(victim)
    if how == "withdraw":
        views.withdraw(manifest, hub_id="org/model")
    else:
        views.prune([(other, "org/model")])
    assert tree(victim) == before


@pytest.mark.parametrize("name", ["../escape", "/abs", "a//b", "..", ""])
def test_hostile_ref_names_are_refused_before_anything_is_shown(layout: Layout, views: Views, name: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        views.publish(manifest_of(FILES), hub_id="org/model", names=[name])
    assert caught.value.code is Code.HOSTILE_NAME
    assert os.listdir(layout.models) == []


def test_a_missing_blob_or_a_bad_hub_name_shows_nothing(layout: Layout, views: Views) -> None:
    add_blob(layout, FILES["config.json"])
    with pytest.raises(IntegrityError, match="not in the store"):
        views.publish(manifest_of(FILES), hub_id="org/model", names=["main"])
    assert os.listdir(layout.tmp) == []
    assert [nlink for _, _, nlink in Blobs(layout).walk()] == [1]
    with pytest.raises(RequestError):
        views.publish(manifest_of(FILES), hub_id="../x", names=["main"])
    assert tree(layout.models) == tree(layout.hub) == {}


def test_blob_folders_are_synced_before_anything_is_shown(layout: Layout, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    for data in FILES.values():
        add_blob(layout, data)
    real = os.fsync

    def fsync(fd: int) -> None:
        if not layout.view(manifest_of(FILES).id).exists():
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    views.publish(manifest_of(FILES), hub_id=None)
    assert {str(layout.blob(sha256(data)).parent) for data in FILES.values()} <= set(synced)


def test_a_disk_that_fails_at_the_first_step_leaves_nothing_half_made(layout: Layout, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is there and cannot be given its mode."""
    for data in FILES.values():
        add_blob(layout, data)
    real = os.fchmod

    def fchmod(fd: int, mode: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{layout.tmp}/"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)
    with pytest.raises(DiskError):
        views.publish(manifest_of(FILES), hub_id=None)
    assert list(layout.tmp.iterdir()) == []


def test_pruning_removes_what_no_entry_has(layout: Layout, views: Views) -> None:
    kept = make_ready(layout, FILES)
    make_ready(layout, FILES, commit=OTHER)
    make_ready(layout, FILES, hub_id="org/gone", commit=OTHER)
    repo = layout.hub_repo("org/model")
    (repo / "refs" / "stale").write_text("a" * 40)
    (repo / "trees" / f"{'b' * 40}.json").write_text("{}")
    views.publish(kept, hub_id="org/model", names=["main"])
    removed = views.prune([(kept, "org/model")])
    assert set(removed) == {
        f"hf--org--model@{OTHER}",
        f"hf--org--gone@{OTHER}",
        "models--org--gone",
        f"models--org--model@{OTHER}",
        f"models--org--model@{'a' * 40}",
        f"models--org--model@{'b' * 40}",
    }
    assert views.complete(kept, "org/model")
    assert views.names("org/model") == {"main": COMMIT}
    assert os.listdir(layout.models) == ["hf--org--model"]
    assert os.listdir(layout.hub) == ["models--org--model"]
    assert views.prune([(kept, "org/model")]) == []
    views.prune([])
    assert (os.listdir(layout.models), os.listdir(layout.hub)) == ([], [])


def test_kaito_is_shown_one_entry_of_a_name_and_exactly_that(layout: Layout, views: Views) -> None:
    first = make_ready(layout, FILES, hub_id="Org/Model")
    second = make_ready(layout, {"config.json": FILES["config.json"]}, hub_id="Org/Model", commit=OTHER)
    views.publish_kaito(first, hub_id="Org/Model")
    view = layout.kaito / "org-model"
    assert tree(view) == FILES
    assert (view / "config.json").samefile(layout.blob(first.by_path["config.json"].sha256))
    assert (views.kaito_shows(first, "Org/Model"), views.kaito_shows(second, "Org/Model")) == (True, False), "the second has fewer files"
    assert views.complete(first, "Org/Model", "Org/Model")
    (view / "empty.txt").unlink()
    assert not views.complete(first, "Org/Model", "Org/Model")
    assert not views.kaito_shows(first, "Org/Model")
    views.publish_kaito(first, hub_id="Org/Model")
    assert views.kaito_shows(first, "Org/Model")
    for _ in range(2):
        views.withdraw_kaito(hub_id="Org/Model")
        assert (os.listdir(layout.kaito), os.listdir(layout.tmp)) == ([], [])
    views.publish_kaito(second, hub_id="Org/Model")
    assert tree(view) == {"config.json": FILES["config.json"]}
    assert views.prune([(first, "Org/Model"), (second, "Org/Model")], kaito={"org-model"}) == []
    assert views.prune([(first, "Org/Model"), (second, "Org/Model")]) == ["kaito/org-model"]
    assert os.listdir(layout.kaito) == []
    with pytest.raises(RequestError):
        views.publish_kaito(first, hub_id="../escape")


@pytest.mark.parametrize("place", ["kaito", "kaito/org-model"])
@pytest.mark.parametrize("how", ["withdraw", "prune", "publish"])
def test_planted_symlinks_in_kaito_s_place_are_not_followed(layout: Layout, views: Views, tmp_path: Path, place: str, how: str) -> None:
    manifest = make_ready(layout, FILES)
    views.publish_kaito(manifest, hub_id="org/model")
    victim, planted = tmp_path / "victim", layout.root / place
    planted.rename(victim)
    planted.symlink_to(victim)
    before = tree(victim)
    match how:
        case "withdraw":
            views.withdraw_kaito(hub_id="org/model")
        case "prune":
            views.prune([(manifest, "org/model")])
        case "publish":
            views.publish_kaito(manifest, hub_id="org/model")
            assert views.kaito_shows(manifest, "org/model")
    assert tree(victim) == before
    assert not planted.is_symlink()


def test_thousands_of_files_in_hundreds_of_folders(layout: Layout, views: Views) -> None:
    digest_of = dict.fromkeys((f"d{number % 300}/f{number}" for number in range(600)), b"same")
    manifest = make_ready(layout, {"f": b"same"})
    manifest = manifest_of(digest_of)
    views.publish(manifest, hub_id="org/model", names=["main"])
    assert views.complete(manifest, "org/model")
    assert len(os.listdir("/proc/self/fd")) < 100


def test_a_disk_that_fails_is_said(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    layout.tmp.rmdir()
    layout.tmp.write_text("not a directory")
    with pytest.raises(DiskError, match=f"cannot withdraw {manifest.id}"):
        views.withdraw(manifest, hub_id="org/model")


READER = """
import json, os, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("error")
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import IncompleteSnapshotError
cache, commit = sys.argv[1:]
by_ref = snapshot_download("org/model", cache_dir=cache, local_files_only=True)
by_commit = snapshot_download("org/model", revision=commit, cache_dir=cache, local_files_only=True)
by_pr = snapshot_download("org/model", revision="refs/pr/1", cache_dir=cache, local_files_only=True)
scan = scan_cache_dir(cache)
[repo] = scan.repos
[revision] = repo.revisions
print(json.dumps({
    "paths": [by_ref, by_commit, by_pr],
    "warnings": [str(w) for w in scan.warnings],
    "repo": repo.repo_id, "commit": revision.commit_hash, "refs": sorted(revision.refs), "files": len(revision.files), "size": repo.size_on_disk,
    "config": try_to_load_from_cache("org/model", "config.json", cache_dir=cache),
}))
"""


def test_huggingface_hub_takes_the_tree_for_its_own(layout: Layout, views: Views) -> None:
    manifest = make_ready(layout, FILES)
    views.publish(manifest, hub_id="org/model", names=["refs/pr/1"])
    run = subprocess.run([sys.executable, "-c", READER, str(layout.hub), COMMIT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["paths"] == [str(snapshot(layout))] * 3
    assert found["warnings"] == []
    assert (found["repo"], found["commit"], found["refs"], found["files"]) == ("org/model", COMMIT, ["main", "refs/pr/1"], len(FILES))
    assert found["size"] == sum(map(len, FILES.values()))
    assert found["config"] == str(snapshot(layout) / "config.json")
    (snapshot(layout) / "config.json").unlink()
    run = subprocess.run([sys.executable, "-c", READER, str(layout.hub), COMMIT], capture_output=True, text=True, check=False)
    assert "IncompleteSnapshotError" in run.stderr  # the listing is what tells a reader that something is missing
