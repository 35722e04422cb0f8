"""What the kernel says of a directory that is to hold the store: the facts for `core.directory`. It makes nothing and judges nothing."""

from __future__ import annotations

import os
from pathlib import Path

from nvcache.core.directory import DirectoryFacts, holding, neighbours
from nvcache.errors import Code, DiskError
from nvcache.system.patience import within
from nvcache.system.sysfs import Kernel

_SECONDS = 10.0


def directory_facts(kernel: Kernel, path: Path) -> DirectoryFacts:
    """The facts of `path`; of its parent's mount when only the last part is missing. Raises `DiskError`: disk-io, disk-stalled."""

    def look() -> DirectoryFacts:
        there = path if path.exists() else path.parent
        if not there.is_dir():
            return DirectoryFacts(str(path), None)
        real = os.path.realpath(path)
        own = kernel.own_mounts()  # not the host's: in a container the path means another place there
        mount = holding(own, os.path.realpath(there))
        if mount is None:
            return DirectoryFacts(str(path), real)
        room = os.statvfs(there)
        entries = tuple(sorted(os.listdir(path))) if path.is_dir() else ()  # noqa: PTH208 - names are what is wanted
        return DirectoryFacts(
            path=str(path),
            real=real,
            mount=mount,
            beside=neighbours(mount, own, kernel.host_mounts()),
            entries=tuple(name for name in entries if name != "lost+found"),
            ours="format.json" in entries,
            free=room.f_bavail * room.f_frsize,
            total=room.f_blocks * room.f_frsize,
        )

    try:
        return within(_SECONDS, f"look at {path}", look)
    except OSError as error:
        raise DiskError(Code.DISK_IO, f"cannot look at {path}: {error.strerror}") from error
