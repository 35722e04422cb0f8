"""A local directory as a source: lists its files and reads them back, provided that they stay as they were listed. It copies and changes nothing.

Regular files are taken, symbolic links followed (a HuggingFace snapshot consists of them). Names that begin with a dot (`.git/`, `.cache/`,
`.gitattributes`) are left out. A `SHA256SUMS` file at the top, in the format of sha256sum, gives digests.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from nvcache.core.digest import Digest
from nvcache.core.plan import RemoteFile
from nvcache.core.published import LIMIT, SUMS, parse_sums
from nvcache.core.ref import Ref
from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.base import FileRemote, Reader, ReaderFactory, Resolved

MAX_FILES = 100_000
MAX_FOLDERS = 5_000  # links to folders can multiply them without end
PIECE = 4 * 2**20  # bytes per read, so that an abort is heeded soon
Found = tuple[str, os.stat_result, str]  # path below the root, stat, path without links
_log = logging.getLogger(__name__)


class Directory:
    """A `Source` for file:///dir.

    The revision is the SHA-256 of the sorted list of paths, sizes, mtimes and inode numbers, which stay when the same disk is mounted again.
    A file's token also says where it is and when its inode was last changed: two disks whose files are alike otherwise must not be taken for one.
    """

    def resolve(self, ref: Ref) -> Resolved:
        """The revision of the directory as it is now. Raises `SourceError` (revision-not-found) if `ref` is pinned to another."""
        revision, _ = _listing(ref)
        if ref.revision not in (None, revision):
            raise SourceError(
                Code.REVISION_NOT_FOUND,
                f"cannot resolve {ref}: the directory has changed, it is at revision {revision} now",
                hint="ask again without a revision, or bring the files back as they were (sizes and times too)",
            )
        return Resolved(ref.at(revision), None, ref.base)

    def list(self, resolved: Resolved) -> tuple[RemoteFile, ...]:
        """The files, by path. Raises `SourceError` (source-changed) if they are not those of the revision any more."""
        revision, files = _listing(resolved.ref)
        if revision != resolved.ref.revision:
            raise SourceError(Code.SOURCE_CHANGED, f"cannot list {resolved.ref}: the directory has changed since it was resolved")
        return files

    def refuse(self, resolved: Resolved, file: RemoteFile) -> None:
        """Nothing is refused that was listed."""

    def locate(self, resolved: Resolved, file: RemoteFile) -> FileRemote:
        """The path of `file`; nothing is looked up."""
        return FileRemote(f"{resolved.ref.location}/{file.path}", file.size, file.token, file.path)


def file_readers(remote: FileRemote) -> ReaderFactory:
    """Readers of one local file."""

    def make() -> Reader:
        return FileReader(remote)

    return make


class FileReader:
    """A `Reader` of a local file, opened at the first read. What it reads is not left in the page cache."""

    def __init__(self, remote: FileRemote) -> None:
        self._remote = remote
        self._aborted = threading.Event()
        self._fd = -1
        self._real = ""  # where the path led when it was opened
        self.received = 0

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`. The file is compared with its listing when it is opened and after every read.

        Raises `SourceError`: source-changed, file-not-found, source-forbidden, source-failed (the disk); `Interrupted`.
        """
        try:
            if self._fd < 0:
                self._real = os.path.realpath(self._remote.path)
                self._fd = os.open(self._remote.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in the file's place must not block
                self._check()
            at = 0
            while at < len(into):
                if self._aborted.is_set():
                    raise Interrupted(Code.CANCELLED, f"cannot read {self._remote.name}: cancelled")
                got = os.preadv(self._fd, [into[at : at + PIECE]], offset + at)
                if got == 0:
                    raise self._changed("it is shorter than listed")
                at += got
                self.received += got
            os.posix_fadvise(self._fd, offset, len(into), os.POSIX_FADV_DONTNEED)
            self._check()
        except OSError as error:
            raise _failure(error, f"read {self._remote.path}") from error

    def abort(self) -> None:
        """Make reads raise `Interrupted`, a running one after its current piece."""
        self._aborted.set()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check(self) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != self._remote.size or _token(found, self._real) != self._remote.token:
            raise self._changed("its size, times, inode or place is another")

    def _changed(self, why: str) -> SourceError:
        return SourceError(Code.SOURCE_CHANGED, f"cannot read {self._remote.path}: it changed after it was listed: {why}")


def _listing(ref: Ref) -> tuple[str, tuple[RemoteFile, ...]]:
    """The revision, and every file with its digest, if there is one, sorted by path."""
    root = Path(ref.location)
    doing = f"list {ref.base}"
    try:
        if not stat.S_ISDIR(root.stat().st_mode):
            raise SourceError(Code.REPOSITORY_NOT_FOUND, f"cannot {doing}: it is not a directory", hint="name the directory that holds the files")
        sums = _sums(root, doing)
        found = sorted(_walk(root, doing))
    except OSError as error:
        raise _failure(error, doing) from error
    listed = tuple(RemoteFile(path, facts.st_size, _token(facts, real), sums.get(path)) for path, facts, real in found)
    missing = sorted(path for path in sums.keys() - {file.path for file in listed} if not path.startswith(".") and "/." not in path)
    if missing:
        raise SourceError(Code.FILE_NOT_FOUND, f"cannot {doing}: {SUMS} names {missing[0]!r}, which is not there", hint=f"correct or remove {SUMS}")
    return _revision(found), listed


def _walk(root: Path, doing: str) -> Iterator[Found]:
    """Every file. A link to a folder that it is in is left out, and so are sockets, pipes and devices."""
    folders: list[tuple[Path, str, frozenset[tuple[int, int]]]] = [(root.resolve(), "", frozenset())]
    visited = files = 0
    while folders:
        folder, prefix, above = folders.pop()
        here = folder.stat()
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            _log.info("left out of %s: %s leads back to a folder that it is in", root, prefix)
            continue
        visited += 1
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if visited > MAX_FOLDERS or files >= MAX_FILES:
                    why = f"it has more than {MAX_FILES:,} files or {MAX_FOLDERS:,} folders"
                    raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {why}", retryable=False)
                facts = _stat(entry, prefix, doing)
                if stat.S_ISDIR(facts.st_mode):
                    folders.append((Path(entry.path).resolve(), f"{prefix}{entry.name}/", above | {identity}))
                elif stat.S_ISREG(facts.st_mode):
                    files += 1
                    yield f"{prefix}{entry.name}", facts, os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                else:
                    _log.info("left out of %s: %s%s is neither a file nor a folder", root, prefix, entry.name)


def _stat(entry: os.DirEntry[str], prefix: str, doing: str) -> os.stat_result:
    """What `entry`, or what it links to, is. A model that lacks a file must not pass for a whole one, so a dangling link is an error."""
    try:
        return entry.stat()
    except FileNotFoundError:
        what = f"{prefix}{entry.name} is a dangling link, or was removed just now"
        raise SourceError(Code.FILE_NOT_FOUND, f"cannot {doing}: {what}", hint="complete the directory, or remove the link") from None


def _sums(root: Path, doing: str) -> dict[str, Digest]:
    """The digests in `SHA256SUMS`, by path; none if there is no such file."""
    path = root / SUMS
    if not path.is_file():
        return {}
    if path.stat().st_size > LIMIT:
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {SUMS} is longer than {LIMIT >> 20} MiB", retryable=False)
    try:
        return parse_sums(path.read_bytes())
    except ValueError as error:
        hint = f"write it with: sha256sum FILE… > {SUMS}"
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {error}", hint=hint, retryable=False) from None


def _token(facts: os.stat_result, real: str) -> str:
    """What is another for every file of the node, and changes when its content does, even if the other times are put back (nobody can set a ctime).

    `real` is the path without links: two hard links may have two digests in `SHA256SUMS`.
    """
    identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, real)
    return f"file-{hashlib.sha256(repr(identity).encode()).hexdigest()}"


def _revision(files: list[Found]) -> str:
    digest = hashlib.sha256()
    for path, facts, _ in files:
        stamp = f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"
        digest.update(f"{path}\0{facts.st_size}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _failure(error: OSError, doing: str) -> SourceError:
    """An error of the file system, which names the path it is about."""
    why = f"{error.filename}: {error.strerror}" if error.filename and str(error.filename) not in doing else error.strerror
    match error:
        case FileNotFoundError() | NotADirectoryError():
            code = Code.REPOSITORY_NOT_FOUND if doing.startswith("list") else Code.FILE_NOT_FOUND
        case PermissionError():
            code = Code.SOURCE_FORBIDDEN
        case _:
            code = Code.SOURCE_FAILED
    hints = {
        Code.REPOSITORY_NOT_FOUND: "the directory must exist on the node, where the daemon runs",
        Code.SOURCE_FORBIDDEN: "the daemon's user must be able to read it",
    }
    return SourceError(code, f"cannot {doing}: {why}", hint=hints.get(code))
