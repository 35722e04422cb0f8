"""Facts about a node's disks, and the judgement of each one: ours, blank, or not to be touched. Pure: it reads no disk and plans no stripe.

`Blank` and `Ours` are the only types that anything destructive accepts. Both check their evidence when they are made, so that no caller can
have one without it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

from nvcache.core.content import Content, Kind, lvm_uuid
from nvcache.core.disk_codes import DiskCode
from nvcache.core.space import human

NAME = "nvcache"  # of the array, the volume group and the file system
MD_NAME = f"any:{NAME}"  # as an array made with --homehost=any is named
VOLUME = "cache"  # the logical volume
TAG = NAME  # of the volume group
PV_PREFIX = "nvcach"  # our physical volumes' UUIDs begin so: one without its group is still known as ours

DENIED_MODELS = frozenset({"MSFT NVMe Accelerator v1.0", "Amazon Elastic Block Store", "nvme_card-pd"})
ALLOWED_MODELS = frozenset({"Microsoft NVMe Direct Disk", "Microsoft NVMe Direct Disk v2", "Amazon EC2 NVMe Instance Storage", "nvme_card"})
_GCP_NUMBERED = re.compile(r"nvme_card[0-9]+")
_NAMESPACE = re.compile(r"nvme[0-9]+n[0-9]+")


class Blkid(StrEnum):
    """What `blkid -p` says by its exit status."""

    NOTHING = "nothing"  # 2
    FOUND = "found"  # 0
    AMBIVALENT = "ambivalent"  # 8
    FAILED = "failed"  # anything else, or no answer


@dataclass(frozen=True, slots=True)
class Probe:
    """The first witness: `blkid -p` of one device. `type` is TYPE, `table` PTTYPE; `why` tells a failure."""

    result: Blkid
    type: str | None = None
    table: str | None = None
    label: str | None = None
    uuid: str | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo as the host sees it. `number` is major:minor of the device."""

    number: str
    point: str
    filesystem: str
    root: str = "/"
    options: tuple[str, ...] = ()  # the mount's own and the file system's


@dataclass(frozen=True, slots=True)
class Holder:
    """A block device built on a disk. `identity` is an md array's UUID (blkid's notation) or a device-mapper name; None when unknown."""

    name: str  # kernel name: md127, dm-0
    kind: str  # md | dm | other
    identity: str | None = None
    label: str | None = None  # the array's name, or the mapping's: nvcache-cache
    mounts: tuple[str, ...] = ()  # mount points of it and of everything on top of it


@dataclass(frozen=True, slots=True)
class PvFacts:
    """What LVM knows of a physical volume. `vg` is empty for one in no group."""

    vg: str
    vg_uuid: str
    tags: tuple[str, ...]
    pv_count: int
    missing: int


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """Everything known about one block device that might be a local NVMe disk, in the kernel's words."""

    name: str  # nvme0n1
    node: str  # /dev/nvme0n1
    number: str  # major:minor
    size: int  # bytes
    model: str
    serial: str
    transport: str = "pcie"
    partition: bool = False
    hidden: bool = False
    read_only: bool = False
    removable: bool = False
    partitions: tuple[str, ...] = ()
    holders: tuple[Holder, ...] = ()
    mounts: tuple[str, ...] = ()  # of the disk itself, in the host's namespace
    swap: bool = False
    loop: str | None = None  # the loop device whose file it is
    probe: Probe | None = None  # None: not asked, an earlier step refused already
    content: Content | None = None  # None: not read, or unreadable (`unreadable` says why)
    unreadable: str | None = None
    exclusive: bool | None = None  # whether O_EXCL was granted; None: not asked
    pv: PvFacts | None = None
    vendor_listed: bool | None = None  # whether the cloud's own list of local disks has it; None: there is no such list


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator set. Sizes in bytes."""

    backend: str = "md"  # md | lvm
    filesystem: str = "xfs"  # xfs | ext4
    models: frozenset[str] = frozenset()  # besides the built-in ones
    exclude: frozenset[str] = frozenset()  # serials
    failed: frozenset[str] = frozenset()  # serials that failed or vanished while in use, until the node restarts
    min_disk: int = 100 * 2**30
    expected: int | None = None
    allow_unequal: bool = False
    require_all: bool = True
    rebuild: bool = True  # on_lost = rebuild
    mount: str = "/var/lib/nvcache/mnt"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A disk that is not used, and why in words.

    `counts` tells whether it should have been usable: a local disk of an allowed model that nobody excluded. Only such a disk makes the node refuse.
    """

    disk: DiskFacts
    code: DiskCode
    reason: str
    counts: bool


