"""What lies under a file: its file system, and how much its device takes in one request. It opens and reads no file of a model."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

STEP = 128 * 2**10  # the kernel's default read-ahead
LARGEST_STEP = 2 * 2**20  # the kernel itself goes in steps of 2 MiB (mm/readahead.c, force_page_cache_ra)
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "9p", "virtiofs", "fuse", "fuseblk")
MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


@dataclass(frozen=True)
class Place:
    """A mounted file system. `step` is how many bytes one request for read-ahead may name before the kernel cuts it short."""

    kind: str
    source: str
    point: str
    step: int = STEP

    @property
    def in_memory(self) -> bool:
        """Whether its files are in memory in any case."""
        return self.kind in MEMORY

    @property
    def doubt(self) -> str | None:
        """Why prefetching may not do here what it does on a local disk; None where it does."""
        if self.in_memory:
            return f"the files lie on {self.kind}, which is memory already"
        if self.kind.partition(".")[0] in NETWORK:
            return f"the files lie on {self.kind} ({self.source} at {self.point}), not on a local disk: its server sets the pace"
        if self.kind == "overlay":
            return f"the files lie on overlay at {self.point}, a container's own file system, and not on a mounted volume: the OS disk sets the pace"
        return None


UNKNOWN = Place("", "", "")


def place(handle: int, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Place:
    """Where an open file lies: its mount's line in the mount table (proc_pid_fdinfo(5), proc_pid_mountinfo(5)) and its device's queue.

    `UNKNOWN` where /proc does not say.
    """
    device = os.fstat(handle).st_dev
    step = _step(sys / f"dev/block/{os.major(device)}:{os.minor(device)}")
    try:
        about = (proc / f"self/fdinfo/{handle}").read_bytes()
        mounts = (proc / "self/mountinfo").read_bytes()
    except OSError:
        return replace(UNKNOWN, step=step)
    mount = re.search(rb"^mnt_id:\s*(\d+)$", about, re.MULTILINE)
    for line in mounts.split(b"\n"):  # names may hold any other byte
        left, _, right = line.partition(b" - ")
        if mount and left.startswith(mount[1] + b" "):
            kind, source = right.split(b" ")[:2]
            return Place(os.fsdecode(kind), _plain(source), _plain(left.split(b" ")[4]), step)
    return replace(UNKNOWN, step=step)


def _plain(text: bytes) -> str:
    """Without the octal escapes of blanks and backslashes, and fit to be shown."""
    found = re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8) & 0xFF]), text)
    return found.decode(errors="backslashreplace")


def _step(device: Path) -> int:
    """The larger of a queue's read-ahead and largest request: what WILLNEED is cut down to. A partition has its disk's queue."""
    sizes = [STEP]
    for queue in (device / "queue", device.resolve().parent / "queue"):
        for name in ("read_ahead_kb", "max_sectors_kb"):
            with suppress(OSError, ValueError):  # no device behind it, or sysfs is not shown to this container
                sizes.append(int((queue / name).read_text()) << 10)
        if len(sizes) > 1:
            break
    return min(max(sizes), LARGEST_STEP)
