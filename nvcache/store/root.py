"""The opened store: makes or recognises the directory, proves the file system fit, holds the lock, sweeps. It reads no manifest and no view."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nvcache.errors import Code, ConfigError, DiskError
from nvcache.store.catalog import Catalog
from nvcache.store.files import BLOCK, aligned_buffer, disk_errors, durable_write, fsync_path, make_dir, set_direct
from nvcache.store.ingest import ingest_keys
from nvcache.store.layout import Layout

FORMAT = 1
_OURS_BEFORE_FORMAT = frozenset({".lock", "lost+found"})  # what an empty store may hold: a first start cut short, a fresh ext4,
_MADE_BEFORE_FORMAT = frozenset({"models", "hub"})  # … and, as long as they are empty, the folders pods mount, made when the stripe was formatted
_NOT_INGESTS = frozenset({"plans", "receipts"})
_TEMP = ".tmp-"

log = logging.getLogger(__name__)


class Root:
    """A store in use by this process: its layout, its id and the lock. `direct_io` tells whether O_DIRECT works here."""

    def __init__(self, layout: Layout, store_id: str, lock: int, direct_io: bool) -> None:
        """Use `Root.open`."""
        self.layout = layout
        self.store_id = store_id
        self.direct_io = direct_io
        self._lock = lock

    @classmethod
    def open(cls, root: Path, *, make: bool = True) -> Root:
        """Take the store at `root` into use; an empty directory becomes one, and a missing one unless `make` is off.

        Raises `ConfigError`: store-foreign (something else is there), store-format (not ours to read; untouched), store-locked, store-readonly,
        store-unfit (the file system lacks what the store needs); `SpaceError`, `DiskError` (no-stripe: it is missing and not to be made).
        """
        layout = Layout(root)
        with _refusals(root):
            if make:
                _make_root(root)
            elif not root.is_dir():
                why = f"cannot use the store {root}: it is not there"
                raise DiskError(
                    Code.NO_STRIPE, why, hint="the stripe's mount does not reach this process; its container needs HostToContainer propagation"
                )
            store_id = _recognise(layout)  # before the lock: nothing is made in a directory that is not ours
            lock = _take_lock(layout)
            try:
                # Another first start may have won meanwhile.
                store_id = store_id or _recognise(layout) or _found(layout)
                _make_folders(layout)
                direct_io = _probe(layout)
            except BaseException:
                os.close(lock)
                raise
        return cls(layout, store_id, lock, direct_io)

    def close(self) -> None:
        """Give the lock back. Safe to call twice."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def sweep(self) -> None:
        """Remove what an earlier run left by halves. Quarantine is kept.

        That is everything in tmp/, ingests that no plan needs or that became a blob, and what is noted of entries with neither manifest nor plan.

        Only for the start, before anything else uses the store. Raises `DiskError`.
        """
        needed = {key for plan in Catalog(self.layout).plans().values() for key in ingest_keys(plan.files)}
        with disk_errors(f"sweep the store {self.layout.root}"):
            for child in list(os.scandir(self.layout.tmp)):
                _remove(child)
            for child in list(os.scandir(self.layout.ingest)):
                if child.name not in _NOT_INGESTS and (child.name not in needed or _committed(child)):
                    _remove(child)
            for child in list(os.scandir(self.layout.root)):
                if child.name.startswith(_TEMP):
                    _remove(child)
            for child in list(os.scandir(self.layout.receipts)):
                if child.name not in needed:
                    _remove(child)
            # By name: an entry whose manifest cannot be read just now is not gone.
            entries = {name.removesuffix(".json") for folder in (self.layout.manifests, self.layout.plans) for name in _names(folder)}
            for folder in (self.layout.state, self.layout.use):
                for child in list(os.scandir(folder)):
                    if child.name.removesuffix(".json") not in entries:
                        _remove(child)


@contextmanager
def _refusals(root: Path) -> Iterator[None]:
    with disk_errors(f"open the store {root}"):
        try:
            yield
        except (NotADirectoryError, FileExistsError) as error:
            raise ConfigError(Code.STORE_FOREIGN, f"cannot use the store {root}: {error.filename} is not a directory") from error
        except PermissionError as error:
            where = error.filename or "one of its folders belongs to another user"
            raise ConfigError(Code.STORE_READONLY, f"cannot use the store {root}: {error.strerror} ({where})") from error
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            raise ConfigError(Code.STORE_READONLY, f"cannot use the store {root}: the file system is read-only") from error


def _make_root(root: Path) -> None:
    if root.is_dir():
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        make_dir(root)
    except (FileNotFoundError, PermissionError) as error:  # ENOENT is how procfs, sysfs and a dangling link refuse
        code = Code.STORE_READONLY if isinstance(error, PermissionError) else Code.STORE_UNFIT
        why = f"cannot use the store {root}: the directory cannot be made there ({error.strerror})"
        raise ConfigError(code, why, hint="name another with --store or NVCACHE_STORE, or make it for the daemon's user") from error
    fsync_path(root.parent)


