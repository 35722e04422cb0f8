"""One run at a time: the locks in the run directory. They keep nvcaches from each other and nobody else from the disks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nvcache.engine import clock
from nvcache.errors import Code, DiskError
from nvcache.system.flock import take_lock

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # how a folder is opened that somebody else could replace
KEEPER_LOCK = "watch.lock"  # in the run directory; held by the keeper for as long as it runs
DISKS_LOCK = "lock"  # beside it; held by whoever changes the disks, the keeper too
_ME = secrets.token_hex(8)  # this process: in another container somebody may have the same number


@contextmanager
def run_lock(path: Path, doing: str, *, patience: float = 0.0, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """One holder at a time on this node; a lock that is taken is tried for again for `patience` seconds, and whoever waits is told by `say`.

    Raises `DiskError`: disks-busy naming the process that has it, disks-refused, disk-io.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            folder = os.open(path.parent, FOLDER)
            opened.callback(os.close, folder)
            if os.fstat(folder).st_uid not in (0, os.geteuid()):  # whoever made it could have this process write anywhere
                raise DiskError(Code.DISKS_REFUSED, f"cannot {doing}: {path.parent} belongs to another user", hint=f"remove {path.parent}")
            handle = os.open(path.name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        raise DiskError(Code.DISK_IO, f"cannot {doing}: cannot use {path}: {error.strerror}") from error
    try:
        if not take_lock(handle):
            if patience and say:
                say(f"the process {_holder(handle)} is at the disks: waiting up to {patience:g} s for it")
            if not take_lock(handle, until=clock.monotonic() + patience):
                raise DiskError(Code.DISKS_BUSY, f"cannot {doing}: the process {_holder(handle)} does so just now")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {_ME}".encode(), 0)
        yield
    finally:
        os.close(handle)


def taken_by_another(path: Path) -> bool:
    """Whether another process was the last to have this lock, or has it now; False when nobody can tell. Waits for nothing."""
    with ExitStack() as opened, suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        opened.callback(os.close, handle)
        return _said(handle)[1:] not in ([], [_ME])
    return False


def _holder(handle: int) -> str:
    """The process that says it has the lock."""
    return (_said(handle) or ["?"])[0]


def _said(handle: int) -> list[str]:
    """Number and mark of the last holder; nothing before it wrote them."""
    return os.pread(handle, 32, 0).decode("ascii", "replace").split()