@dataclass(frozen=True, slots=True)
class Blank:
    """A disk that two witnesses call blank. Raises ValueError when made without that evidence."""

    disk: DiskFacts

    def __post_init__(self) -> None:
        disk = self.disk
        if not (
            disk.probe is not None
            and disk.probe.result is Blkid.NOTHING
            and disk.content is not None
            and disk.content.kind is Kind.BLANK
            and disk.exclusive is True
            and not (disk.partitions or disk.holders or disk.mounts or disk.swap or disk.loop or disk.read_only or disk.partition)
        ):
            raise ValueError(f"{disk.name} is not proven blank")


@dataclass(frozen=True, slots=True)
class Ours:
    """A disk that belongs to a stripe nvcache made. `stripe` is the array's, group's or file system's UUID; empty for what was still being made.

    Raises ValueError when made without evidence from both witnesses.
    """

    disk: DiskFacts
    kind: Kind
    stripe: str
    expected: int  # members the stripe has

    def __post_init__(self) -> None:
        if ownership(self.disk) != (self.kind, self.stripe, self.expected):
            raise ValueError(f"{self.disk.name} is not proven ours")


Verdict = Ours | Blank | Foreign


def ownership(disk: DiskFacts) -> tuple[Kind, str, int] | None:
    """What stripe of ours a disk is part of, if both witnesses say so: kind, UUID, count of members."""
    probe, content = disk.probe, disk.content
    if probe is not None and probe.result is Blkid.NOTHING and content == Content(Kind.CLAIM, label=disk.serial):
        return Kind.CLAIM, "", 0
    if probe is None or content is None or probe.result is not Blkid.FOUND or probe.table is not None or probe.uuid != content.uuid:
        return None
    if content.kind is Kind.MD and probe.type == "linux_raid_member" and content.label == MD_NAME and content.level == 0 and content.uuid:
        return Kind.MD, content.uuid, content.members or 0
    if content.kind is Kind.LVM and probe.type == "LVM2_member" and content.uuid:
        if disk.pv is not None and disk.pv.vg == NAME and TAG in disk.pv.tags:
            return Kind.LVM, disk.pv.vg_uuid, disk.pv.pv_count
        if disk.pv is not None and not disk.pv.vg and content.uuid == pv_uuid(disk.serial, content.uuid):
            return Kind.LVM, "", 0
    if content.kind in (Kind.XFS, Kind.EXT4) and probe.type == str(content.kind) and content.label == NAME and content.uuid:
        return content.kind, content.uuid, 1
    return None


def pv_uuid(serial: str, salt: str) -> str:
    """The UUID our physical volume on the disk `serial` has: recognisable, and bound to that disk by a digest.

    The last 16 characters of `salt` (an earlier such UUID, or any 16 letters or digits) are kept, so that UUIDs differ from one making to the next.
    """
    plain = salt.replace("-", "")[-16:]
    bound = hashlib.sha256(f"{serial}:{plain}".encode()).hexdigest()[: 32 - len(PV_PREFIX) - len(plain)]
    return lvm_uuid(f"{PV_PREFIX}{bound}{plain}")


def is_namespace(name: str) -> bool:
    """Whether a kernel name is that of a whole NVMe namespace."""
    return _NAMESPACE.fullmatch(name) is not None


def allowed_model(model: str, rules: Rules) -> bool:
    """Whether disks of this model are local and disposable, as far as the built-in list and the operator know."""
    return model in ALLOWED_MODELS or model in rules.models or _GCP_NUMBERED.fullmatch(model) is not None


def refused_unseen(disk: DiskFacts, rules: Rules) -> Foreign | None:
    """What sysfs alone refuses about a disk, in the order of the ladder up to holders and mounts. Such a disk is never even opened.

    A holder or a mount may be our own; whether it is needs the disk's content, so both are left to `judge`.
    """

    def no(code: DiskCode, reason: str, *, counts: bool = True) -> Foreign:
        return Foreign(disk, code, reason, counts)

    if disk.partition or disk.hidden or not is_namespace(disk.name):
        return no(DiskCode.D01, "not a whole, visible NVMe namespace", counts=False)
    if disk.transport != "pcie":
        return no(DiskCode.D01, f"not a local NVMe namespace (transport={disk.transport or 'unknown'})", counts=False)
    if disk.model in DENIED_MODELS:
        return no(DiskCode.D02, f"remote cloud disk ({disk.model}), never used", counts=False)
    if not allowed_model(disk.model, rules):
        return no(DiskCode.D03, f'model "{disk.model}" is not on the list of local, disposable disks', counts=False)
    if disk.serial in rules.exclude:
        return no(DiskCode.D17, f"serial {disk.serial} is excluded", counts=False)
    if disk.serial in rules.failed:
        return no(DiskCode.D18, "it failed or vanished while in use", counts=False)
    if disk.read_only or disk.size <= 0 or disk.removable:
        return no(DiskCode.D04, "read-only" if disk.read_only else "removable" if disk.removable else "it has no size")
    if disk.size < rules.min_disk:
        return no(DiskCode.D05, f"{human(disk.size)} is smaller than min_disk, {human(rules.min_disk)}")
    if disk.partitions:
        return no(DiskCode.D06, f"has partitions ({', '.join(disk.partitions)}){_mounted(disk)}")
    return None


