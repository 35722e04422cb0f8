"""Walks below an open directory without following links, and removes what stands in the way. It knows nothing of what the directories hold."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def descend(root: int, folder: str, *, make: bool = True, sync: bool = False) -> Iterator[int]:
    """The directory `folder` ("a/b", or "") below the open directory `root`, following no link; see `enter` for `make`. Raises OSError."""
    fd = os.dup(root)
    try:
        for name in folder.split("/") if folder else ():
            below = enter(fd, name, sync=sync) if make else os.open(name, DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def enter(parent: int, name: str, *, sync: bool = False) -> int:
    """Open a directory in `parent`, made if it is not there, 0755 whatever the umask; anything else of that name is removed.

    `sync` makes the new name survive a power cut at once. Raises OSError.
    """
    try:
        return os.open(name, DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        os.unlink(name, dir_fd=parent)
    os.mkdir(name, 0o755, dir_fd=parent)
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        os.fchmod(fd, 0o755)
        if sync:
            os.fsync(parent)
    except OSError:
        os.close(fd)
        raise
    return fd


def is_directory(name: str, parent: int) -> bool:
    """Whether `name` in the open directory `parent` is a directory, not a link to one. Raises OSError."""
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def read_if_there(path: Path) -> bytes | None:
    """The content of a file, None without one. Raises OSError."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def children_of(folder: Path) -> list[Path]:
    """What is in a directory, in order; nothing when there is none. Raises OSError."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def drop_link(path: Path) -> None:
    """Remove `path` if it is a symlink: where a directory of ours should be, what it points to is not ours to change. Raises OSError."""
    if path.is_symlink():
        path.unlink()


def remove_if_empty(folder: Path) -> None:
    """Remove a directory unless something is in it. Raises OSError."""
    with suppress(FileNotFoundError):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
