"""A node in memory: disks, arrays, file systems, mounts; shown as facts, changed by a plan's steps. It knows nothing of how plans are made.

Stands in for a node where thousands of situations are tried; what real disks do is tested in tests/node.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace

from nvcache.core.content import Content, Kind
from nvcache.core.disks import MD_NAME, NAME, TAG, Blkid, DiskFacts, Holder, Mount, Probe, PvFacts, Rules, pv_uuid
from nvcache.core.stripe import (
    ActivateVolume,
    ArrayFacts,
    AssembleArray,
    CreateStripe,
    Machine,
    MakeFilesystem,
    MountStripe,
    Release,
    RemoveVolume,
    Step,
    StopArray,
    TopFacts,
    Unmount,
    VolumeFacts,
    WriteMarker,
)

BLANK = Content(Kind.BLANK)
NOTHING = Probe(Blkid.NOTHING)
RULES = Rules(min_disk=0, mount="/mnt/cache")


@dataclass
class Disk:
    """One simulated disk. `fs` is what lies on the stripe it is first in (or on itself): a UUID and a kind."""

    serial: str
    size: int = 1 << 30
    model: str = "Microsoft NVMe Direct Disk v2"
    content: Content = BLANK
    probe: Probe = NOTHING
    vg: bool = False
    extra: dict[str, object] = field(default_factory=dict)


@dataclass
class Node:
    """The whole machine. `order` is the order in which disks get their kernel names."""

    disks: list[Disk]
    active: dict[str, str] = field(default_factory=dict)  # stripe uuid → kernel name of its device
    inactive: dict[str, str] = field(default_factory=dict)
    filesystems: dict[str, tuple[str, str]] = field(default_factory=dict)  # stripe uuid → (kind, fs uuid)
    groups: dict[str, int] = field(default_factory=dict)  # vg uuid → pv count
    mounted: str | None = None  # stripe uuid
    marker: str | None = None  # on the mounted file system
    markers: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    written: list[str] = field(default_factory=list)  # serials that a step wrote to
    settled: bool = True

    def names(self) -> dict[str, str]:
        """Serial → kernel name."""
        return {disk.serial: f"nvme{number}n1" for number, disk in enumerate(self.disks)}

    def members(self, stripe: str) -> list[Disk]:
        """The disks of a stripe that are there."""
        return [disk for disk in self.disks if stripe in (disk.content.uuid, self._vg_of(disk))]

    def _vg_of(self, disk: Disk) -> str | None:
        return next(iter(self.groups), None) if disk.vg else None

    def facts(self) -> Machine:
        """What a scan would see."""
        names, mounts = self.names(), []
        disks, arrays, tops = [], [], []
        volume = None
        for stripe, device in {**self.active, **self.inactive}.items():
            held = self.members(stripe)
            if held and held[0].content.kind is Kind.MD:
                state = "clean" if stripe in self.active else "inactive"
                here = tuple(names[disk.serial] for disk in held)
                arrays.append(
                    ArrayFacts(device, f"/dev/{device}", f"9:{device[2:]}", state, "raid0", here, held[0].content.members or 0, stripe, MD_NAME)
                )
        for group, count in self.groups.items():
            held = [disk for disk in self.disks if disk.vg]
            device = self.active.get(group)
            where = (device, f"/dev/{device}", "252:0") if device else (None, None, None)
            volume = VolumeFacts(group, (TAG,), count, count - len(held), tuple(names[disk.serial] for disk in held), ("cache",), *where)
        for disk in self.disks:
            disks.append(self._disk(disk, names[disk.serial]))
            if disk.content.kind in (Kind.XFS, Kind.EXT4):
                tops.append(
                    (names[disk.serial], TopFacts(f"/dev/{names[disk.serial]}", self._number(disk.content.uuid), disk.size, disk.probe, disk.content))
                )
        for stripe, device in self.active.items():
            tops.append((device, self._top(stripe, device)))
        if self.mounted:
            kind = self.filesystems.get(self.mounted, ("xfs", ""))[0]
            mounts.append(Mount(self._number(self.mounted), RULES.mount, kind, options=("rw",)))
        return Machine(
            tuple(disks),
            tuple(arrays),
            volume,
            tuple(tops),
            tuple(mounts),
            marker=self.marker if self.mounted else None,
            settled=self.settled,
            made=frozenset(self.made),
        )

    def _number(self, stripe: str | None) -> str:
        if stripe in self.active:
            device = self.active[str(stripe)]
            return f"9:{device[2:]}" if device.startswith("md") else "252:0"
        return next((f"259:{number}" for number, disk in enumerate(self.disks) if disk.content.uuid == stripe), "0:0")

    def _disk(self, disk: Disk, name: str) -> DiskFacts:
        vg = self._vg_of(disk)
        holders: tuple[Holder, ...] = ()
        for stripe in (disk.content.uuid, vg):
            device = self.active.get(stripe or "") or self.inactive.get(stripe or "")
            if device:
                kind = "md" if device.startswith("md") else "dm"
                points = (RULES.mount,) if self.mounted == stripe else ()
                holders = (Holder(device, kind, None, f"{NAME}-cache" if kind == "dm" else None, points),)
        alone = disk.content.kind in (Kind.XFS, Kind.EXT4) and self.mounted == disk.content.uuid and self.mounted not in self.active
        pv = None
        if disk.content.kind is Kind.LVM:
            pv = PvFacts(NAME, vg, (TAG,), self.groups[vg], 0) if vg else PvFacts("", "", (), 0, 0)
        found = DiskFacts(
            name,
            f"/dev/{name}",
            self._number(disk.content.uuid) if alone else f"259:{name[4:-2]}",
            disk.size,
            disk.model,
            disk.serial,
            holders=holders,
            mounts=(RULES.mount,) if alone else (),
            probe=disk.probe,
            content=disk.content,
            exclusive=None if holders or alone else True,
            pv=pv,
        )
        return replace(found, **disk.extra)  # type: ignore[arg-type]

    def _top(self, stripe: str, device: str) -> TopFacts:
        kind, fs = self.filesystems.get(stripe, ("", ""))
        probe = Probe(Blkid.FOUND, kind, None, NAME, fs) if kind else NOTHING
        content = Content(Kind(kind), fs, NAME) if kind else Content(Kind.UNKNOWN)
        return TopFacts(f"/dev/{device}", self._number(stripe), 1 << 32, probe, content)

    def apply(self, step: Step) -> None:  # noqa: C901, PLR0912 - one case a step
        """What the step does to this node."""
        match step:
            case StopArray(node):
                for table in (self.active, self.inactive):
                    for stripe in [stripe for stripe, device in table.items() if node == f"/dev/{device}"]:
                        del table[stripe]
            case AssembleArray(stripe, _):
                self.active[stripe] = "md127"
            case ActivateVolume(stripe, _):
                self.active[stripe] = "dm-0"
            case RemoveVolume(_):
                for stripe in list(self.groups):
                    self.active.pop(stripe, None)
                self.groups.clear()
                for disk in self.disks:
                    disk.vg = False
            case Release(member):
                self._write(member.disk.serial, BLANK, NOTHING)
            case CreateStripe(kind, members):
                self._create(kind, [blank.disk.serial for blank in members])
            case MakeFilesystem(_, node, kind, _):
                self._format(node, kind)
                self.made.clear()
            case MountStripe(node, _, _):
                self.mounted = self._at(node)
                self.marker = self.markers.get(self.mounted)
            case Unmount(_):
                self.mounted = None
            case WriteMarker(_, stripe):
                assert self.mounted is not None
                self.marker = self.markers[self.mounted] = stripe

    def _at(self, node: str) -> str:
        device = node.removeprefix("/dev/")
        for stripe, name in self.active.items():
            if name == device:
                return stripe
        names = self.names()
        return next(str(disk.content.uuid) for disk in self.disks if names[disk.serial] == device)

    def _write(self, serial: str, content: Content, probe: Probe) -> None:
        disk = next(disk for disk in self.disks if disk.serial == serial)
        disk.content, disk.probe = content, probe
        self.written.append(serial)

    def _create(self, kind: Kind, serials: list[str]) -> None:
        stripe = str(uuid.uuid4())
        for number, serial in enumerate(serials):
            if kind is Kind.MD:
                content = Content(Kind.MD, stripe, MD_NAME, 0, len(serials), number, 0)
                self._write(serial, content, Probe(Blkid.FOUND, "linux_raid_member", None, MD_NAME, stripe))
            else:
                own = pv_uuid(serial, "0123456789abcdef")
                self._write(serial, Content(Kind.LVM, own), Probe(Blkid.FOUND, "LVM2_member", None, None, own))
                next(disk for disk in self.disks if disk.serial == serial).vg = True
        if kind is Kind.LVM:
            self.groups[stripe] = len(serials)
        self.active[stripe] = "md127" if kind is Kind.MD else "dm-0"
        self.made = {stripe}

    def _format(self, node: str, kind: str) -> None:
        fs = str(uuid.uuid4())
        device = node.removeprefix("/dev/")
        for stripe, name in self.active.items():
            if name == device:
                self.filesystems[stripe] = (kind, fs)
                return
        names = self.names()
        serial = next(serial for serial, name in names.items() if name == device)
        self._write(serial, Content(Kind(kind), fs, NAME), Probe(Blkid.FOUND, kind, None, NAME, fs))
