"""One blob being made: chunks written at their offsets, a journal of them, commit into `blobs/`. It hashes nothing: digests are given to it.

It runs inside worker processes. Several threads call `write` at once: the lock is held for a journal record, never while data is written. What the
journal says after a restart is a claim (see `store.journal`); the caller reads each recorded chunk back and compares before it believes it.

Data is written around the page cache (O_DIRECT) from page-aligned buffers, the tail rounded up to a block and cut at commit. Where the file system
refuses that, at the switch or at the first write, the ingest goes on through the page cache and starts write-back after each chunk. A file of one
chunk has no journal: its restart costs what a chunk in flight costs.

One writer at a time: whoever has an ingest open holds the claim on it (see `store.claim`) and reaches its files through that descriptor. So what is
committed is the file that was written and proven, whatever happens to the path meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nvcache.core.manifest import CHUNK, chunk_count
from nvcache.core.plan import RemoteFile
from nvcache.errors import Code, DiskError, IntegrityError
from nvcache.store import claim, journal
from nvcache.store.files import BLOCK, aligned_buffer, disk_errors, fsync_path, preallocate, read_at, round_up, set_direct
from nvcache.store.layout import Layout

SYNC_BYTES = 2**30  # a group commit is due after this much data …
SYNC_SECONDS = 5.0  # … or this long after the first chunk that is not yet covered
_SAFE_TOKEN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_FICLONE = 0x40049409  # linux/fs.h; the fcntl module has no name for it before Python 3.12

log = logging.getLogger(__name__)


def ingest_keys(files: Iterable[RemoteFile]) -> set[str]:
    """The keys of the ingests of `files`."""
    return {ingest_key(file.token, file.size) for file in files}


def ingest_key(token: str, size: int) -> str:
    """The folder name for the bytes that a source calls `token`: the same for every revision that has them."""
    safe = token if _SAFE_TOKEN.fullmatch(token) else f"={hashlib.sha256(token.encode('utf-8', 'surrogateescape')).hexdigest()}"
    return f"{safe}-{size}"


class Ingest:
    """The data file and journal of one key, open. Any thread may call any method; `close`, `commit` and `restart` only when no `write` runs."""

    def __init__(self, layout: Layout, key: str, size: int, chunk_size: int) -> None:
        """Use `Ingest.open`."""
        self.key = key
        self.size = size
        self.chunk_size = chunk_size
        self.count = chunk_count(size, chunk_size)
        self._layout = layout
        self._folder = layout.ingest_dir(key)
        self._lock = threading.Lock()
        self._chunks: dict[int, int] = {}
        self._lent: set[int] = set()
        self._lending = False
        self._home = -1  # the folder, locked
        self._data = -1
        self._journal = -1
        self._journal_end = 0
        self._direct = False
        self._spoiled = False
        self._unsynced = 0
        self._unsynced_since: float | None = None

    @classmethod
    def open(
        cls, layout: Layout, key: str, size: int, *, chunk_size: int = CHUNK, direct: bool = True, resume: bool = True, lent: bool = False
    ) -> Ingest:
        """Resume the ingest of `key` if its size and chunk size are these, else (or with `resume` off) make it anew with its space reserved.

        `direct` False writes through the page cache; `lent`: nobody vouches for what is written now, see `lent_chunks`. Blocks for up to
        `claim.PATIENCE` while another task, here or in another process, has it open.
        Raises `SpaceError` (disk-full) with nothing left behind, `DiskError` (disk-stalled when that task does not let go).
        """
        ingest = cls(layout, key, size, chunk_size)
        ingest._lending = lent
        with disk_errors(f"open the ingest {key}"):
            ingest._home = claim.claim(ingest._folder)
            try:
                if not (resume and ingest._resume()):
                    ingest._create()
                if direct and size >= BLOCK and chunk_size % BLOCK == 0:
                    ingest._direct = set_direct(ingest._data, True)
            except BaseException:
                ingest.close()
                raise
        return ingest

    def recorded(self) -> dict[int, int]:
        """Chunk index → XXH3-64 of the chunks on the disk, as journalled: to be checked by reading them back."""
        with self._lock:
            return dict(self._chunks)

    def lent_chunks(self) -> frozenset[int]:
        """The recorded chunks that came from somebody whom nobody vouches for, in this run or an earlier one."""
        with self._lock:
            return frozenset(self._lent)

    def length_of(self, index: int) -> int:
        """The bytes in chunk `index`: the chunk size, or what is left for the last one."""
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def write(self, index: int, buffer: memoryview, length: int, digest: int) -> None:
        """Put chunk `index` on the disk and record its XXH3-64.

        `buffer` starts on a page and holds at least `length` rounded up to a block; bytes beyond `length` do not matter.
        Raises `SpaceError`, `DiskError`; then the chunk counts as not written.
        """
        with disk_errors(f"write chunk {index} of the ingest {self.key}"):
            self._put(index * self.chunk_size, buffer, length)
        self.adopt(index, digest)

    def adopt(self, index: int, digest: int) -> None:
        """Record chunk `index`, whose bytes are in place already. Raises `SpaceError`, `DiskError`."""
        with disk_errors(f"write the journal of the ingest {self.key}"), self._lock:
            self._append(journal.good(self.key, index, digest, lent=self._lending))
            self._chunks[index] = digest
            (self._lent.add if self._lending else self._lent.discard)(index)
            self._unsynced += self.length_of(index)

    def read(self, index: int, buffer: memoryview) -> memoryview:
        """The bytes of chunk `index`, read from the disk into `buffer` (page-aligned, a chunk rounded up to a block); the answer is a slice of it.

        Raises `DiskError`.
        """
        length = self.length_of(index)
        with disk_errors(f"read chunk {index} of the ingest {self.key}"):
            read_at(self._data, index * self.chunk_size, buffer, length)
        return buffer[:length]

    def forget(self, index: int) -> None:
        """Believe no more in chunk `index`, now and after a restart. Raises `SpaceError`, `DiskError`."""
        with disk_errors(f"write the journal of the ingest {self.key}"), self._lock:
            self._lent.discard(index)
            if self._chunks.pop(index, None) is not None:
                self._append(journal.gone(self.key, index))

    def sync_due(self, now: float) -> bool:
        """Whether to call `sync` now; `now` is monotonic seconds. True is said to one caller only, who must then do it."""
        with self._lock:
            if self._unsynced == 0:
                return False
            if self._unsynced_since is None:
                self._unsynced_since = now
            due = self._unsynced >= SYNC_BYTES or now - self._unsynced_since >= SYNC_SECONDS
            if due:
                self._unsynced, self._unsynced_since = 0, None
            return due

    def sync(self) -> None:
        """Group commit: make what is recorded survive a power cut, data before journal. Writes may go on meanwhile.

        Raises `SpaceError`, `DiskError`; then nothing of the ingest is believed any more: close it, its next open begins anew.
        """
        with self._or_spoil("sync"):
            os.fdatasync(self._data)
            if self._journal >= 0:
                os.fdatasync(self._journal)

    def commit(self, sha256: str) -> None:
        """Make the data the blob `sha256`: cut to size, synced, read-only, linked into `blobs/`; the ingest is closed and its folder removed.

        A power cut before `Blobs.sync` may lose the name of a blob of one chunk, never show it with other bytes.
        The caller has proven length and digest. A blob of that name and size is kept and ours dropped; one of another size is damaged and replaced.
        Raises `SpaceError`, `DiskError`, `IntegrityError` (degraded: the data is not the file that was written); then close it, and commit again
        after its next open.
        """
        if self._spoiled:
            raise DiskError(Code.DISK_IO, f"cannot commit blob {sha256}: the disk failed to sync its data before")
        with self._or_spoil("sync"):
            if os.fstat(self._data).st_size != self.size:
                os.ftruncate(self._data, self.size)
            os.fchmod(self._data, 0o444)
            os.fsync(self._data)
            if not self._direct:
                os.posix_fadvise(self._data, 0, 0, os.POSIX_FADV_DONTNEED)
        with disk_errors(f"commit blob {sha256}"):
            self._link(self._layout.blob(sha256))
            claim.remove(self._home, self._folder)
        self.close()

    def restart(self) -> None:
        """Throw all chunks away but keep the space: the whole was wrong. Raises `DiskError`."""
        with disk_errors(f"restart the ingest {self.key}"), self._lock:
            self._chunks.clear()
            self._lent.clear()
            self._unsynced, self._unsynced_since = 0, None
            if self._journal >= 0:
                self._journal_end = journal.RECORD_BYTES
                os.ftruncate(self._journal, self._journal_end)
                os.fdatasync(self._journal)

    def close(self) -> None:
        """Give the descriptors back, the lock last; the ingest stays for a later `open`. Safe to call twice."""
        data, self._data = self._data, -1
        record, self._journal = self._journal, -1
        home, self._home = self._home, -1
        for fd in (data, record, home):
            if fd >= 0:
                os.close(fd)

    # -- opening

    def _resume(self) -> bool:
        """Take up what an earlier run left, if it is of this size and sound."""
        if self.count <= 1:
            return False
        try:
            facts = os.stat("data", dir_fd=self._home, follow_symlinks=False)
            raw = (self._folder / "journal").read_bytes()
        except FileNotFoundError:
            return False
        found = journal.decode(self.key, raw)
        # Two links: a commit was cut short after it linked the blob, whose inode must never be written again.
        if found is None or (found.size, found.chunk_size) != (self.size, self.chunk_size) or facts.st_nlink != 1 or not stat.S_ISREG(facts.st_mode):
            return False
        if facts.st_size not in (self.size, round_up(self.size)):
            return False
        os.chmod("data", 0o600, dir_fd=self._home)  # a commit may have been cut short after it took the write bit
        self._data = os.open("data", os.O_RDWR | os.O_NOFOLLOW, dir_fd=self._home)
        self._journal = os.open("journal", os.O_RDWR | os.O_NOFOLLOW, dir_fd=self._home)
        os.ftruncate(self._journal, found.length)
        self._chunks, self._lent, self._journal_end = found.chunks, found.lent, found.length
        return True

    def _create(self) -> None:
        """New files with the space reserved in the folder; no folder at all when there is no room."""
        try:
            if os.listdir(self._home):  # noqa: PTH208 - a descriptor has no path; what an earlier run left
                claim.empty(self._home)
            self._data = self._new("data")
            if self.size >= BLOCK:
                preallocate(self._data, round_up(self.size))
            if self.count > 1:
                self._journal = self._new("journal")
                self._append(journal.header(self.key, self.size, self.chunk_size))
                os.fsync(self._home)
                fsync_path(self._folder.parent)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                claim.remove(self._home, self._folder)
            raise

    def _new(self, name: str) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=self._home)

    # -- moving bytes

    def _put(self, offset: int, buffer: memoryview, length: int) -> None:
        """Write a chunk's bytes; the rounded length while direct, the exact one otherwise."""
        done = 0
        while done < length:
            direct = self._direct
            end = round_up(length) if direct else length
            try:
                moved = os.pwrite(self._data, buffer[done:end], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._leave_direct()
                continue
            if direct:
                moved -= moved % BLOCK  # a short write may end inside a block; the next must start on one
            if moved == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += moved
        if not self._direct:
            # Linux starts write-back of the range and drops what is clean: no storm at the next sync, and the page cache stays the pods'.
            os.posix_fadvise(self._data, offset, length, os.POSIX_FADV_DONTNEED)

    def _leave_direct(self) -> None:
        """Go on through the page cache; harmless when another thread did it already."""
        if self._direct:
            log.info("the store's file system refuses direct I/O for an ingest; it goes on through the page cache")
        set_direct(self._data, False)  # before the flag: a thread that sees the flag down must find the descriptor switched
        self._direct = False

    def _append(self, record: bytes) -> None:
        """Add one record; a record written in part is overwritten by the next. The caller holds the lock."""
        if self.count <= 1:
            return
        if os.pwrite(self._journal, record, self._journal_end) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._journal_end += len(record)

    # -- committing

    def _link(self, blob: Path) -> None:
        """Give the data its name among the blobs; durably for a large file. Small ones, of which there may be thousands, are synced when published.

        The folder's lock keeps the collector away (it takes it exclusively), and the fresh ctime of a blob found there restarts its grace period; its
        mtime stays, because copies are known by it (`Blobs.shown`).
        """
        self._must_be_ours(blob.name)
        folder = os.open(blob.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH)
            try:
                os.link("data", blob.name, src_dir_fd=self._home, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                there = os.stat(blob.name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(there.st_mode) and there.st_size == self.size:
                    os.utime(blob.name, ns=(there.st_atime_ns, there.st_mtime_ns), dir_fd=folder, follow_symlinks=False)
                else:
                    os.rename("data", blob.name, src_dir_fd=self._home, dst_dir_fd=folder)
            if self.count > 1:
                os.fsync(folder)
        finally:
            os.close(folder)

    def _must_be_ours(self, sha256: str) -> None:
        """What is about to be linked by its name must be the file that was written and proven."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._data), os.stat("data", dir_fd=self._home, follow_symlinks=False)):
                return
        raise IntegrityError(Code.DEGRADED, f"cannot commit blob {sha256}: its data was replaced or removed while it was written", retryable=True)

    @contextmanager
    def _or_spoil(self, doing: str) -> Iterator[None]:
        """A failed sync spoils the ingest: the kernel counts the lost pages as clean, the next sync succeeds, and no earlier write is to be believed.

        The journal is removed, so that not even a restart believes it.
        """
        with disk_errors(f"{doing} the ingest {self.key}"):
            try:
                yield
            except OSError:
                self._spoiled = True
                with suppress(OSError):  # the failed sync is the error to tell
                    os.unlink("journal", dir_fd=self._home)
                raise


def discard(layout: Layout, key: str) -> bool:
    """Remove the ingest of `key` and give its space back: True when there is none any more. Raises `DiskError`.

    One that some task has open is left alone, without waiting: False. It is idle once that task ends, to be discarded then or by the next sweep.
    """
    folder = layout.ingest_dir(key)
    with disk_errors(f"discard the ingest {key}"), suppress(FileNotFoundError):
        home = claim.try_claim(folder)
        if home is None:
            return False
        try:
            claim.remove(home, folder)
        finally:
            os.close(home)
    return True


def kept_bytes(layout: Layout, key: str) -> int:
    """How many bytes of `key` an earlier run recorded; 0 when there is none. Raises `DiskError`."""
    with disk_errors(f"read the journal of the ingest {key}"):
        try:
            found = journal.decode(key, (layout.ingest_dir(key) / "journal").read_bytes())
        except FileNotFoundError:
            return 0
    return found.kept if found else 0


def seed(layout: Layout, key: str, source: Path, size: int, good: Mapping[int, int], *, chunk_size: int = CHUNK, direct: bool = True) -> None:
    """Prepare a repair: an ingest of `key` that already has the good chunks (index → XXH3-64) of the damaged file `source`.

    The bytes are shared with `source` where the file system can (FICLONE), else only the good chunks are copied: a bad one may not be readable.
    What an earlier fill left of `key` goes; one that is under way is waited for as by `Ingest.open`. Raises `SpaceError`, `DiskError`.
    """
    ingest = Ingest.open(layout, key, size, chunk_size=chunk_size, direct=direct, resume=False)
    try:
        with disk_errors(f"copy {source.name} for its repair"):
            fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _clone(fd, layout.ingest_dir(key) / "data", size):
                    for index, digest in good.items():
                        ingest.adopt(index, digest)
                else:
                    set_direct(fd, direct)
                    _copy(fd, ingest, good)
            finally:
                os.close(fd)
        ingest.sync()
    finally:
        ingest.close()


def _clone(source: int, path: Path, size: int) -> bool:
    """Share the extents of `source`; False where the file system cannot, with the space reserved again."""
    if os.fstat(source).st_size != size:
        return False
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.ftruncate(fd, 0)  # a clone that ends inside a block must end the file
        try:
            fcntl.ioctl(fd, _FICLONE, source)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL):
                raise
            preallocate(fd, round_up(size))
            return False
    finally:
        os.close(fd)
    return True


def _copy(source: int, ingest: Ingest, good: Mapping[int, int]) -> None:
    buffer = memoryview(aligned_buffer(round_up(ingest.chunk_size)))
    for index, digest in good.items():
        length = ingest.length_of(index)
        read_at(source, index * ingest.chunk_size, buffer, length)
        ingest.write(index, buffer, length, digest)
