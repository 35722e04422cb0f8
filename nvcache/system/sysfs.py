"""What the kernel says of block devices, in /sys and /proc: facts, read in microseconds. No process is started and no disk is read or judged.

A device may go while it is looked at: whatever cannot be read is then empty. Paths: Documentation/ABI/stable/sysfs-block,
Documentation/admin-guide/md.rst and Documentation/filesystems/proc.rst of the kernel.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nvcache.core.disks import DiskFacts, Holder, Mount
from nvcache.core.stripe import ArrayFacts
from nvcache.errors import SPENT, Code, DiskError
from nvcache.system.patience import within

_PATIENCE = 2.0
SECTOR = 512  # sysfs counts in these, whatever the disk's own sectors are
HOST_PIDS = 0xEFFFFFFC  # inode of the first PID namespace: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h
_NAMESPACE = re.compile(r"nvme[0-9]+(c[0-9]+)?n[0-9]+")  # with c: one path of a multipath disk
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


@dataclass(frozen=True, slots=True)
class _Uses:
    """Who uses block devices on this machine, looked up once for all disks."""

    mounts: tuple[tuple[Mount, str], ...]  # with the source's kernel name
    swaps: frozenset[str]
    loops: tuple[tuple[str, str], ...]  # loop device, kernel name of the device it reads


class Kernel:
    """The kernel's view of the machine. The folders are parameters so that a container can name the host's.

    Every call raises `DiskError` (disk-io) when files cannot be opened at all: a view without them would show disks that vanished.
    """

    def __init__(self, *, sys: Path = Path("/sys"), proc: Path = Path("/proc"), dev: Path = Path("/dev"), run: Path = Path("/run")) -> None:
        self.sys = sys
        self.proc = proc
        self.dev = dev
        self.run = run
        self._block = sys / "class/block"

    def disks(self) -> tuple[DiskFacts, ...]:
        """Every NVMe namespace, by name, hidden ones too; what only opening the disk can tell is left None."""
        lines = self._mountinfo()
        sources = {source: self._name_of(source) for source in {source for _, source in lines if source.startswith("/")}}
        mounts = tuple((mount, sources.get(source, "")) for mount, source in lines)
        uses = _Uses(mounts, frozenset(map(self._name_of, self.swaps())), self.loops())
        listed = self._vendor_list()
        return tuple(self._disk(name, uses, listed) for name in self._names() if _NAMESPACE.fullmatch(name))

    def arrays(self) -> tuple[ArrayFacts, ...]:
        """Every md array that exists, inactive ones too. `uuid` and `label` are left None: they are on the members."""
        return tuple(self._array(name) for name in self._names() if (self._block / name / "md").is_dir())

    def mounts(self) -> tuple[Mount, ...]:
        """The host's mounts (those of process 1), or this process's own where the host's cannot be read."""
        return tuple(mount for mount, _ in self._mountinfo())

    def own_mounts(self) -> tuple[Mount, ...]:
        """The mounts that this process sees."""
        return tuple(mount for mount, _ in parse_mountinfo(_bytes(self.proc / "self/mountinfo")))

    def host_mounts(self) -> tuple[Mount, ...] | None:
        """The host's mounts; None in a container, where process 1 is none of the host's and its mounts tell nothing of the node."""
        try:
            return self.mounts() if (self.proc / "self/ns/pid").stat().st_ino == HOST_PIDS else None
        except OSError:
            return None

    def swaps(self) -> tuple[str, ...]:
        """Paths of the devices and files in use as swap."""
        lines = _bytes(self.proc / "swaps").splitlines()[1:]
        return tuple(_unescape(line.split()[0]) for line in lines if line.strip())

    def loops(self) -> tuple[tuple[str, str], ...]:
        """Loop devices that read another block device: their names, and that device's kernel name."""
        files = [(name, _text(self._block / name / "loop/backing_file")) for name in self._names() if name.startswith("loop")]
        return tuple((name, self._name_of(path)) for name, path in files if self._name_of(path))

    def device(self, node: str) -> tuple[str, str, int] | None:
        """Kernel name, major:minor and size in bytes of the block device at `node` (links are followed); None when there is none."""
        try:  # a path that another process chose may lie on a disk that hangs
            found = within(_PATIENCE, f"look at {node}", Path(node).stat)
        except (OSError, ValueError, DiskError):
            return None
        if not stat.S_ISBLK(found.st_mode):
            return None
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        name = (self.sys / "dev/block" / number).resolve().name
        return (name, number, self._size(name)) if self._attribute(name, "dev") == number else None

    def knows(self, filesystem: str) -> bool:
        """Whether the kernel has the file system, built in or loaded."""
        return filesystem in (line.split()[-1] for line in _text(self.proc / "filesystems").splitlines() if line.strip())

    def udev_running(self) -> bool:
        """Whether udevd listens on this machine."""
        return (self.run / "udev/control").exists()

    def md_rules(self) -> bool:
        """Whether udevd runs and has the rules for md, so that mdadm may leave making the links to it. Asks the host's root where it can."""
        if not self.udev_running():
            return False
        root = self.proc / "1/root"
        base = root if os.access(root / "usr", os.R_OK) else Path("/")
        return any(list((base / folder / "udev/rules.d").glob("*md-raid-arrays.rules")) for folder in ("usr/lib", "lib", "etc", "run"))

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._block))  # noqa: PTH208 - names are what is wanted
        except OSError as error:
            _gone(error)
            return []

    def _attribute(self, name: str, attribute: str) -> str:
        return _text(self._block / name / attribute)

    def _size(self, name: str) -> int:
        return _number(self._attribute(name, "size")) * SECTOR

    def _disk(self, name: str, uses: _Uses, listed: frozenset[str] | None) -> DiskFacts:
        partitions = self._partitions(name)
        family = (name, *partitions)
        node, number = str(self.dev / name), self._attribute(name, "dev")
        return DiskFacts(
            name=name,
            node=node,
            number=number,
            size=self._size(name),
            model=self._attribute(name, "device/model"),
            serial=self._attribute(name, "device/serial"),
            transport=self._transport(name),
            partition=(self._block / name / "partition").exists(),
            hidden=self._attribute(name, "hidden") == "1",
            read_only=self._attribute(name, "ro") == "1",
            removable=self._attribute(name, "removable") == "1",
            partitions=partitions,
            holders=tuple(self._holder(holder, uses) for holder in _unique(held for part in family for held in self._entries(part, "holders"))),
            mounts=self._points(family, uses),
            swap=not uses.swaps.isdisjoint(family),
            loop=next((loop for loop, backing in uses.loops if backing in family), None),
            vendor_listed=None if listed is None else name in listed,
        )

    def _transport(self, name: str) -> str:
        """The controller's; the namespace of a multipath disk hangs on a subsystem instead, whose controllers are asked."""
        device = self._block / name / "device"
        own = _text(device / "transport")
        return own or ",".join(sorted({_text(path) for path in device.glob("nvme*/transport")}))

    def _partitions(self, name: str) -> tuple[str, ...]:
        return tuple(entry for entry in self._entries(name, ".") if entry.startswith(name) and (self._block / name / entry / "partition").exists())

    def _entries(self, name: str, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._block / name / folder))  # noqa: PTH208 - names are what is wanted
        except OSError as error:
            _gone(error)
            return []

    def _holder(self, name: str, uses: _Uses) -> Holder:
        above = self._above(name)
        mounts = (*self._points(above, uses), *(("[SWAP]",) if not uses.swaps.isdisjoint(above) else ()))  # as lsblk writes it
        if (self._block / name / "md").is_dir():
            uuid = self._attribute(name, "md/uuid")
            return Holder(name, "md", identity=uuid if uuid.strip("0-") else None, mounts=mounts)  # all zeros while inactive
        mapping = self._attribute(name, "dm/name") or None
        return Holder(name, "dm" if mapping else "other", identity=mapping, label=mapping, mounts=mounts)

    def _above(self, name: str) -> tuple[str, ...]:
        """The device, its partitions and everything built on them, in depth."""
        found: list[str] = []
        todo = [name]
        while todo:
            device = todo.pop(0)
            if device not in found:
                found.append(device)
                todo += [*self._partitions(device), *self._entries(device, "holders")]
        return tuple(found)

    def _points(self, names: tuple[str, ...], uses: _Uses) -> tuple[str, ...]:
        """Where any of the devices is mounted: known by its number, or by its source where the file system has a number of its own (btrfs)."""
        numbers = {self._attribute(name, "dev") for name in names} - {""}
        return tuple(_unique(mount.point for mount, source in uses.mounts if mount.number in numbers or source in names))

    def _array(self, name: str) -> ArrayFacts:
        members = [entry.removeprefix("dev-").replace("!", "/") for entry in self._entries(name, "md") if entry.startswith("dev-")]
        faulty = [member for member in members if "faulty" in self._attribute(name, f"md/dev-{member}/state").split(",")]
        return ArrayFacts(
            name=name,
            node=str(self.dev / name),
            number=self._attribute(name, "dev"),
            state=self._attribute(name, "md/array_state"),
            level=self._attribute(name, "md/level"),
            members=tuple(members),
            raid_disks=_number(self._attribute(name, "md/raid_disks").split(" ")[0]),
            faulty=tuple(faulty),
        )

    def _mountinfo(self) -> list[tuple[Mount, str]]:
        return parse_mountinfo(_bytes(self.proc / "1/mountinfo") or _bytes(self.proc / "self/mountinfo"))

    def _name_of(self, path: str) -> str:
        """The kernel name of the block device that a path from another mount namespace means; empty when it means none."""
        inside = path.startswith("/dev/")
        device = self.device(str(self.dev / path.removeprefix("/dev/")) if inside else path)
        if device is not None:
            return device[0]
        name = Path(path).name
        return name if inside and (self._block / name).exists() else ""

    def _vendor_list(self) -> frozenset[str] | None:
        """The disks that Azure's udev rules name as local, or None where there are no such rules."""
        folder = self.dev / "disk/azure/local"
        return frozenset(link.resolve().name for link in folder.rglob("*") if link.is_symlink()) if folder.is_dir() else None


def parse_mountinfo(text: bytes) -> list[tuple[Mount, str]]:
    """The mounts in /proc/PID/mountinfo, lowest layer first, each with its source; lines of another form are passed over."""
    found = []
    for line in text.splitlines():
        fields = line.split(b" ")
        dash = fields.index(b"-", 6) if b"-" in fields[6:] else len(fields)
        if len(fields) < dash + 4:
            continue
        number, root, point, own = (_unescape(field) for field in fields[2:6])
        kind, source, extra = (_unescape(field) for field in fields[dash + 1 : dash + 4])
        found.append((Mount(number, point, kind, root, (*own.split(","), *extra.split(","))), source))
    return found


def _unescape(raw: bytes) -> str:
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), raw).decode("utf-8", "replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _gone(error)
        return b""


def _gone(error: OSError) -> None:
    """Let pass what a device that goes makes of a read. Raises `DiskError` (disk-io) for what says nothing about a device."""
    if errno.errorcode.get(error.errno or 0) in SPENT:
        raise DiskError(Code.DISK_IO, f"cannot look at the machine: {error.strerror}") from error


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace").strip()


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
