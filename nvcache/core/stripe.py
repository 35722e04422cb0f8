"""The stripe in data: facts of the whole machine, the cases it can be in, the steps of a plan. `decide` makes the plan; nothing here acts.

Each step names what it touches and prints itself, which is the dry run. The steps that destroy accept only `Blank` and `Ours`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nvcache.core.content import Content, Kind
from nvcache.core.disk_codes import DiskCode
from nvcache.core.disks import NAME, Blank, DiskFacts, Mount, Ours, Probe, Verdict


@dataclass(frozen=True, slots=True)
class ArrayFacts:
    """One md array as the kernel has it. `uuid` and `label` come from the superblock of one of its members; None when unreadable."""

    name: str  # md127
    node: str  # /dev/md127
    number: str  # major:minor
    state: str  # sysfs md/array_state: clean, active, inactive, broken, clear, read-auto, …
    level: str  # sysfs md/level: raid0, …; "" while inactive
    members: tuple[str, ...]  # kernel names of the disks or partitions it holds
    raid_disks: int
    uuid: str | None = None
    label: str | None = None
    faulty: tuple[str, ...] = ()  # members whose md/dev-*/state says faulty


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """The volume group named nvcache, as LVM reports it. `node` is the logical volume's device when it is active."""

    vg_uuid: str
    tags: tuple[str, ...]
    pv_count: int
    missing: int
    members: tuple[str, ...]  # kernel names of the physical volumes that are there
    volumes: tuple[str, ...]  # names of its logical volumes
    name: str | None = None  # dm-0
    node: str | None = None  # /dev/dm-0
    number: str | None = None


@dataclass(frozen=True, slots=True)
class TopFacts:
    """What is on an assembled stripe (or on the one disk): the device that is, or would be, mounted."""

    node: str
    number: str
    size: int
    probe: Probe
    content: Content | None


@dataclass(frozen=True, slots=True)
class Machine:
    """One look at the machine. `tops` is by kernel name of the device; `marker` is the JSON object read at the mount point."""

    disks: tuple[DiskFacts, ...]
    arrays: tuple[ArrayFacts, ...] = ()
    volume: VolumeFacts | None = None
    tops: tuple[tuple[str, TopFacts], ...] = ()
    mounts: tuple[Mount, ...] = ()  # layers at the configured mount point, lowest first
    elsewhere: tuple[tuple[str, str], ...] = ()  # (major:minor, mount point) of every other mount of a device above
    marker: str | None = None  # the UUID that the marker file at the mount point names; None: no file; "": unreadable
    settled: bool = True  # False while there is still time to wait for more disks
    made: frozenset[str] = frozenset()  # UUIDs of what this very run made, so that nothing on it can be anybody's
    unmountable: frozenset[str] = frozenset()  # file systems of ours that the kernel calls damaged

    def top(self, name: str) -> TopFacts | None:
        """What is on the device `name`."""
        return dict(self.tops).get(name)


class Case(StrEnum):
    """Which situation the whole machine is in."""

    C0 = "C0"
    C1 = "C1"
    C2 = "C2"
    C3 = "C3"
    C4 = "C4"
    C5 = "C5"
    C6 = "C6"
    C7 = "C7"
    C8 = "C8"
    C9 = "C9"
    C10 = "C10"
    C11 = "C11"
    C12 = "C12"
    C13 = "C13"
    C14 = "C14"


CASES: dict[Case, tuple[str, str]] = {
    Case.C0: ("no disk that may be used", "nothing is made; the node says N00 and why for each disk"),
    Case.C1: ("our stripe is active, mounted, whole and carries its marker", "it is used as it is; nothing is written"),
    Case.C2: ("as C1, but other usable disks are not in it", "it is used as it is, with W01; a stripe is never grown"),
    Case.C3: ("our stripe is active, not mounted", "it is mounted"),
    Case.C4: ("our array is there but inactive (udev met only some members)", "the array is stopped, then everything is looked at again"),
    Case.C5: ("all members of a stripe of ours are there, not assembled", "it is assembled by its UUID from exactly these disks"),
    Case.C6: (
        "members of our stripe are missing for good",
        "on_lost = rebuild: our superblocks are erased and a new stripe is made (R01); refuse: N01",
    ),
    Case.C7: ("every disk is blank", "a stripe is made of all"),
    Case.C8: ("our stripe is whole but has no file system, or a damaged one of ours", "a file system is made; if anything else is on it: N02"),
    Case.C9: ("two stripes of ours", "the complete one is used, what is left of the other is not touched (W01)"),
    Case.C10: (
        "a disk that should be usable is not",
        "nothing is written (N03), unless require_all = false or a whole stripe of ours is there already",
    ),
    Case.C11: ("the stripe failed while in use", "the cache is withdrawn, unmounted and made anew without the failed disk"),
    Case.C12: ("exactly one usable disk", "no array: the file system is made on the disk itself"),
    Case.C13: ("an array or volume group of our name is not ours", "nothing is written (N05)"),
    Case.C14: ("a storage command or a disk does not answer", "nothing more is started (N06)"),
}


