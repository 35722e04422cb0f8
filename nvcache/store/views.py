"""The views of an entry, as hard links to its blobs: a flat directory and a HuggingFace cache tree. It writes no manifest and reads no blob.

A view appears whole: it is built in tmp/ and renamed. One that is there already only gets links added or replaced, one atomic step each: a reader
never finds fewer files than before, and an index appears after the shards it names. In the HuggingFace tree the snapshot comes first, then the
listing in `trees/`, then the refs: readers follow them in the opposite order. Removal goes backwards. The layout is huggingface_hub's (2.4:
`_tree_cache.py`, `_snapshot_download.py`), which takes regular files for its symlinks into `blobs/`.

For KAITO one entry of each Hub name is shown once more, flat, under that name alone: when another entry takes the name its view goes first, so that
files of two revisions never lie side by side.

Repository paths are walked by directory descriptor without following links; whatever stands where a directory should be is replaced by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nvcache.core.digest import git_blob_header
from nvcache.core.manifest import Check, File, Manifest
from nvcache.core.names import check_name
from nvcache.core.ref import EntryId
from nvcache.errors import NvcacheError
from nvcache.store.blobs import Blobs
from nvcache.store.files import NO_SPACE, disk_errors, durable_write, fsync_path
from nvcache.store.folders import DIRECTORY, children_of, descend, drop_link, enter, is_directory, read_if_there, remove_if_empty
from nvcache.store.layout import Layout

TREE_FORMAT = 1
INDEX = ".index.json"  # what ends the name of a file that names others
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Views:
    """The views of one store. Publishing and withdrawing exclude each other; both may be repeated after a crash at any instant."""

    def __init__(self, layout: Layout, blobs: Blobs) -> None:
        """Over a store that `Root.open` made."""
        self._layout = layout
        self._blobs = blobs
        self._lock = threading.Lock()

    def publish(self, manifest: Manifest, *, hub_id: str | None, names: Iterable[str] = ()) -> None:
        """Show the files of `manifest`, whose blobs are all there: flat, and as the Hub model `hub_id` if given, with `names` (branches …) as refs.

        The manifest itself is written afterwards. Raises `IntegrityError` (degraded: a blob is missing; hostile-name), `RequestError` (bad `hub_id`),
        `SpaceError`, `DiskError`.
        """
        wanted = list(names)
        for name in wanted:
            check_name(name)
        repo = None if hub_id is None else self._layout.hub_repo(hub_id)
        with self._lock, disk_errors(f"publish {manifest.id}"):
            self._blobs.sync(manifest.blobs)
            self._show(manifest, self._layout.view(manifest.id))
            if repo is None:
                return
            commit = self.hub_commit(manifest)
            self._show(manifest, repo / "snapshots" / commit)
            self._write(repo / "trees" / f"{commit}.json", tree_listing(manifest))
            for name in wanted:
                self._write(repo / "refs" / name, commit.encode())

    def withdraw(self, manifest: Manifest, *, hub_id: str | None) -> None:
        """Hide the entry: its refs, its listing, its snapshot, its flat view. What was not there is no matter. Raises `DiskError`."""
        entry = manifest.id
        repo = None if hub_id is None else self._layout.hub_repo(hub_id)
        with self._lock, disk_errors(f"withdraw {entry}"):
            try:
                if repo is not None:
                    self._withdraw_snapshot(repo, self.hub_commit(manifest))
            finally:
                drop_link(self._layout.view(entry).parent)
                self._take_away(self._layout.view(entry))
                remove_if_empty(self._layout.view(entry).parent)

    def withdraw_hub(self, manifest: Manifest, *, hub_id: str) -> None:
        """Hide the entry under one Hub name only; the flat view stays. Raises `DiskError`."""
        with self._lock, disk_errors(f"withdraw {manifest.id} as {hub_id}"):
            self._withdraw_snapshot(self._layout.hub_repo(hub_id), self.hub_commit(manifest))

    def names(self, hub_id: str) -> dict[str, str]:
        """The refs of a model in the HuggingFace view: name → commit. Raises `DiskError`."""
        with disk_errors(f"read the refs of {hub_id}"):
            return _refs(self._layout.hub_repo(hub_id))

    def publish_kaito(self, manifest: Manifest, *, hub_id: str) -> None:
        """Show the files of `manifest` as KAITO looks for `hub_id`, where no other entry's are. Raises as `publish` does."""
        with self._lock, disk_errors(f"publish {manifest.id} for KAITO"):
            self._blobs.sync(manifest.blobs)
            self._show(manifest, self._layout.kaito_view(hub_id))

    def withdraw_kaito(self, *, hub_id: str) -> None:
        """Hide what KAITO is shown as `hub_id`; nothing happens when that is nothing. Raises `DiskError`."""
        with self._lock, disk_errors(f"withdraw {hub_id} from KAITO"):
            drop_link(self._layout.kaito)
            self._take_away(self._layout.kaito_view(hub_id))

    def kaito_shows(self, manifest: Manifest, hub_id: str) -> bool:
        """Whether KAITO is shown exactly the files of `manifest` as `hub_id`. Raises `DiskError`."""
        view = self._layout.kaito_view(hub_id)
        with disk_errors(f"check the view of {manifest.id} for KAITO"):
            return self._shown(manifest, view) and sum(len(files) for _, _, files in os.walk(view)) == len(manifest.files)

    @staticmethod
    def hub_commit(manifest: Manifest) -> str:
        """The 40 hex digits that stand for the revision in a HuggingFace view: the commit, a mirror's too, or the first 40 of a listing digest."""
        return manifest.commit or manifest.id.revision[:40]

    def complete(self, manifest: Manifest, hub_id: str | None, kaito: str | None = None) -> bool:
        """Whether every file is in every view, is its blob and has its size, and the listing names exactly them. Bytes and refs are not looked at.

        A view whose blob is gone, or was replaced, counts as incomplete even if its own link to the bytes is still there. `kaito` is the Hub name
        that KAITO is shown the entry as, if it is.

        Raises `DiskError`.
        """
        with disk_errors(f"check the views of {manifest.id}"):
            if not self._shown(manifest, self._layout.view(manifest.id)):
                return False
            if kaito is not None and not self._shown(manifest, self._layout.kaito_view(kaito)):
                return False
            if hub_id is None:
                return True
            repo, commit = self._layout.hub_repo(hub_id), self.hub_commit(manifest)
            return self._shown(manifest, repo / "snapshots" / commit) and _is_listing(read_if_there(repo / "trees" / f"{commit}.json"), manifest)

    def prune(self, wanted: Iterable[tuple[Manifest, str | None]], kaito: Container[str] = (), unknown: Iterable[EntryId] = ()) -> list[str]:
        """Remove every view that none of `wanted` (manifest, Hub name) has: what a crash left between two steps. The answer names them for the log.

        `kaito` are the names of the views for KAITO that are right; of entries that are `unknown` just now the plain view stays, and so their blobs.

        Raises `DiskError`.
        """
        flat = {self._layout.view(entry_id) for entry_id in unknown}
        hub: dict[Path, set[str]] = {}
        for manifest, hub_id in wanted:
            flat.add(self._layout.view(manifest.id))
            if hub_id is not None:
                hub.setdefault(self._layout.hub_repo(hub_id), set()).add(self.hub_commit(manifest))
        removed: list[str] = []
        with self._lock, disk_errors("remove views that no entry has"):
            for model in children_of(self._layout.models):
                drop_link(model)
                for view in children_of(model):
                    if view not in flat:
                        self._take_away(view)
                        removed.append(f"{model.name}@{view.name}")
                remove_if_empty(model)
            for repo in children_of(self._layout.hub):
                if repo.name.startswith("models--"):
                    removed += self._prune_repo(repo, hub.get(repo, set()))
            drop_link(self._layout.kaito)
            for view in children_of(self._layout.kaito):
                if view.name not in kaito:
                    self._take_away(view)
                    removed.append(f"kaito/{view.name}")
        return removed

    # -- showing

    def _show(self, manifest: Manifest, target: Path) -> None:
        """Make `target` have every file of `manifest`."""
        with self._folder(target.parent) as parent:
            if is_directory(target.name, parent):
                fd = os.open(target.name, DIRECTORY, dir_fd=parent)
                try:
                    self._fill(fd, manifest)
                finally:
                    os.close(fd)
                return
            half = f"view-{secrets.token_hex(8)}"
            with self._folder(self._layout.tmp) as tmp:
                try:
                    fd = enter(tmp, half)
                    try:
                        self._fill(fd, manifest)
                    finally:
                        os.close(fd)
                    with suppress(FileNotFoundError):
                        os.unlink(target.name, dir_fd=parent)  # no directory, so not ours
                    os.rename(half, target.name, src_dir_fd=tmp, dst_dir_fd=parent)
                    os.fsync(parent)
                except (OSError, NvcacheError):
                    shutil.rmtree(self._layout.tmp / half, ignore_errors=True)  # its links would count; the next sweep removes what stays
                    raise

    def _shown(self, manifest: Manifest, target: Path) -> bool:
        """Whether all files are below `target`, as their blobs and with their size."""
        try:
            with self._folder(target, make=False) as root:
                for folder, children in _by_folder(manifest.files).items():
                    with descend(root, folder, make=False) as fd:
                        for file in children:
                            facts = os.stat(file.path.rpartition("/")[2], dir_fd=fd, follow_symlinks=False)
                            if not stat.S_ISREG(facts.st_mode) or facts.st_size != file.size or not self._blobs.shown(file.sha256, facts):
                                return False
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _fill(self, root: int, manifest: Manifest) -> None:
        """Link every file below the open directory `root`, an index after all others, and sync the directories."""
        indexes = [file for file in manifest.files if file.path.endswith(INDEX)]
        others = [file for file in manifest.files if not file.path.endswith(INDEX)]
        for files in (others, indexes):
            for folder, children in _by_folder(files).items():
                with descend(root, folder) as fd:
                    for file in children:
                        self._blobs.link(file.sha256, file.path.rpartition("/")[2], dir_fd=fd)
                    os.fsync(fd)

    def _write(self, path: Path, data: bytes) -> None:
        """A small file of the HuggingFace tree, only if it is not that already."""
        with self._folder(path.parent) as folder:
            if is_directory(path.name, folder):  # a ref "a/b" was there before the ref "a"
                self._take_away(path)
        if path.is_symlink() or read_if_there(path) != data:
            durable_write(path, data, temp=self._layout.tmp)

    @contextmanager
    def _folder(self, path: Path, *, make: bool = True) -> Iterator[int]:
        """A directory of the store, open; made, and its making synced, unless told otherwise."""
        root = os.open(self._layout.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with descend(root, str(path.relative_to(self._layout.root)), make=make, sync=True) as fd:
                yield fd
        finally:
            os.close(root)

    # -- hiding

    def _withdraw_snapshot(self, repo: Path, commit: str) -> None:
        for planted in (repo, repo / "refs", repo / "trees", repo / "snapshots"):
            drop_link(planted)
        try:
            for name, target in _refs(repo).items():
                if target == commit:
                    (repo / "refs" / name).unlink()
                    fsync_path((repo / "refs" / name).parent)
            with suppress(FileNotFoundError):
                (repo / "trees" / f"{commit}.json").unlink()
                fsync_path(repo / "trees")
        finally:  # a disk that fails here must not keep bad bytes in sight
            self._take_away(repo / "snapshots" / commit)
        if repo.is_dir() and not children_of(repo / "snapshots"):
            self._take_away(repo)

    def _prune_repo(self, repo: Path, commits: set[str]) -> list[str]:
        if not commits:
            self._take_away(repo)
            return [repo.name]
        found = {path.name for path in children_of(repo / "snapshots")} | set(_refs(repo).values())
        found |= {path.stem for path in children_of(repo / "trees")}
        for commit in found - commits:
            self._withdraw_snapshot(repo, commit)
        return [f"{repo.name}@{commit}" for commit in sorted(found - commits)]

    def _take_away(self, path: Path) -> None:
        """Make a directory vanish in one step, then remove it. Where a full disk has no room for its other name, it goes file by file."""
        for left in self._layout.tmp.glob("gone-*"):  # by a disk that failed; its links keep blobs from being removed
            shutil.rmtree(left, ignore_errors=True)
        aside = self._layout.tmp / f"gone-{secrets.token_hex(8)}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            aside = path  # half a view is better than bad bytes, or than room that is never given back
        try:
            fsync_path(path.parent)
        finally:
            if aside.is_symlink() or not aside.is_dir():
                aside.unlink()
            else:
                shutil.rmtree(aside)


def tree_listing(manifest: Manifest) -> bytes:
    """`trees/<commit>.json` as huggingface_hub reads it: path → size, git blob id, and for LFS files SHA-256 and size."""
    return json.dumps(_listing(manifest), indent=1).encode()


def _listing(manifest: Manifest) -> dict[str, object]:
    files = {file.path: _tree_entry(file) for file in sorted(manifest.files, key=lambda file: file.path)}
    return {"format_version": TREE_FORMAT, "files": files}


def _is_listing(data: bytes | None, manifest: Manifest) -> bool:
    """Whether `data` says what `tree_listing` does. Reading is many times faster than writing with an indent, and it is done often."""
    try:
        return data is not None and bool(json.loads(data) == _listing(manifest))
    except (ValueError, RecursionError):
        return False


def _tree_entry(file: File) -> dict[str, object]:
    if file.check is Check.GIT_SHA1 and file.source is not None:
        return {"size": file.size, "blob_id": file.source.hex}
    # Git stores an LFS file as a pointer of this form (git-lfs, docs/spec.md), so its blob id follows from digest and size.
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n".encode()
    blob_id = hashlib.sha1(git_blob_header(len(pointer)) + pointer, usedforsecurity=False).hexdigest()
    return {"size": file.size, "blob_id": blob_id, "lfs_sha256": file.sha256, "lfs_size": file.size}


def _by_folder(files: Iterable[File]) -> Mapping[str, list[File]]:
    """Folder → its files; every folder on the way is there, "" is the top."""
    folders: dict[str, list[File]] = {"": []}
    for file in files:
        folder = file.path.rpartition("/")[0]
        parts = folder.split("/") if folder else []
        for depth in range(1, len(parts) + 1):
            folders.setdefault("/".join(parts[:depth]), [])
        folders[folder].append(file)
    return folders


def _refs(repo: Path) -> dict[str, str]:
    found = {}
    for folder, _, files in os.walk(repo / "refs"):
        for file in files:
            path = Path(folder) / file
            commit = (read_if_there(path) or b"").decode("ascii", "replace")
            if not path.is_symlink() and _COMMIT.fullmatch(commit):
                found[str(path.relative_to(repo / "refs"))] = commit
    return found