def _recognise(layout: Layout) -> str | None:
    """The id of the store that is there, None for an empty directory."""
    try:
        raw = layout.format_file.read_bytes()
    except FileNotFoundError:
        foreign = sorted(name for name in _names(layout.root) if not _ours_before_format(layout.root / name))
        if foreign:
            raise ConfigError(Code.STORE_FOREIGN, f"cannot use {layout.root} as a store: it holds {foreign[0]!r} and no format.json") from None
        return None
    try:
        facts = json.loads(raw)
        version, store_id = facts["format"], facts["store_id"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(Code.STORE_FORMAT, f"cannot use the store {layout.root}: its format.json cannot be read ({error})") from error
    if version != FORMAT or not isinstance(store_id, str):
        raise ConfigError(Code.STORE_FORMAT, f"cannot use the store {layout.root}: its format is {version!r}, this version knows {FORMAT}")
    return store_id


def _ours_before_format(child: Path) -> bool:
    if child.name in _MADE_BEFORE_FORMAT:
        return stat.S_ISDIR(child.lstat().st_mode) and not any(child.iterdir())
    return child.name in _OURS_BEFORE_FORMAT or child.name.startswith(_TEMP)


def _found(layout: Layout) -> str:
    """Make an empty directory a store."""
    store_id = secrets.token_hex(16)
    durable_write(layout.format_file, json.dumps({"format": FORMAT, "store_id": store_id}).encode() + b"\n")
    return store_id


def _take_lock(layout: Layout) -> int:
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        who = f"the process {holder}" if holder.isdigit() else "another process"
        raise ConfigError(Code.STORE_LOCKED, f"cannot use the store {layout.root}: {who} uses it") from None
    except OSError as error:
        os.close(fd)
        raise ConfigError(Code.STORE_UNFIT, f"cannot use the store {layout.root}: its file system has no locks ({error.strerror})") from error
    with suppress(OSError):  # the pid is a help for people, who may read it; a full disk must not keep the store from opening
        os.fchmod(fd, 0o644)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _make_folders(layout: Layout) -> None:
    open_to_all = [layout.blobs.parent, layout.blobs, layout.manifests, layout.models, layout.hub, layout.kaito, layout.use]
    private = [layout.ingest, layout.plans, layout.receipts, layout.state, layout.timelines, layout.leases, layout.quarantine, layout.tmp]
    for path in open_to_all:
        make_dir(path)
    for path in private:
        make_dir(path, 0o700)
    there = _names(layout.blobs)
    for name in (f"{number:02x}" for number in range(256)):
        if name not in there:  # all at once and never removed: a commit then has no folder to make or to sync
            make_dir(layout.blobs / name)
    for path in (layout.blobs, layout.blobs.parent, layout.ingest, layout.root):
        fsync_path(path)


def _probe(layout: Layout) -> bool:
    """Prove hard links, rename and fsync; whether direct I/O works."""
    folder = layout.tmp / f"probe-{secrets.token_hex(8)}"
    doing = "make a file in"
    try:
        folder.mkdir(0o700)
        fd = os.open(folder / "a", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            direct = _probe_direct(fd)
            doing = "sync a file in"
            os.fsync(fd)
            doing = "make a hard link in"
            os.link(folder / "a", folder / "b")
            if os.fstat(fd).st_nlink != 2:
                raise OSError(errno.EMLINK, "the link count stays 1")
            doing = "rename a file in"
            (folder / "b").rename(folder / "c")
            doing = "sync a directory in"
            fsync_path(folder)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.warning("cannot prove that the store's file system is fit: it is full")
            return True  # an ingest finds out by itself
        raise ConfigError(Code.STORE_UNFIT, f"cannot {doing} the store {layout.root}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the sweep removes what stays
    if not direct:
        log.warning("the store's file system has no direct I/O; files are written through the page cache")
    return direct


def _probe_direct(fd: int) -> bool:
    if not set_direct(fd, True):
        return False
    try:
        return os.pwrite(fd, aligned_buffer(BLOCK), 0) == BLOCK
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        set_direct(fd, False)


def _names(folder: Path) -> set[str]:
    return {child.name for child in folder.iterdir()}


def _committed(child: os.DirEntry[str]) -> bool:
    """Whether the ingest became a blob and only its removal was cut short, which begins with the data; one without data has nothing to go on with."""
    try:
        return os.lstat(f"{child.path}/data").st_nlink > 1
    except (FileNotFoundError, NotADirectoryError):
        return True


def _remove(child: os.DirEntry[str]) -> None:
    if child.is_dir(follow_symlinks=False):
        shutil.rmtree(child.path)
    else:
        os.unlink(child.path)  # noqa: PTH108 - a DirEntry has a plain path
