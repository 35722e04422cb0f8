"""What the store remembers of entries: manifests, plans, state, leases, last use, read back at start. It keeps nothing in memory and decides nothing.

A file that cannot be read back is never fatal: it is said in the log and moved to quarantine/, where a person can look at it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvcache.core.manifest import Manifest
from nvcache.core.plan import FillPlan
from nvcache.core.records import count, flag, reading, text, texts
from nvcache.core.ref import EntryId, parse_entry
from nvcache.errors import NvcacheError, RequestError
from nvcache.store.files import disk_errors, durable_write, fsync_path, make_dir
from nvcache.store.layout import Layout

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EntryState:
    """What is decided of an entry apart from its bytes. `names` are the moving names (branches, tags) that were last resolved to it."""

    pin: bool = False
    alias: str | None = None
    names: tuple[str, ...] = ()
    checked_at: str | None = None  # RFC 3339: when all bytes were last read and compared
    resolved_at: float = 0.0  # unix seconds: when a reference last named this revision; the newest is what a bare slug means
    fill_bytes: int = 0  # what the last fill fetched …
    fill_seconds: float = 0.0  # … and how long it took: the rate a dry run counts with
    scrubbed: int = 0  # bytes that a scrub which was cut short had read and found right …
    scrub_began: float = 0.0  # … and when it began, unix seconds


@dataclass(frozen=True, slots=True)
class Lease:
    """A hold on an entry. `expires` is in unix seconds, `ttl` in seconds."""

    id: str
    entry: EntryId
    holder: str
    expires: float
    ttl: float


class Catalog:
    """The files of `manifests/`, `ingest/plans/`, `state/`, `leases/` and `use/`. One writer per file at a time is the caller's business."""

    def __init__(self, layout: Layout) -> None:
        """Over a store that `Root.open` made."""
        self.unread: set[Path] = set()  # files that the disk did not give back: what they say is not known, and may be known again
        self._layout = layout

    # -- manifests and plans

    def manifests(self) -> dict[EntryId, Manifest]:
        """Every sound manifest. Whether its blobs are there is not looked at."""
        found = {}
        for path, manifest in self._read_all(self._layout.manifests, Manifest.from_json):
            if self._named(path, str(manifest.id)):
                found[manifest.id] = manifest
        return found

    def unread_entries(self) -> set[EntryId]:
        """The entries whose manifest is there and could not be read: nothing of theirs may be taken for garbage."""
        found = set()
        for path in self.unread:
            with suppress(RequestError):  # no manifest of ours
                if path.parent == self._layout.manifests:
                    found.add(parse_entry(path.stem))
        return found

    def write_manifest(self, manifest: Manifest) -> None:
        """Make an entry ready: the last step of a fill. Raises `SpaceError`, `DiskError`."""
        self._write(self._layout.manifest(manifest.id), manifest.to_json())

    def keep_manifest(self, manifest: Manifest) -> None:
        """Write it if it is not there: a removal that failed half-way may have taken it. Raises `SpaceError`, `DiskError`."""
        path = self._layout.manifest(manifest.id)
        with disk_errors(f"look for {path}"):
            there = path.exists()
        if not there:
            self.write_manifest(manifest)

    def remove_manifest(self, entry: EntryId) -> None:
        """Make an entry not ready; nothing happens when it is not. Raises `DiskError`."""
        self._remove(self._layout.manifest(entry))

    def plans(self) -> dict[EntryId, FillPlan]:
        """Every sound plan: the fills to go on with."""
        found = {}
        for path, plan in self._read_all(self._layout.plans, FillPlan.from_json):
            if self._named(path, str(plan.id)):
                found[plan.id] = plan
        return found

    def write_plan(self, plan: FillPlan) -> None:
        """Say what a fill needs, before its first byte. Raises `SpaceError`, `DiskError`."""
        self._write(self._layout.plan(plan.id), plan.to_json())

    def remove_plan(self, entry: EntryId) -> None:
        """The fill is over. Raises `DiskError`."""
        self._remove(self._layout.plan(entry))

    # -- state

    def state(self, entry: EntryId) -> EntryState:
        """What was decided of `entry`; the default when nothing was or it cannot be read."""
        path = self._layout.state_file(entry)
        return self._read(path, _state) or EntryState()

    def write_state(self, entry: EntryId, state: EntryState) -> None:
        """Remember a decision. Raises `SpaceError`, `DiskError`."""
        self._write(self._layout.state_file(entry), _json(asdict(state)))

    def remove_state(self, entry: EntryId) -> None:
        """Forget an entry: its decisions and its last use. Raises `DiskError`."""
        self._remove(self._layout.state_file(entry))
        self._remove(self._layout.use_file(entry))

    # -- leases

    def leases(self) -> dict[str, Lease]:
        """Every lease on disk by id, run out or not."""
        return {lease.id: lease for path, lease in self._read_all(self._layout.leases, _lease) if self._named(path, lease.id)}

    def write_lease(self, lease: Lease) -> None:
        """Take or renew a hold. The id is a plain file name. Raises `SpaceError`, `DiskError`."""
        self._write(self._layout.leases / f"{lease.id}.json", _json({**asdict(lease), "entry": str(lease.entry)}))

    def remove_lease(self, lease: str) -> None:
        """Let go. Raises `DiskError`."""
        self._remove(self._layout.leases / f"{lease}.json")

    # -- last use

    def touch(self, entry: EntryId, now: float) -> None:
        """Note that `entry` was used at `now` (unix seconds). Not synced: a power cut may lose it. Raises `SpaceError`, `DiskError`."""
        path = self._layout.use_file(entry)
        with disk_errors(f"note the last use of {entry}"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                if stat.S_IMODE(os.fstat(fd).st_mode) != 0o644:  # the umask has its say at the making
                    os.fchmod(fd, 0o644)
                os.utime(fd, (now, now))
            finally:
                os.close(fd)

    def last_used(self, entry: EntryId, now: float) -> float | None:
        """When `entry` was last used, unix seconds, never later than `now`; None when it never was. Raises `DiskError`."""
        with disk_errors(f"read the last use of {entry}"):
            try:
                return min(self._layout.use_file(entry).lstat().st_mtime, now)
            except FileNotFoundError:
                return None

    # -- files

    def _write(self, path: Path, data: bytes) -> None:
        durable_write(path, data, temp=self._layout.tmp)

    def _remove(self, path: Path) -> None:
        with disk_errors(f"remove {path}"), suppress(FileNotFoundError):
            path.unlink()
            fsync_path(path.parent)

    def _read_all(self, folder: Path, parse: Callable[[bytes], T]) -> Iterator[tuple[Path, T]]:
        with disk_errors(f"list {folder}"):
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
        for path in paths:
            found = self._read(path, parse)
            if found is not None:
                yield path, found

    def _read(self, path: Path, parse: Callable[[bytes], T]) -> T | None:
        """The parsed file; None when it is not there, or unreadable (said in the log) or garbage (moved aside)."""
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read %s: %s; what it stands for is left as it is", path, error.strerror)
            self.unread.add(path)
        except NvcacheError as error:
            self._set_aside(path, str(error))
        return None

    def _named(self, path: Path, name: str) -> bool:
        """Whether the file bears the name of what is in it; else it is moved aside."""
        if path.stem == name:
            return True
        self._set_aside(path, f"it speaks of {name}")
        return False

    def _set_aside(self, path: Path, why: str) -> None:
        folder = self._layout.quarantine / path.parent.name
        log.warning("cannot use %s: %s; it is moved to %s", path, why, folder)
        with disk_errors(f"move {path} aside"):
            make_dir(folder, 0o700)
            path.rename(folder / path.name)


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, indent=1).encode()


def _state(data: bytes) -> EntryState:
    with reading("state"):
        raw = _object(data)
        return EntryState(
            pin=flag(raw["pin"]),
            alias=_optional_text(raw["alias"]),
            names=texts(raw["names"]),
            checked_at=_optional_text(raw["checked_at"]),
            resolved_at=_number(raw["resolved_at"]),
            fill_bytes=count(raw["fill_bytes"]),
            fill_seconds=_number(raw["fill_seconds"]),
            scrubbed=count(raw.get("scrubbed", 0)),  # of a store that an older version wrote it is not told
            scrub_began=_number(raw.get("scrub_began", 0.0)),
        )


def _lease(data: bytes) -> Lease:
    with reading("lease"):
        raw = _object(data)
        return Lease(text(raw["id"]), parse_entry(text(raw["entry"])), text(raw["holder"]), _number(raw["expires"]), _number(raw["ttl"]))


def _object(data: bytes) -> dict[str, Any]:
    raw = json.loads(data)
    if not isinstance(raw, dict):
        raise TypeError("it is not an object")
    return raw


def _optional_text(value: object) -> str | None:
    return None if value is None else text(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r:.80} stands where a number is due")
    return float(value)
