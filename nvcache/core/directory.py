"""Decides whether a directory that somebody else mounted may hold the store. Pure: it looks at no disk and makes nothing.

Only for `backend = directory` on a node, where a wrong path can fill the OS disk and take the node down; a plain `serve` accepts any directory
that passes the store's own probe.

In a container the node's own mounts cannot be seen. What can be: some files in every container are mounts that the kubelet and the container runtime
make from directories of theirs (`WITNESSES`), so these show the device that those lie on, and where on it. One that lies below a `/var` of its file
system shows the node's root file system. What no witness tells is not assumed: the operator has to allow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from nvcache.core.disk_codes import DiskCode
from nvcache.core.disks import Mount
from nvcache.core.space import human

FORBIDDEN = ("/etc", "/usr", "/var/lib/kubelet", "/var/lib/containerd", "/home", "/proc", "/sys", "/dev", "/boot", "/root")
FILESYSTEMS = frozenset({"xfs", "ext4", "btrfs"})
EVICTION = {"kubelet": 0.10, "container runtime": 0.15}  # kubelet's defaults: nodefs.available, imagefs.available
HOMES = {"kubelet": "/var/lib/kubelet", "container runtime": "/var/lib/containerd"}  # on the host
WITNESSES = {"kubelet": ("/etc/hosts", "/dev/termination-log"), "container runtime": ("/etc/resolv.conf", "/etc/hostname")}  # in a container
_NO_DISK = frozenset({"tmpfs", "ramfs", "devtmpfs", "overlay"})  # a witness there tells nothing: CRI-O keeps some of those files below /run


class Ground(StrEnum):
    """What a directory lies on, as far as that can be told; the words finish a sentence about it."""

    OTHER = "is not on the node's root file system"
    ROOT = "is on the node's root file system"
    CONTAINER = "is in the container's own file system: no directory of the node is mounted there"
    UNKNOWN = "may be on the node's root file system, which cannot be told from inside this container"


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a mount has in common with the node's own files. `sharers` and `unseen` are of EVICTION: who is there for sure, and who perhaps."""

    ground: Ground
    sharers: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DirectoryFacts:
    """What the kernel says of a directory. `path` is as configured, `real` with every link followed, None when it is not there. Sizes in bytes."""

    path: str
    real: str | None
    mount: Mount | None = None  # the mount it lies on, as this process sees it
    beside: Neighbours = Neighbours(Ground.UNKNOWN, unseen=tuple(EVICTION))
    entries: tuple[str, ...] = ()
    ours: bool = False  # it holds a format.json of a store
    free: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class DirectoryRules:
    """What the operator set. Sizes in bytes."""

    allow_os_disk: bool = False
    allow_any_filesystem: bool = False
    max_bytes: int | None = None
    min_free: int = 0


def refused_directory(facts: DirectoryFacts, rules: DirectoryRules) -> tuple[DiskCode, str] | None:
    """The code and the reason for which the directory is not used; None when it may be."""
    if facts.real is None:
        return DiskCode.P01, f"{facts.path} does not exist"
    if of_the_system(facts.real):
        return DiskCode.P01, f"{facts.real} is, holds or lies in a directory of the system"
    if facts.mount is None:
        return DiskCode.P01, f"no mount holds {facts.real}"
    if facts.beside.ground is not Ground.OTHER and not (rules.allow_os_disk and rules.max_bytes):
        return DiskCode.P02, f"{facts.path} {facts.beside.ground}"
    if "ro" in facts.mount.options:
        return DiskCode.P03, f"{facts.mount.point} is mounted read-only"
    if facts.mount.filesystem not in FILESYSTEMS and not rules.allow_any_filesystem:
        return DiskCode.P03, f"{facts.path} is on {facts.mount.filesystem}"
    if facts.entries and not facts.ours:
        return DiskCode.P05, f"{facts.path} holds {facts.entries[0]!r} and no store of nvcache"
    return _too_little(facts, rules)


def neighbours(mount: Mount, own: Sequence[Mount], host: Sequence[Mount] | None) -> Neighbours:
    """Who else is on the file system of `mount`. `own` are the mounts that this process sees, `host` the node's; None where they cannot be seen."""
    if host is not None:
        root = holding(host, "/")
        ground = Ground.UNKNOWN if root is None else Ground.ROOT if root.number == mount.number else Ground.OTHER
        return Neighbours(ground, tuple(who for who, home in HOMES.items() if (at := holding(host, home)) and at.number == mount.number))
    seen = {who: [each for each in own if each.point in places and each.filesystem not in _NO_DISK] for who, places in WITNESSES.items()}
    sharers = tuple(who for who, found in seen.items() if any(each.number == mount.number for each in found))
    return Neighbours(_ground(mount, own, seen.values()), sharers, tuple(who for who, found in seen.items() if not found))


def _ground(mount: Mount, own: Sequence[Mount], witnesses: Iterable[Sequence[Mount]]) -> Ground:
    """In a container."""
    top = holding(own, "/")
    roots = {each.number for found in witnesses for each in found if "/var/" in each.root}
    if top is not None and mount.number == top.number:
        return Ground.CONTAINER if mount.point == "/" else Ground.ROOT  # the runtime's layers are there as well
    if mount.number in roots:
        return Ground.ROOT
    return Ground.OTHER if roots else Ground.UNKNOWN


def holding(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The mount a path lies on: the longest mount point that holds it, the newest of several there."""
    held = [mount for mount in mounts if mount.point in ("/", path) or path.startswith(f"{mount.point}/")]
    longest = max((len(mount.point) for mount in held), default=0)
    return next((mount for mount in reversed(held) if len(mount.point) == longest), None)


def of_the_system(path: str) -> bool:
    """Whether an absolute path is, holds or lies in a directory of the system: nothing may be kept or mounted there."""
    return path == "/" or any(_within(path, place) or _within(place, path) for place in FORBIDDEN)


def _too_little(facts: DirectoryFacts, rules: DirectoryRules) -> tuple[DiskCode, str] | None:
    beside = facts.beside
    if beside.sharers and rules.max_bytes is None:
        return DiskCode.P04, f"{facts.path} shares its file system with the node's {' and '.join(beside.sharers)}: max_bytes must be set"
    if beside.unseen and rules.max_bytes is None:
        why = f"may share its file system with the node's {' and '.join(beside.unseen)}, which cannot be told from inside this container"
        return DiskCode.P04, f"{facts.path} {why}: max_bytes must be set"
    if facts.free < rules.min_free:
        return DiskCode.P04, f"{human(facts.free)} are free at {facts.path}, min_free is {human(rules.min_free)}"
    keep = to_leave(facts)
    if rules.max_bytes is not None and facts.total - rules.max_bytes < keep:
        return DiskCode.P04, f"max_bytes leaves less than {human(keep)} of {facts.mount.point if facts.mount else facts.path} to others, who need it"
    return None


def to_leave(facts: DirectoryFacts) -> int:
    """Bytes that must stay free for the node's kubelet and container runtime, if they share the file system: below that they evict pods."""
    return int(max((EVICTION[who] for who in (*facts.beside.sharers, *facts.beside.unseen)), default=0.0) * facts.total)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