@dataclass(frozen=True, slots=True)
class StopArray:
    """Stop an md array; nothing is written to its members."""

    node: str

    def __str__(self) -> str:
        return f"stop the array {self.node}"


@dataclass(frozen=True, slots=True)
class AssembleArray:
    """Start an md array from exactly these members."""

    uuid: str
    members: tuple[Ours, ...]

    def __str__(self) -> str:
        return f"assemble the array {self.uuid} from {_names(self.members)}"


@dataclass(frozen=True, slots=True)
class ActivateVolume:
    """Activate the logical volume of our group."""

    uuid: str
    members: tuple[Ours, ...]

    def __str__(self) -> str:
        return f"activate the volume group {NAME} on {_names(self.members)}"


@dataclass(frozen=True, slots=True)
class RemoveVolume:
    """Deactivate and remove our volume group, also with members missing."""

    members: tuple[Ours, ...]

    def __str__(self) -> str:
        return f"remove the volume group {NAME} from {_names(self.members)}"


@dataclass(frozen=True, slots=True)
class Release:
    """Erase our superblock, so that the disk is blank again."""

    member: Ours

    def __str__(self) -> str:
        return f"erase our {self.member.kind} superblock on {self.member.disk.node} (serial {self.member.disk.serial})"


@dataclass(frozen=True, slots=True)
class CreateStripe:
    """Make a new array or volume group of blank disks."""

    kind: Kind
    members: tuple[Blank, ...]

    def __str__(self) -> str:
        return f"make {'an md RAID0 array' if self.kind is Kind.MD else 'a striped LVM volume'} of {_names(self.members)}"


@dataclass(frozen=True, slots=True)
class MakeFilesystem:
    """Format a stripe that is ours, or one blank disk. `clear`: erase what an earlier life of the disks left at its ends first."""

    on: Found | Blank
    node: str
    kind: str
    clear: bool = False

    def __str__(self) -> str:
        return f"make an {self.kind} file system on {self.node}{', over what an earlier stripe left there' if self.clear else ''}"


@dataclass(frozen=True, slots=True)
class MountStripe:
    """Mount our file system."""

    node: str
    point: str
    kind: str

    def __str__(self) -> str:
        return f"mount {self.node} ({self.kind}) at {self.point}"


@dataclass(frozen=True, slots=True)
class Unmount:
    """Unmount our file system."""

    point: str

    def __str__(self) -> str:
        return f"unmount {self.point}"


@dataclass(frozen=True, slots=True)
class WriteMarker:
    """Leave the marker file that names the stripe."""

    point: str
    uuid: str

    def __str__(self) -> str:
        return f"write the marker of stripe {self.uuid} at {self.point}"


Step = StopArray | AssembleArray | ActivateVolume | RemoveVolume | Release | CreateStripe | MakeFilesystem | MountStripe | Unmount | WriteMarker


@dataclass(frozen=True, slots=True)
class Found:
    """A stripe of ours, as far as it is there. `name`, `node`, `number` name its device once it is active; a single disk always is."""

    kind: Kind
    uuid: str
    members: tuple[Ours, ...]
    expected: int
    name: str | None = None
    node: str | None = None
    number: str | None = None
    inactive: str | None = None  # the node of an md array that holds members without running
    broken: str | None = None  # why it cannot be used any more

    @property
    def complete(self) -> bool:
        """Whether every member is there, once."""
        return self.expected > 0 and len(self.members) == self.expected and self.broken is None


@dataclass(frozen=True, slots=True)
class StripePlan:
    """What to do now. After its steps everything is looked at and decided anew, until `done`, a refusal, or nothing changes."""

    case: Case
    verdicts: tuple[Verdict, ...]
    reason: str
    code: DiskCode | None = None  # N.. and D14, D15: refused; R01: rebuilt
    steps: tuple[Step, ...] = ()
    then: tuple[str, ...] = ()  # what a dry run says will follow
    warnings: tuple[tuple[DiskCode, str], ...] = ()
    stripe: Found | None = None
    waiting: bool = False  # for disks that may still come up
    done: bool = False

    @property
    def refused(self) -> bool:
        """Whether the node is left without a stripe."""
        return self.code is not None and self.code[0] in "ND"


def _names(members: tuple[Ours, ...] | tuple[Blank, ...]) -> str:
    return ", ".join(member.disk.node for member in members)
