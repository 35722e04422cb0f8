"""The blobs: look up, link, count, remove, quarantine. It never writes into one, and who needs a blob is not its business but the link count's.

A blob has as many users as it has links besides its own name. Every step that reads and then changes the count is done under the lock (flock) of the
blob's folder: shared by those that add a link, in this process or another, exclusive for the removal, which looks at the count again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nvcache.errors import Code, DiskError, IntegrityError, SpaceError
from nvcache.store.files import disk_errors, durable_write, fsync_path
from nvcache.store.layout import Layout

NOTE = ".note"  # what ends the name of the file beside a quarantined blob that says why it is there
GRACE = 600.0  # seconds a blob nobody links is kept: the time between its commit and its views
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


class Blobs:
    """The blobs of one store. Safe to use from several threads and processes."""

    def __init__(self, layout: Layout) -> None:
        """Over a store that `Root.open` made."""
        self._layout = layout

    def has(self, sha256: str, size: int) -> bool:
        """Whether the blob is there as a regular file of `size` bytes. Its bytes are not read. Raises `DiskError`."""
        with disk_errors(f"look up blob {sha256}"):
            try:
                facts = self._layout.blob(sha256).lstat()
            except FileNotFoundError:
                return False
        return stat.S_ISREG(facts.st_mode) and facts.st_size == size

    def shown(self, sha256: str, facts: os.stat_result) -> bool:
        """Whether the file with these facts is the blob: the same inode, or the copy that `link` made of it for want of links.

        A copy is known by its size and mtime, which are the blob's; bytes are not compared. Raises OSError.
        """
        try:
            blob = self._layout.blob(sha256).lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(facts, blob) or (stat.S_ISREG(facts.st_mode) and _stamp(facts) == _stamp(blob))

    def stamps(self, sha256s: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Inode and time of the last write (ns) of each blob that is there: one whose time changes, but not its inode, was written to.

        Raises `DiskError`.
        """
        found = {}
        for sha256 in sha256s:
            with disk_errors(f"look at blob {sha256}"), suppress(FileNotFoundError):
                facts = self._layout.blob(sha256).lstat()
                found[sha256] = facts.st_ino, facts.st_mtime_ns
        return found

    def link(self, sha256: str, name: str, *, dir_fd: int) -> None:
        """Give the blob one more name, in the open directory `dir_fd`; a file of that name is replaced, atomically, unless it is the blob already.

        Where the file system allows no more links to it, the name gets a durable copy. Not synced: that is done once per directory by the caller.
        Raises `IntegrityError` (degraded) when the blob is not there, `SpaceError`, `DiskError`.
        """
        blob = self._layout.blob(sha256)
        with disk_errors(f"link blob {sha256} as {name}"), self._folder(blob, fcntl.LOCK_SH) as folder:
            try:
                facts = os.stat(blob.name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                raise IntegrityError(Code.DEGRADED, f"cannot link blob {sha256} as {name}: it is not in the store") from None
            if not stat.S_ISREG(facts.st_mode):
                raise IntegrityError(Code.DEGRADED, f"cannot link blob {sha256} as {name}: it is not a regular file")
            if _same(facts, name, dir_fd):
                return
            try:
                os.link(blob.name, name, src_dir_fd=folder, dst_dir_fd=dir_fd, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.EMLINK):
                    raise
                self._replace(blob, name, dir_fd)

    def sync(self, digests: Iterable[str]) -> None:
        """Make the names of these blobs survive a power cut: a commit of a small file leaves that to be done once for many. Raises `DiskError`."""
        with disk_errors("sync the folders of blobs"):
            for folder in sorted({self._layout.blob(sha256).parent for sha256 in digests}):
                fsync_path(folder)

    def unreferenced(self, keep: Container[str], *, grace: float = GRACE) -> Iterator[tuple[str, int]]:
        """SHA-256 and size in bytes of every blob that no view links, that is not in `keep`, and that nothing happened to for `grace` seconds."""
        for sha256, facts in self._scan():
            if _garbage(facts, grace) and sha256 not in keep:
                yield sha256, facts.st_size

    def remove_if_unreferenced(self, sha256: str, *, grace: float = GRACE) -> bool:
        """Remove the blob unless it has got a link, or a committer found it, meanwhile. False when it is kept or gone. Raises `DiskError`."""
        blob = self._layout.blob(sha256)
        with disk_errors(f"remove blob {sha256}"), self._folder(blob, fcntl.LOCK_EX) as folder:
            try:
                if not _garbage(os.stat(blob.name, dir_fd=folder, follow_symlinks=False), grace):
                    return False
                os.unlink(blob.name, dir_fd=folder)
            except FileNotFoundError:
                return False
        return True

    def in_use(self, sha256: str) -> bool | None:
        """Whether any process of this node has the blob open or mapped, through any of its names; None where the kernel cannot tell.

        The kernel grants a write lease (fcntl(2), F_SETLEASE) only on a file nobody else has open; it needs the owner or CAP_LEASE, and is given
        back at once. Raises `DiskError`.
        """
        with disk_errors(f"see who uses blob {sha256}"):
            try:
                fd = os.open(self._layout.blob(sha256), os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            try:
                # A process that opens the file this very moment makes the kernel signal us: by default with SIGIO, which kills.
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    return True
                if error.errno in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK):
                    return None
                raise
            else:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                return False
            finally:
                os.close(fd)

    def quarantine(self, sha256: str, note: str) -> Path:
        """Move a damaged blob out of the way, with a note beside it; the answer is where it is now. Views that link it are withdrawn before.

        An earlier one of that digest is replaced. The note is written if it can be: a full disk must not keep a bad blob in place. Raises
        `IntegrityError` (degraded) when there is no such blob, `DiskError`.
        """
        blob, target = self._layout.blob(sha256), self._layout.quarantine / sha256
        with disk_errors(f"quarantine blob {sha256}"), self._folder(blob, fcntl.LOCK_EX) as folder:
            try:
                blob.rename(target)
            except FileNotFoundError:
                raise IntegrityError(Code.DEGRADED, f"cannot quarantine blob {sha256}: it is not in the store") from None
            os.fsync(folder)
            fsync_path(self._layout.quarantine)
        try:
            durable_write(target.with_suffix(NOTE), note.encode() + b"\n", 0o600, temp=self._layout.tmp)
        except (SpaceError, DiskError) as error:
            log.warning("blob %s is in quarantine without a note why (%s): %s", sha256, error, note)
        return target

    def walk(self) -> Iterator[tuple[str, int, int]]:
        """SHA-256, size in bytes and link count of every blob; what is not a blob is passed over. Raises `DiskError`."""
        for sha256, facts in self._scan():
            yield sha256, facts.st_size, facts.st_nlink

    def used_bytes(self) -> int:
        """The sum of the blobs' sizes; each counts once, however many views show it. Raises `DiskError`."""
        return sum(size for _, size, _ in self.walk())

    def drop_quarantined(self, keep: Container[str]) -> None:
        """Remove the quarantined blobs whose SHA-256 is not in `keep`, and their notes. Other things in quarantine stay. Raises `DiskError`."""
        with disk_errors("clean up the quarantine"):
            for child in list(os.scandir(self._layout.quarantine)):
                sha256 = child.name.removesuffix(NOTE)
                if _SHA256.fullmatch(sha256) and sha256 not in keep:
                    with suppress(FileNotFoundError):
                        os.unlink(child.path)  # noqa: PTH108 - a DirEntry has a plain path

    def drop_from_quarantine(self, sha256: str) -> None:
        """Remove a quarantined blob and its note. Raises `DiskError`."""
        with disk_errors(f"remove blob {sha256} from the quarantine"):
            for name in (sha256, f"{sha256}{NOTE}"):
                (self._layout.quarantine / name).unlink(missing_ok=True)

    def quarantined_bytes(self) -> int:
        """The size of all that is in quarantine. Raises `DiskError`."""
        with disk_errors("look into the quarantine"):
            return sum(child.stat(follow_symlinks=False).st_size for child in os.scandir(self._layout.quarantine))

    def _replace(self, blob: Path, name: str, dir_fd: int) -> None:
        """Put a link of the blob, or a copy where it can have no more, in place of whatever has the name."""
        half = self._layout.tmp / f".tmp-{secrets.token_hex(8)}"
        try:
            try:
                os.link(blob, half, follow_symlinks=False)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                _copy(blob, half)
            os.rename(half, name, dst_dir_fd=dir_fd)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                half.unlink()
            raise

    def _scan(self) -> Iterator[tuple[str, os.stat_result]]:
        with disk_errors("list the blobs"):
            folders = [folder.path for folder in os.scandir(self._layout.blobs) if folder.is_dir(follow_symlinks=False)]
        for folder in folders:
            with disk_errors(f"list the blobs in {folder}"):
                children = list(os.scandir(folder))
            for child in children:
                if not _SHA256.fullmatch(child.name):
                    continue
                with disk_errors(f"look at blob {child.name}"):
                    try:
                        facts = child.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                if stat.S_ISREG(facts.st_mode):
                    yield child.name, facts

    @contextmanager
    def _folder(self, blob: Path, lock: int) -> Iterator[int]:
        """The blob's folder, open and locked. It is held for a few system calls."""
        fd = os.open(blob.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, lock)
            yield fd
        finally:
            os.close(fd)


def _garbage(facts: os.stat_result, grace: float) -> bool:
    """Nobody links it, and its status (commit, link, unlink, found by a committer) has not changed for `grace` seconds, by whatever clock step."""
    return facts.st_nlink == 1 and abs(time.time() - facts.st_ctime) >= grace


def _same(facts: os.stat_result, name: str, dir_fd: int) -> bool:
    try:
        there = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(facts, there)


def _stamp(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_size, facts.st_mtime_ns


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    facts = source.stat()
    fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(fd, 0o444)
        os.utime(fd, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # see `shown`
        os.fsync(fd)
    finally:
        os.close(fd)
