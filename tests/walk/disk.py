"""What a store shows to somebody who only reads its directories, as pods do, and what it holds. It asks no daemon, and uses nothing of nvcache's."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

CHUNK = 16 * 2**20
GRACE = 600.0  # seconds that a blob without a user may stay
SECTOR = 512

Truth = Mapping[tuple[str, str], Mapping[str, bytes]]
Stamp = tuple[int, int]  # inode and mtime: what was written, once


def stamp(facts: os.stat_result) -> Stamp:
    """Which content a file has had since it was last written."""
    return facts.st_ino, facts.st_mtime_ns


class Disk:
    """Checks of one store against the truth. What was looked at once is not hashed again before somebody writes to it."""

    def __init__(self, store: Path, truth: Truth) -> None:
        self._store, self._truth = store, truth
        self._hashed: dict[tuple[Stamp, int], str] = {}
        self._expected: dict[tuple[str, str], dict[str, str]] = {}

    def has_lease(self, lease: str, until: float) -> bool:
        """Whether it is written down, and lives at least so long."""
        path = self._store / "leases" / f"{lease}.json"
        return path.exists() and json.loads(path.read_bytes())["expires"] >= until

    def expected(self, name: str, commit: str) -> dict[str, str]:
        """Path → SHA-256 of what a revision has."""
        key = name, commit
        if key not in self._expected:
            self._expected[key] = {path: hashlib.sha256(data).hexdigest() for path, data in self._truth[key].items()}
        return self._expected[key]

    def blob(self, sha256: str) -> Path:
        """Where the blob is."""
        return self._store / "blobs" / "sha256" / sha256[:2] / sha256

    def views(self) -> Iterator[tuple[Path, str, str]]:
        """Each directory that shows a model, with its name and commit."""
        for view in self._store.glob("models/*/*"):
            yield view, view.parent.name.removeprefix("hf--acme--"), view.name
        for view in self._store.glob("hub/models--*/snapshots/*"):
            yield view, view.parents[1].name.removeprefix("models--acme--"), view.name

    def wrong(self, view: Path, name: str, commit: str) -> Iterator[tuple[str, str, Stamp | None]]:
        """Path, SHA-256 that is due, and stamp of each file that is missing (None) or holds other bytes. Raises AssertionError for one too many."""
        due = self.expected(name, commit)
        there = {str(path.relative_to(view)): path for path in view.rglob("*") if not path.is_dir()}
        assert there.keys() <= due.keys(), f"{view} shows {sorted(there.keys() - due.keys())}"
        for path, sha256 in due.items():
            if path not in there:
                yield path, sha256, None
            elif self._digest(there[path]) != sha256:
                yield path, sha256, stamp(there[path].stat())

    def dangling(self) -> list[str]:
        """Refs that lead to no snapshot, listings of none."""
        found = [str(ref) for ref in self._store.glob("hub/models--*/refs/*") if not (ref.parents[1] / "snapshots" / ref.read_text()).is_dir()]
        return found + [str(tree) for tree in self._store.glob("hub/models--*/trees/*") if not (tree.parents[1] / "snapshots" / tree.stem).is_dir()]

    def used(self) -> int:
        """Bytes that blobs, ingests and quarantine have on the disk."""
        seen: dict[int, int] = {}
        for folder in ("blobs", "ingest", "quarantine"):
            for facts in self._files(self._store / folder):
                seen[facts.st_ino] = facts.st_blocks * SECTOR
        return sum(seen.values())

    def entries(self, folder: str) -> list[tuple[str, str]]:
        """Name and commit of each file `<entry>.json` in a folder of the store."""
        found = [path.stem.removeprefix("hf--acme--").partition("@") for path in (self._store / folder).glob("*.json")]
        return [(name, commit) for name, _, commit in found]

    def links(self) -> dict[str, tuple[int, int]]:
        """SHA-256 → link count of the blob, and how many names of it the views have."""
        names: Counter[int] = Counter()
        for folder in ("models", "hub", "kaito"):
            names.update(facts.st_ino for facts in self._files(self._store / folder))
        found = {}
        for blob in self._store.glob("blobs/sha256/*/*"):
            facts = blob.stat()
            found[blob.name] = facts.st_nlink, names[facts.st_ino]
        return found

    def orphans(self, since: float) -> list[str]:
        """Blobs that nothing names although they had their time: the grace, or a start at `since` (unix seconds), which leaves none."""
        named = {sha256 for folder in ("manifests", "ingest/plans") for entry in self.entries(folder) for sha256 in self.expected(*entry).values()}
        blobs = {path: path.stat() for path in self._store.glob("blobs/sha256/*/*") if path.name not in named}
        return [path.name for path, facts in blobs.items() if facts.st_ctime < since or time.time() - facts.st_ctime > GRACE]

    def halves(self) -> list[str]:
        """What is in the making, or was left by halves: of tmp/, and ingests while there is no plan."""
        folders = [self._store / "tmp"] + ([] if self.entries("ingest/plans") else [self._store / "ingest"])
        found = [child for folder in folders for child in folder.iterdir() if child.name not in ("plans", "receipts", "xet")]
        return [str(child) for child in found]

    def pinned(self, name: str, commit: str) -> bool:
        """Whether the disk remembers a pin that somebody asked for; declarations are not among them."""
        state = self._store / "state" / f"hf--acme--{name}@{commit}.json"
        return state.exists() and bool(json.loads(state.read_bytes())["pin"])

    def _files(self, folder: Path) -> Iterator[os.stat_result]:
        for path in folder.rglob("*"):
            facts = path.lstat()
            if stat.S_ISREG(facts.st_mode):
                yield facts

    def _digest(self, path: Path) -> str:
        facts = path.stat()
        key = stamp(facts), facts.st_size
        if key not in self._hashed:
            with path.open("rb") as file:
                self._hashed[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashed[key]
