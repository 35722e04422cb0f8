"""Makes and mounts a file system on the stripe, and tells who uses it. It chooses nothing and never erases what it was not told to."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nvcache.core.disks import NAME, Blkid
from nvcache.errors import Code, DiskError
from nvcache.system.patience import within
from nvcache.system.probe import blkid
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel, parse_mountinfo

OPTIONS = "noatime,nodev,nosuid"
_SHOWN = 10  # processes named at most
_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS of linux/fs.h on 64-bit machines; the value is an int
_IMMUTABLE = 0x10  # FS_IMMUTABLE_FL

log = logging.getLogger(__name__)


def make(tools: Tools, node: str, kind: str, *, striped: bool) -> None:
    """Make a file system (xfs or ext4) labelled nvcache on `node`, which is blank, without a discard.

    Raises `DiskError`: disks-refused when something is there, tool-missing, tool-failed, tool-stalled, disk-stalled.
    """
    seen = blkid(tools, node)  # mkfs.ext4 asks nobody when its input is no terminal, and mkfs.xfs knows fewer formats than blkid
    if seen.result is not Blkid.NOTHING:
        there = f"{seen.type or seen.table or 'something'} is there" if seen.result is not Blkid.FAILED else seen.why
        raise DiskError(Code.DISKS_REFUSED, f"cannot make a file system on {node}: {there}")
    if kind == "ext4":
        tools.run("mkfs.ext4", "-q", "-m", "0", "-L", NAME, "-E", "nodiscard,lazy_itable_init=1", node, timeout=120)
        return
    # XFS would warn about a log stripe as large as md's chunk, and take 32 KiB anyway.
    tools.run("mkfs.xfs", "-q", "-K", "-L", NAME, *(("-l", "su=32k") if striped else ()), node, timeout=120)


def mount(tools: Tools, node: str, point: str, kind: str) -> None:
    """Mount `node` at the directory `point`. Raises `DiskError`: tool-missing, tool-failed, tool-stalled."""
    tools.run("mount", "-t", kind, "-o", OPTIONS, node, point, timeout=120)


def unmount(tools: Tools, point: str, *, lazy: bool = False, timeout: float = 60) -> None:
    """Unmount what is at `point`; `lazy` takes it out of sight at once, and the kernel lets go when its last user does.

    Raises `DiskError`: tool-missing, tool-failed (somebody uses it), tool-stalled.
    """
    tools.run("umount", *(("--lazy",) if lazy else ()), point, timeout=timeout)


def seal(point: Path, *, sealed: bool) -> None:
    """Have an empty mount point refuse whatever anybody, root too, would put there while nothing is mounted on it; or no longer.

    A container runtime makes the source of a bind mount that is missing, on the disk below. Mounting on such a directory is not affected
    (ioctl_iflags(2)). Where the file system below has no such flag it is done without.
    """
    try:
        handle = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:  # it is not there, or is a link or a file: then it is no mount point of ours
        log.debug("%s is not sealed: %s", point, error)
        return
    try:
        if os.fstat(handle).st_dev != point.parent.stat().st_dev or (sealed and os.listdir(handle)):  # noqa: PTH208 - of a descriptor
            return  # something is mounted there, or somebody's files are
        (flags,) = struct.unpack("i4x", fcntl.ioctl(handle, _GETFLAGS, bytes(8)))
        wanted = flags | _IMMUTABLE if sealed else flags & ~_IMMUTABLE
        if wanted != flags:
            fcntl.ioctl(handle, _SETFLAGS, struct.pack("i4x", wanted))
    except OSError as error:
        log.debug("%s is not sealed: %s", point, error)
    finally:
        os.close(handle)


def holders(proc: Path, number: str, *, seconds: float = 5.0) -> list[str]:
    """Who keeps the device `number` (major:minor) from being let go: "pid name" of processes with files on it open or mapped, at most ten.

    A process whose own mount namespace still has it mounted (a pod with a volume below the mount point) is named once for that namespace.
    What was found so far is returned when the disk keeps the search from ending.
    """
    found: list[str] = []

    def search() -> None:
        seen = {_namespace(proc / "1"), _namespace(proc / "self"), ""}
        for pid in sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()):
            process = proc / str(pid)
            namespace = _namespace(process)
            if number in _devices(process):
                found.append(f"{pid} {_name(process)}")
            elif namespace not in seen and number in _mounted(process):
                found.append(f"{pid} {_name(process)} (in its mount namespace)")
            seen.add(namespace)
            if len(found) == _SHOWN:
                return

    try:
        within(seconds, f"search for users of {number}", search)
    except DiskError as error:
        log.warning("%s", error)
    return found[:]


def modprobe(tools: Tools, module: str) -> None:
    """Load a kernel module. That it cannot be loaded is only logged: it may be built in, and who needs it will say so.

    Raises `DiskError` (tool-stalled).
    """
    try:
        tools.run("modprobe", module, quiet=True)
    except DiskError as error:
        if error.code is Code.TOOL_STALLED:
            raise
        log.info("the kernel module %s was not loaded, which is fine if it is built in: %s", module, error)


def settle(tools: Tools, kernel: Kernel, timeout: int = 30) -> None:
    """Let udevd finish what it has begun, for `timeout` seconds at most; nothing where there is none. Raises `DiskError` (tool-stalled)."""
    if not kernel.udev_running():
        return
    try:
        tools.run("udevadm", "settle", f"--timeout={timeout}", timeout=timeout + 5, quiet=True)
    except DiskError as error:
        if error.code is Code.TOOL_STALLED:
            raise
        log.info("udev did not settle: %s", error)


def _devices(process: Path) -> Iterator[str]:
    """Device numbers of what a process uses; a process that ends while it is looked at uses nothing."""
    for place in ("cwd", "root", "exe"):
        with suppress(OSError):
            yield _number((process / place).stat().st_dev)
    with suppress(OSError):
        for entry in (process / "fd").iterdir():
            with suppress(OSError):
                yield _number(entry.stat().st_dev)
    with suppress(OSError):
        for line in (process / "maps").read_bytes().splitlines():
            major, _, minor = line.split()[3].partition(b":")
            yield f"{int(major, 16)}:{int(minor, 16)}"


def _mounted(process: Path) -> set[str]:
    try:
        return {mount.number for mount, _ in parse_mountinfo((process / "mountinfo").read_bytes())}
    except OSError:
        return set()


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns/mnt")  # noqa: PTH115 - the text is what is wanted
    except OSError:
        return ""


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
