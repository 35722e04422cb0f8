"""Decides what to do about the stripe, once for the whole machine: adopt, assemble, make, rebuild or refuse. Pure: it reads and writes no disk.

Every crash leaves the machine in one of the cases again, so that deciding anew is also how a creation or a rebuild cut short is healed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nvcache.core.content import Kind
from nvcache.core.disk_codes import DiskCode
from nvcache.core.disks import (
    MD_NAME,
    NAME,
    VOLUME,
    Blank,
    Blkid,
    DiskFacts,
    Foreign,
    Ours,
    Rules,
    Verdict,
    allowed_model,
    is_namespace,
    judge,
    ownership,
)
from nvcache.core.space import human
from nvcache.core.stripe import (
    ActivateVolume,
    ArrayFacts,
    AssembleArray,
    Case,
    CreateStripe,
    Found,
    Machine,
    MakeFilesystem,
    MountStripe,
    Release,
    RemoveVolume,
    Step,
    StopArray,
    StripePlan,
    TopFacts,
    Unmount,
    WriteMarker,
)

_STOPPED = ("inactive", "clear")
_BROKEN = ("broken",)
_UNEQUAL = 0.01
_FILESYSTEMS = {Kind.XFS: "xfs", Kind.EXT4: "ext4"}


def decide(machine: Machine, rules: Rules) -> StripePlan:
    """The plan for this machine under these rules. Total: whatever the facts, it returns a plan and raises nothing."""
    return _Decision(machine, rules).plan()


def plan_teardown(machine: Machine, rules: Rules) -> StripePlan:
    """Give every disk of ours back: unmount, stop, erase our superblocks. Touches nothing that is not proven ours.

    What only says which disks a new stripe may take (their size, exclusions) does not count: it may have been changed since.
    """
    decision = _Decision(machine, replace(rules, exclude=frozenset(), failed=frozenset(), min_disk=0))
    steps = [step for stripe in decision.stripes for step in decision.dissolve(stripe, unmount=True)]
    blocked = next((reason for stripe in decision.stripes if (reason := decision.mounted_elsewhere(stripe))), None)
    if blocked:
        return decision.refuse(Case.C3, DiskCode.N07, blocked)
    strange = decision.strange_volumes()
    if strange:
        return decision.refuse(Case.C8, DiskCode.N02, strange)
    if not steps and machine.mounts and machine.marker:
        why = "; ".join(f"{foreign.disk.node}: {foreign.reason}" for foreign in decision.verdicts if isinstance(foreign, Foreign))
        unseen = f"our stripe is mounted at {rules.mount}, and no disk is seen to belong to it" + (f" ({why})" if why else "")
        return decision.refuse(Case.C0, DiskCode.N08, unseen)
    if not steps:
        return StripePlan(Case.C0, decision.verdicts, "no disk of this node belongs to a stripe of ours", done=True)
    names = ", ".join(member.disk.node for stripe in decision.stripes for member in stripe.members)
    return StripePlan(Case.C1, decision.verdicts, f"{names} are given back blank", steps=tuple(steps))


@dataclass(frozen=True)
class _Decision:
    machine: Machine
    rules: Rules
    verdicts: tuple[Verdict, ...] = field(init=False)
    stripes: tuple[Found, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdicts", tuple(judge(disk, self.rules) for disk in self.machine.disks))
        object.__setattr__(self, "stripes", self._stripes())

    # -- what is there

    @property
    def blank(self) -> tuple[Blank, ...]:
        return tuple(sorted((found for found in self.verdicts if isinstance(found, Blank)), key=lambda found: (found.disk.serial, found.disk.name)))

    @property
    def bad(self) -> tuple[Foreign, ...]:
        return tuple(found for found in self.verdicts if isinstance(found, Foreign) and found.counts)

    def _stripes(self) -> tuple[Found, ...]:
        groups: dict[tuple[Kind, str], list[Ours]] = {}
        for verdict in self.verdicts:
            if isinstance(verdict, Ours):
                groups.setdefault((verdict.kind, verdict.stripe), []).append(verdict)
        return tuple(self._found(kind, uuid, members) for (kind, uuid), members in sorted(groups.items()))

    def _found(self, kind: Kind, uuid: str, members: list[Ours]) -> Found:
        ordered = tuple(sorted(members, key=lambda member: (member.disk.content.role or 0 if member.disk.content else 0, member.disk.serial)))
        stripe = Found(kind, uuid, ordered, ordered[0].expected)
        if len({member.expected for member in members}) > 1:
            return replace(stripe, broken="its members disagree about how many they are")
        if kind is Kind.MD:
            return self._with_array(stripe)
        if kind is Kind.LVM:
            return self._with_volume(stripe)
        disk = ordered[0].disk
        if len(ordered) > 1:
            return replace(stripe, expected=1, broken="several disks carry the same file system UUID")
        return replace(stripe, name=disk.name, node=disk.node, number=disk.number)

    def _with_array(self, stripe: Found) -> Found:
        for array in self._arrays(stripe):
            if array.state in _STOPPED:
                stripe = replace(stripe, inactive=array.node)
            elif array.state in _BROKEN or array.faulty:
                why = f"the kernel calls {array.name} {array.state}" + (f" and {', '.join(array.faulty)} faulty" if array.faulty else "")
                stripe = replace(stripe, name=array.name, node=array.node, number=array.number, broken=why)
            else:
                stripe = replace(stripe, name=array.name, node=array.node, number=array.number)
        names = {member.disk.name for member in stripe.members}
        lost = [array for array in self._arrays(stripe) if array.node == stripe.node and set(array.members) - names]
        if lost and stripe.broken is None:
            gone = ", ".join(sorted(set(lost[0].members) - names))
            stripe = replace(stripe, broken=f"{gone} of {lost[0].name} is gone or failed")
        return stripe

    def _arrays(self, stripe: Found) -> list[ArrayFacts]:
        """The kernel's arrays that hold members of `stripe`."""
        names = {member.disk.name for member in stripe.members}
        return [array for array in self.machine.arrays if names & set(array.members)]

    def _with_volume(self, stripe: Found) -> Found:
        volume = self.machine.volume
        if volume is None or volume.vg_uuid != stripe.uuid:
            return stripe
        stripe = replace(stripe, name=volume.name, node=volume.node, number=volume.number)
        if volume.missing and (stripe.node or len(stripe.members) == stripe.expected):  # else they may still come up
            return replace(stripe, broken=f"{volume.missing} of {volume.pv_count} physical volumes are missing")
        if not volume.volumes:
            return replace(stripe, broken="its creation was cut short: the group has no volume")
        return stripe

    # -- the plan

    def plan(self) -> StripePlan:
        taken = self._name_taken()
        if taken:
            return self.refuse(Case.C13, DiskCode.N05, taken)
        strange = self.strange_volumes()
        if strange:
            return self.refuse(Case.C8, DiskCode.N02, strange)
        if not (self.stripes or self.blank or self.bad):
            return self._nothing()
        left_out = self._left_out()
        if left_out:
            return self.refuse(Case.C10, DiskCode.N03, left_out)
        whole = [stripe for stripe in self.stripes if stripe.complete]
        if whole:
            return self._use(max(whole, key=self._preference))
        broken = [stripe for stripe in self.stripes if stripe.uuid]
        if self.bad and self.rules.require_all:
            return self._refuse_bad()
        if broken:
            return self._rebuild(tuple(broken))
        orphans = [member for stripe in self.stripes for member in stripe.members]
        if orphans:
            return StripePlan(
                Case.C7, self.verdicts, "a creation was cut short; what it left is erased", steps=tuple(Release(one) for one in orphans)
            )
        if not self.blank:
            return self._refuse_bad()
        return self._create(self.blank)

    def _preference(self, stripe: Found) -> tuple[bool, bool, bool, int, str]:
        """Of several whole stripes: the mounted one, the active one, the backend's, the largest."""
        mounted = any(mount.number == stripe.number for mount in self.machine.mounts)
        return mounted, stripe.node is not None, stripe.kind == self.rules.backend, len(stripe.members), stripe.uuid

    def _name_taken(self) -> str | None:
        known = {disk.name: disk for disk in self.machine.disks}
        for array in self.machine.arrays:
            strangers = [name for name in array.members if self._stranger(name, known.get(name))]
            if array.label == MD_NAME and (strangers or array.level not in ("raid0", "")):
                return f"{array.name} is an array named {NAME}, level {array.level or 'unknown'}, of {', '.join(array.members)}, not made by nvcache"
        for verdict in self.verdicts:
            if not isinstance(verdict, Foreign) or not verdict.counts:
                continue
            content, pv = verdict.disk.content, verdict.disk.pv
            if content is not None and content.kind is Kind.MD and content.label == MD_NAME and content.level != 0:
                return f"{verdict.disk.node} is a member of an array named {NAME} of level {content.level}, not made by nvcache"
            if pv is not None and pv.vg == NAME and NAME not in pv.tags:
                return f"{verdict.disk.node} is in a volume group named {NAME} without our tag, not made by nvcache"
        return None

    def _stranger(self, name: str, disk: DiskFacts | None) -> bool:
        """Whether an array's member is no disk we would have taken. One that vanished, failed or is excluded may have been ours."""
        if disk is None:
            return not is_namespace(name)
        return not allowed_model(disk.model, self.rules) or (disk.content is not None and ownership(disk) is None)

    def strange_volumes(self) -> str | None:
        """What somebody else put into our volume group, in words."""
        volume = self.machine.volume
        strange = sorted(set(volume.volumes) - {VOLUME}) if volume is not None else []
        return f"the volume group {NAME} holds volumes that nvcache did not make ({', '.join(strange)})" if strange else None

    def _left_out(self) -> str | None:
        """Disks under the mounted stripe that only a setting keeps from being ours, in words: a good stripe is not made anew for that."""
        told = [
            f"{found.disk.node} (serial {found.disk.serial}): {found.code} {found.reason}"
            for found in self.verdicts
            if isinstance(found, Foreign) and found.code in (DiskCode.D03, DiskCode.D05, DiskCode.D17)
            if any(self.rules.mount in holder.mounts for holder in found.disk.holders)
        ]
        return f"{'; '.join(told)}, but the mounted stripe is made of it; undo the setting, or `nvcache disks teardown` first" if told else None

    def _nothing(self) -> StripePlan:
        remote = [found for found in self.verdicts if isinstance(found, Foreign) and found.code is DiskCode.D02]
        reason = "no local NVMe disk that may be used"
        if remote and not any(isinstance(found, Foreign) and found.code in (DiskCode.D03, DiskCode.D17, DiskCode.D18) for found in self.verdicts):
            reason += (
                "; only remote cloud disks are here: this node's local NVMe may have been turned into an ephemeral OS disk, use a managed OS disk"
            )
        elif self.verdicts:
            reason += f" among {len(self.verdicts)}"
        short = self._short(0)
        if short and not self.machine.settled:
            return StripePlan(Case.C0, self.verdicts, short, waiting=True)
        return self.refuse(Case.C0, DiskCode.N00, reason)

    def _refuse_bad(self) -> StripePlan:
        told = "; ".join(f"{found.disk.node} (serial {found.disk.serial}): {found.code} {found.reason}" for found in self.bad)
        codes = {found.code for found in self.bad}
        if codes == {DiskCode.D12}:
            told += ". It may be free again in a moment"
        return self.refuse(Case.C10, DiskCode.N03, told)

    def refuse(self, case: Case, code: DiskCode, reason: str, stripe: Found | None = None) -> StripePlan:
        """A plan that does nothing but say why."""
        return StripePlan(case, self.verdicts, reason, code=code, stripe=stripe, warnings=self._warnings(stripe))

    # -- a whole stripe of ours

    def _use(self, stripe: Found) -> StripePlan:
        nodes = ", ".join(member.disk.node for member in stripe.members)
        remnants = any(other.uuid != stripe.uuid for other in self.stripes)
        if stripe.inactive is not None and stripe.node is None:
            step: Step = StopArray(stripe.inactive)
            return StripePlan(
                Case.C4,
                self.verdicts,
                f"our array is inactive as {stripe.inactive}",
                steps=(step,),
                then=("assemble it by its UUID", "mount it"),
                stripe=stripe,
            )
        if stripe.node is None:
            step = AssembleArray(stripe.uuid, stripe.members) if stripe.kind is Kind.MD else ActivateVolume(stripe.uuid, stripe.members)
            case = Case.C9 if remnants else Case.C5
            return StripePlan(case, self.verdicts, f"all members of our stripe are there: {nodes}", steps=(step,), then=("mount it",), stripe=stripe)
        return self._use_active(stripe)

    def _use_active(self, stripe: Found) -> StripePlan:
        point, layers = self.rules.mount, self.machine.mounts
        elsewhere = self.mounted_elsewhere(stripe)
        if elsewhere:
            return self.refuse(Case.C3, DiskCode.N07, elsewhere, stripe)
        if layers and (len(layers) > 1 or layers[0].number != stripe.number):
            told = ", ".join(f"{layer.filesystem} on {layer.number}" for layer in layers)
            return self.refuse(Case.C3, DiskCode.N07, f"{point} is taken: {told}", stripe)
        if layers:
            return self._adopt(stripe)
        top = self.machine.top(stripe.name or "")
        if top is None or top.content is None or top.probe.result in (Blkid.FAILED, Blkid.AMBIVALENT):
            several = top is not None and top.probe.result is Blkid.AMBIVALENT
            why = "it has several signatures" if several else f"it cannot be read{f' ({top.probe.why})' if top and top.probe.why else ''}"
            return self.refuse(Case.C8, DiskCode.N02 if several else DiskCode.N08, f"cannot tell what is on {stripe.node}: {why}", stripe)
        return self._use_top(stripe, top)

    def _use_top(self, stripe: Found, top: TopFacts) -> StripePlan:
        ours = top.probe.type in ("xfs", "ext4") and top.probe.label == NAME and top.probe.table is None
        seen = top.content.kind if top.content is not None else Kind.UNKNOWN
        if top.probe.result is Blkid.NOTHING and seen not in (Kind.BLANK, Kind.UNKNOWN) and stripe.uuid not in self.machine.made:
            why = f"its bytes look like {seen}, blkid sees nothing"  # as after one failed read
            return self.refuse(Case.C8, DiskCode.N08, f"cannot tell what is on {stripe.node}: {why}", stripe)
        if ours and top.probe.uuid not in self.machine.unmountable and stripe.uuid not in self.machine.made:
            mount = MountStripe(top.node, self.rules.mount, str(top.probe.type))
            return StripePlan(Case.C3, self.verdicts, f"our stripe {top.node} is not mounted", steps=(mount,), stripe=stripe)
        if top.probe.result is Blkid.FOUND and not ours and stripe.uuid not in self.machine.made:
            what = top.probe.type or f"a {top.probe.table} partition table"
            return self.refuse(Case.C8, DiskCode.N02, f"{top.node} holds {what} that nvcache did not make", stripe)
        make = MakeFilesystem(stripe, top.node, self.rules.filesystem, clear=top.content is None or top.content.kind is not Kind.BLANK)
        why = "has a damaged file system of ours" if ours and top.probe.uuid in self.machine.unmountable else "has no file system yet"
        return StripePlan(Case.C8, self.verdicts, f"our stripe {top.node} {why}", steps=(make,), then=("mount it",), stripe=stripe)

    def mounted_elsewhere(self, stripe: Found) -> str | None:
        """Where else than at our mount point the stripe is mounted, or what is mounted over it, in words."""
        layers = [layer.number for layer in self.machine.mounts]
        if stripe.number in layers and layers[-1] != stripe.number:  # unmounting would take away what is not ours
            return f"{self.machine.mounts[-1].filesystem} on {layers[-1]} is mounted over our stripe at {self.rules.mount}"
        points = [point for number, point in self.machine.elsewhere if number == stripe.number]
        return f"our stripe {stripe.node} is mounted at {', '.join(points)}, not only at {self.rules.mount}" if points else None

    def _adopt(self, stripe: Found) -> StripePlan:
        layer, marker = self.machine.mounts[0], self.machine.marker
        if "ro" in layer.options:
            return self.refuse(Case.C3, DiskCode.N07, f"{self.rules.mount} is mounted read-only", stripe)
        if marker is None:
            write = WriteMarker(self.rules.mount, stripe.uuid)
            return StripePlan(Case.C3, self.verdicts, "our stripe is mounted and has no marker yet", steps=(write,), stripe=stripe)
        if marker != stripe.uuid:
            named = f"stripe {marker}" if marker else "nothing readable"
            return self.refuse(Case.C1, DiskCode.N09, f"the marker at {self.rules.mount} names {named}, not {stripe.uuid}", stripe)
        top = self.machine.top(stripe.name or "")
        if top is None or not top.probe.uuid:  # without it nobody could tell these contents from others
            why = f" ({top.probe.why})" if top and top.probe.why else ""
            return self.refuse(Case.C1, DiskCode.N08, f"cannot tell the UUID of the file system on {stripe.node}{why}", stripe)
        warnings = self._warnings(stripe)
        case = Case.C2 if any(code is DiskCode.W01 for code, _ in warnings) else Case.C1
        return StripePlan(case, self.verdicts, f"our stripe is mounted at {self.rules.mount}", warnings=warnings, stripe=stripe, done=True)

    def _warnings(self, stripe: Found | None) -> tuple[tuple[DiskCode, str], ...]:
        found: list[tuple[DiskCode, str]] = []
        if stripe is not None:
            used = {member.disk.name for member in stripe.members}
            idle = [verdict for verdict in self.verdicts if verdict.disk.name not in used and (not isinstance(verdict, Foreign) or verdict.counts)]
            if idle:
                nodes = ", ".join(verdict.disk.node + (f" ({verdict.code})" if isinstance(verdict, Foreign) else "") for verdict in idle)
                found.append((DiskCode.W01, f"{len(idle)} usable disk{'s are' if len(idle) > 1 else ' is'} not in the stripe: {nodes}"))
            kind = self.machine.mounts[0].filesystem if self.machine.mounts else None
            if (stripe.kind in (Kind.MD, Kind.LVM) and stripe.kind != self.rules.backend) or (kind is not None and kind != self.rules.filesystem):
                set_to = f"{self.rules.backend} and {self.rules.filesystem}"
                found.append(
                    (DiskCode.W02, f"the stripe is {stripe.kind} with {kind or 'a file system'}, the settings say {set_to}; it is used as it is")
                )
        unlisted = [verdict.disk.node for verdict in self.verdicts if verdict.disk.vendor_listed is False and not isinstance(verdict, Foreign)]
        if unlisted:
            found.append((DiskCode.W03, f"the cloud's list of local disks lacks {', '.join(unlisted)}"))
        return tuple(found)

    # -- nothing whole

    def _rebuild(self, stripes: tuple[Found, ...]) -> StripePlan:
        named = "; ".join(self._lost(stripe) for stripe in stripes)
        if not self.machine.settled and not all(stripe.broken and not self._doubted(stripe) for stripe in stripes):  # members may still come up
            return StripePlan(Case.C6, self.verdicts, f"{named}; waiting for them", waiting=True)
        if not self.rules.rebuild:
            return self.refuse(Case.C6, DiskCode.N01, named)
        for stripe in stripes:
            elsewhere = self.mounted_elsewhere(stripe)
            if elsewhere:
                return self.refuse(Case.C6, DiskCode.N07, elsewhere, stripe)
        steps = tuple(step for stripe in stripes for step in self.dissolve(stripe, unmount=True))
        then = ("make a new stripe of every blank disk", f"make an {self.rules.filesystem} file system", "mount it")
        case = Case.C11 if any(stripe.broken for stripe in stripes) else Case.C6
        return StripePlan(case, self.verdicts, f"cache lost: {named}", code=DiskCode.R01, steps=steps, then=then)

    def _doubted(self, stripe: Found) -> bool:
        """Whether a member of the array is there and only could not be judged just now: one look is not enough to give the stripe up."""
        unsure = {found.disk.name for found in self.bad}
        return any(unsure & set(array.members) for array in self._arrays(stripe))

    def _lost(self, stripe: Found) -> str:
        if stripe.broken:
            return stripe.broken
        return f"{stripe.expected - len(stripe.members)} of {stripe.expected} members of stripe {stripe.uuid} are missing"

    def dissolve(self, stripe: Found, *, unmount: bool) -> list[Step]:
        """The steps that turn a stripe's members into blank disks."""
        steps: list[Step] = []
        if unmount and stripe.number and any(layer.number == stripe.number for layer in self.machine.mounts):
            steps.append(Unmount(self.rules.mount))
        if stripe.kind is Kind.MD:
            steps += [StopArray(array.node) for array in self._arrays(stripe)]
        elif stripe.kind is Kind.LVM and stripe.uuid:
            steps.append(RemoveVolume(stripe.members))
        return [*steps, *(Release(member) for member in stripe.members)]

    def _create(self, disks: tuple[Blank, ...]) -> StripePlan:
        short = self._short(len(disks))
        if short and not self.machine.settled:
            return StripePlan(Case.C7, self.verdicts, f"{short}; waiting for them", waiting=True)
        if short:
            return self.refuse(Case.C7, DiskCode.D15, short)
        if self.machine.mounts:
            told = ", ".join(f"{layer.filesystem} on {layer.number}" for layer in self.machine.mounts)
            return self.refuse(Case.C7, DiskCode.N07, f"{self.rules.mount} is taken: {told}")
        sizes = sorted(blank.disk.size for blank in disks)
        if sizes[-1] - sizes[0] > sizes[-1] * _UNEQUAL and not self.rules.allow_unequal:
            told = ", ".join(f"{blank.disk.node} {human(blank.disk.size)}" for blank in disks)
            return self.refuse(Case.C7, DiskCode.D14, f"unequal disks ({told})")
        if len(disks) == 1:
            make = MakeFilesystem(disks[0], disks[0].disk.node, self.rules.filesystem)
            return StripePlan(Case.C12, self.verdicts, "one blank disk", steps=(make,), then=("mount it",), warnings=self._warnings(None))
        kind = Kind.LVM if self.rules.backend == "lvm" else Kind.MD
        create = CreateStripe(kind, disks)
        then = (f"make an {self.rules.filesystem} file system on it", f"mount it at {self.rules.mount}")
        return StripePlan(Case.C7, self.verdicts, f"{len(disks)} blank disks", steps=(create,), then=then, warnings=self._warnings(None))

    def _short(self, here: int) -> str | None:
        expected = (self.rules.expected or 0) - len(self.rules.failed)
        return f"found {here} of {expected} expected disks" if here < expected else None
