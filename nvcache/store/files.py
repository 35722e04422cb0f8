"""The durable write and its helpers: fsync, preallocation, direct I/O, error mapping. It knows nothing of what is stored."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nvcache.errors import Code, DiskError, SpaceError

BLOCK = 4096  # offsets, lengths and addresses of direct I/O are multiples of it
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

# Not os.posix_fallocate: where the file system has no fallocate(2), glibc emulates it by writing to every block.
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Map what the operating system raises inside: no room → `SpaceError` (disk-full), anything else → `DiskError` (disk-io).

    `doing` completes "cannot …", for instance "write the manifest of X".
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in NO_SPACE:
            raise SpaceError(Code.DISK_FULL, f"cannot {doing}: {why}") from error
        raise DiskError(Code.DISK_IO, f"cannot {doing}: {why}", facts={"errno": errno.errorcode.get(error.errno or 0, "unknown")}) from error


def durable_write(path: Path, data: bytes, mode: int = 0o644, *, temp: Path | None = None) -> None:
    """Replace `path` by `data`, so that after any crash it is the old file or the new one, whole.

    The half-written file lies in `temp`, a directory on the same file system, else beside `path` under a name starting with ".tmp-".
    Raises `SpaceError` and `DiskError`.
    """
    half = (temp or path.parent) / f".tmp-{secrets.token_hex(8)}"
    with disk_errors(f"write {path}"):
        fd = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            try:
                write_all(fd, data)
                os.fchmod(fd, mode)
                os.fsync(fd)
            finally:
                os.close(fd)
            half.rename(path)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                half.unlink()
            raise
        fsync_path(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` at the descriptor's position. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def fsync_dir(path: Path) -> None:
    """Make names made, moved or removed in a directory survive a power cut. Raises `DiskError`."""
    with disk_errors(f"sync directory {path}"):
        fsync_path(path)


def make_dir(path: Path, mode: int = 0o755) -> None:
    """Make a directory, or keep the one that is there; its mode is exactly `mode`, whatever the umask. Raises OSError."""
    with suppress(FileExistsError):
        path.mkdir(mode)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_mode & 0o7777 != mode:
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


def preallocate(fd: int, size: int) -> None:
    """Give the file `size` bytes of the disk for certain, so that no later write inside can run out of room.

    Where the file system cannot promise that, the file only gets its length, after a look at the free space. On failure the file is emptied.
    Raises `SpaceError` (disk-full) with the numbers, `DiskError`.
    """
    if size == 0:
        return
    while _fallocate(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        free = free_bytes(fd)
        if code in _NOT_SUPPORTED and free >= size:
            os.ftruncate(fd, size)
            return
        os.ftruncate(fd, 0)  # ext4 keeps what it found before it ran out
        if code in NO_SPACE | _NOT_SUPPORTED:
            numbers = {"need": size, "free": free}
            raise SpaceError(Code.DISK_FULL, f"cannot reserve {size:,} bytes: the file system has {free:,} bytes free", facts=dict(numbers))
        raise DiskError(Code.DISK_IO, f"cannot reserve {size:,} bytes: {os.strerror(code)}")


def free_bytes(fd: int) -> int:
    """What an ordinary user may still write to the file system of `fd`, in bytes. Raises OSError."""
    room = os.fstatvfs(fd)
    return room.f_bavail * room.f_frsize


def set_direct(fd: int, on: bool) -> bool:
    """Switch O_DIRECT on an open file; False when the file system refuses it.

    Switching after the open keeps creation simple: some file systems create the file and then fail open(O_CREAT | O_DIRECT).
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def read_at(fd: int, offset: int, buffer: memoryview, length: int) -> None:
    """Fill `buffer` with `length` bytes from `offset`, reading whole blocks (up to the end of the buffer).

    A file that refuses direct I/O only now is switched to the page cache. Raises OSError; EIO where the file ends too early.
    """
    done, end = 0, round_up(length)
    while done < length:
        direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        try:
            moved = os.preadv(fd, [buffer[done:end]], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            set_direct(fd, False)
            continue
        if moved == 0:
            raise OSError(errno.EIO, "the file ends too early")
        done += moved


def aligned_buffer(size: int) -> mmap.mmap:
    """`size` bytes of private memory that starts on a page, as direct I/O wants it."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def round_up(length: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def fsync_path(path: Path) -> None:
    """`fsync_dir` for use inside `disk_errors`. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