def judge(disk: DiskFacts, rules: Rules) -> Verdict:
    """What one disk is to us: the ladder of refusals, the first one that applies decides."""
    refusal = refused_unseen(disk, rules) or _in_use(disk, rules)
    if refusal is not None:
        return refusal

    def no(code: DiskCode, reason: str) -> Foreign:
        return Foreign(disk, code, reason, counts=True)

    if disk.exclusive is None and disk.unreadable is None and disk.probe is None:
        return no(DiskCode.D11, "it was not examined")
    if disk.exclusive is False:
        return no(DiskCode.D12, "another program or kernel subsystem holds it exclusively")
    probe, content = disk.probe, disk.content
    if content is None or probe is None:
        return no(DiskCode.D11, f"cannot be read ({disk.unreadable or 'no answer'})")
    if probe.result is Blkid.FAILED:
        return no(DiskCode.D11, f"cannot be examined ({probe.why})")
    if probe.result is Blkid.AMBIVALENT:
        return no(DiskCode.D10, "several signatures, undecidable")
    owned = ownership(disk)
    if owned is not None:
        return Ours(disk, *owned)
    if probe.result is Blkid.FOUND:
        return _foreign(disk, probe, content)
    if content.kind is Kind.BLANK and disk.exclusive is not True:
        return no(DiskCode.D12, "it was not had exclusively")
    if content.kind is Kind.BLANK:
        return Blank(disk)
    if content.kind is Kind.UNKNOWN:
        return no(DiskCode.D16, "holds data without a known signature")
    return no(DiskCode.D10, f"its bytes look like {content.kind}, blkid sees nothing")


def refused_wipe(disk: DiskFacts, rules: Rules) -> Foreign | None:
    """Why even an explicit wipe does not touch this disk; what is on it does not matter, who uses it does."""
    refusal = refused_unseen(disk, rules) or _in_use(disk, rules)
    if refusal is None and disk.exclusive is not True:
        refusal = Foreign(disk, DiskCode.D12, "it is part of an active stripe" if ownership(disk) else "something holds it exclusively", counts=True)
    return refusal


def _in_use(disk: DiskFacts, rules: Rules) -> Foreign | None:
    """The disk's holders and mounts, unless they are those of a stripe of ours."""
    owned = ownership(disk)
    kind = owned[0] if owned else None
    for holder in disk.holders:
        ours = (kind is Kind.MD and holder.kind == "md") or (kind is Kind.LVM and holder.kind == "dm" and (holder.label or "").startswith(f"{NAME}-"))
        if not ours:
            where = f", mounted at {', '.join(holder.mounts)} in the host" if holder.mounts else ""
            hint = "; with backend directory a directory below it can be used" if holder.mounts else ""
            return Foreign(disk, DiskCode.D07, f"in use by {_titled(holder)}{where}{hint}", counts=True)
    if disk.mounts and not (kind in (Kind.XFS, Kind.EXT4) and set(disk.mounts) == {rules.mount}):
        return Foreign(disk, DiskCode.D08, f"mounted at {', '.join(disk.mounts)}", counts=True)
    if disk.swap:
        return Foreign(disk, DiskCode.D08, "used as swap", counts=True)
    if disk.loop:
        return Foreign(disk, DiskCode.D08, f"behind the loop device {disk.loop}", counts=True)
    return None


def _foreign(disk: DiskFacts, probe: Probe, content: Content) -> Foreign:
    families = {Kind.MD: "linux_raid_member", Kind.LVM: "LVM2_member", Kind.XFS: "xfs", Kind.EXT4: "ext4"}
    if families.get(content.kind) == probe.type and probe.uuid != content.uuid:
        return Foreign(disk, DiskCode.D10, f"blkid and the disk's own bytes name different {probe.type} UUIDs", counts=True)
    names = [f"label {probe.label}" if probe.label else "", f"UUID {probe.uuid}" if probe.uuid else ""]
    if content.kind is Kind.MD:
        names = [f"array {content.label}, level {content.level}", f"UUID {content.uuid}"]
    if disk.pv is not None:
        names = [f"volume group {disk.pv.vg}" if disk.pv.vg else "in no volume group", f"UUID {probe.uuid}"]
    what = probe.type or f"a {probe.table} partition table" if probe.type or probe.table else "something"
    told = ", ".join(name for name in names if name)
    return Foreign(disk, DiskCode.D09, f"contains {what}{f' ({told})' if told else ''}", counts=True)


def _titled(holder: Holder) -> str:
    return f"{holder.name} ({holder.label})" if holder.label else holder.name


def _mounted(disk: DiskFacts) -> str:
    return f", mounted at {', '.join(disk.mounts)}" if disk.mounts else ""
