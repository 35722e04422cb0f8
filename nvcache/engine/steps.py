"""Carries the steps of a plan out, on the real disks. It decides nothing and believes no exit status: the next look at the machine tells.

Directly before a disk is written to, it is proven once more to be the disk that was decided about, by its serial number and its bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from nvcache.core.content import ENDS, Content, Kind
from nvcache.core.disk_codes import DiskCode
from nvcache.core.disks import Blank, Ours, Rules, pv_uuid
from nvcache.core.stripe import (
    ActivateVolume,
    AssembleArray,
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
    Unmount,
    WriteMarker,
)
from nvcache.engine import clock
from nvcache.engine.scan import MARKER, Scanner
from nvcache.errors import Code, DiskError
from nvcache.system import filesystem, lvm, mdadm, probe

log = logging.getLogger(__name__)

CHUNK_KIB = 512  # of an md array
DATA = 1 << 20  # where on its disks a stripe's data begins, md's (told so) as LVM's (its default)
LVM_STRIPE_KIB = 256
_UNMOUNT = 20.0  # seconds; a disk that does not answer keeps umount for ever, and the mount is out of sight by then
_ORDER = ("Unchanged", "Mounted", "Assembled", "Created", "Rebuilt")
_DAMAGED = ("Structure needs cleaning", "Bad message")  # how mount(8) tells EUCLEAN and EBADMSG
_INVALID = "bad superblock"  # and EINVAL: a half-made ext4, but also a good file system with a feature that this kernel lacks


class Steps:
    """One run of steps: what it made, what it did, what went wrong last."""

    def __init__(self, scanner: Scanner, locks: ExitStack, *, say: Callable[[str], None], furnish: Callable[[], None], lazy: bool) -> None:
        """`lazy`: a mount that somebody uses is taken out of sight rather than left; what holds it is told when its disks cannot be freed."""
        self._scanner, self._tools, self._kernel, self._rules = scanner, scanner.tools, scanner.kernel, scanner.rules
        self._locks, self._say, self._furnish, self._lazy = locks, say, furnish, lazy
        self._locked: set[str] = set()
        self._made: set[str] = set()  # kernel names of the disks of what this run created and has not formatted yet
        self._unmountable: set[str] = set()
        self.did: list[str] = []
        self.lost: str | None = None
        self.outcome = "Unchanged"
        self.failure: DiskError | None = None

    def lock(self) -> None:
        """Lock every disk that may be changed against udev; those that came up meanwhile as well. Raises `DiskError` (disks-busy)."""
        for node in [disk.node for disk in self._scanner.candidates() if disk.node not in self._locked]:
            try:
                self._locks.enter_context(probe.locked([node]))
            except DiskError as error:
                if error.code is Code.DISKS_BUSY:
                    raise
                log.warning("%s", error)  # a failing disk: the scan says so too, and nothing is written to it
            self._locked.add(node)

    def decide(self, decider: Callable[[Machine, Rules], StripePlan], *, settled: bool) -> tuple[Machine, StripePlan]:
        """Look and decide, while every disk is held."""
        self.lock()
        with self._scanner.look() as seen:
            made = {disk.content.uuid for disk in seen.disks if disk.name in self._made and disk.content and disk.content.uuid}
            if seen.volume is not None and self._made & set(seen.volume.members):
                made.add(seen.volume.vg_uuid)
            machine = replace(seen, settled=settled, made=frozenset(made), unmountable=frozenset(self._unmountable))
            return machine, decider(machine, self._rules)

    def carry_out(self, plan: StripePlan) -> bool:
        """The plan's steps in order, and whether all went well; after one that fails, the rest is left to the next look."""
        if plan.code is DiskCode.R01:
            self.lost, self.outcome = plan.reason, "Rebuilt"
            log.warning("%s %s", plan.code, plan.reason)
        for step in plan.steps:
            self._say(str(step))
            try:
                self._do(step)
            except DiskError as error:
                if error.code is not Code.TOOL_FAILED:
                    raise
                log.warning("cannot %s: %s", step, error)
                self.failure = error
                return False
            self.did.append(str(step))
        return True

    def _outcome(self, name: str) -> None:
        self.outcome = max(self.outcome, name, key=_ORDER.index)

    def _do(self, step: Step) -> None:
        tools = self._tools
        match step:
            case StopArray(node):
                self._stop(node)
            case AssembleArray(uuid, members):
                self._outcome("Assembled")
                filesystem.modprobe(tools, "raid0")
                mdadm.assemble(tools, self._kernel, uuid, [member.disk.node for member in members])
            case ActivateVolume(_, members):
                self._outcome("Assembled")
                filesystem.modprobe(tools, "dm_mod")
                for member in members:
                    probe.unclaim(member.disk.node, member.disk.serial)
                lvm.activate(tools, [member.disk.node for member in members])
            case RemoveVolume(members):
                self._remove(members)
            case Release(member):
                self._release(member)
            case CreateStripe(kind, blanks):
                self._outcome("Created")
                self._create(kind, blanks)
            case MakeFilesystem():
                self._outcome("Created")
                self._format(step)
            case MountStripe(node, point, kind):
                self._outcome("Mounted")
                self._mount(node, point, kind)
            case Unmount(point):
                self.unmount(point)
            case WriteMarker(point, uuid):
                self._furnish()
                try:
                    _write_marker(Path(point) / MARKER, uuid)
                except OSError as error:
                    raise DiskError(Code.DISK_IO, f"cannot write the marker at {point}: {error.strerror}") from error

    def _stop(self, node: str) -> None:
        done = mdadm.stop(self._tools, self._kernel, node)
        left = next((array for array in self._kernel.arrays() if array.node == node), None)
        if left is not None and left.members:
            raise self._in_use(f"stop the array {node}", left.number, done.said)

    def _remove(self, members: Sequence[Ours]) -> None:
        nodes = [member.disk.node for member in members]
        try:
            lvm.remove_group(self._tools, nodes)
        except DiskError as error:
            left = lvm.group(self._tools, nodes) if error.code is Code.TOOL_FAILED else None
            if left is not None and left.number is not None:
                raise self._in_use("remove our volume group", left.number, str(error)) from error
            if error.code is not Code.TOOL_FAILED:
                raise
            # A power cut may leave metadata that LVM refuses to change. The group is not active: it goes with the labels, which are erased next.
            log.warning("%s", error)

    def _release(self, member: Ours) -> None:
        if member.disk.content is None:  # it would not be Ours
            raise DiskError(Code.DISKS_REFUSED, f"cannot release {member.disk.node}: its content is unknown")
        with probe.held([member.disk.node]) as handles:
            free = handles[member.disk.node] is not None
        if not free:
            raise self._in_use(f"release {member.disk.node}", member.disk.number, "the kernel holds it")
        probe.clear(member.disk.node, member.disk.content)

    def _in_use(self, doing: str, number: str, why: str) -> DiskError:
        """The error for what somebody holds, with who that is."""
        users = filesystem.holders(self._kernel.proc, number)
        return DiskError(Code.IN_USE, f"cannot {doing}: {', '.join(users) or 'something'} uses it ({why})", facts={"users": users})

    def _create(self, kind: Kind, blanks: tuple[Blank, ...]) -> None:
        self._prove_blank(blanks)
        self._made = {blank.disk.name for blank in blanks}
        filesystem.modprobe(self._tools, "raid0" if kind is Kind.MD else "dm_mod")
        for blank in blanks:
            # Of an earlier life, where the stripe's data will begin: it must not come up as the new stripe's own, should the power go now.
            probe.clear(blank.disk.node, blank.disk.content or Content(Kind.BLANK), head=DATA + ENDS)
        serials = {blank.disk.node: blank.disk.serial for blank in blanks}
        if kind is Kind.MD:
            mdadm.create(self._tools, self._kernel, list(serials), chunk_kib=CHUNK_KIB)
            return
        with probe.claimed(serials):  # a salt for each: two namespaces of one disk have its serial number in common
            lvm.create_volumes(self._tools, [(node, pv_uuid(serial, os.urandom(8).hex())) for node, serial in serials.items()])
        lvm.create_group(self._tools, list(serials), stripe_kib=LVM_STRIPE_KIB)

    def _prove_blank(self, blanks: Sequence[Blank]) -> None:
        """Once more, directly before the write: the same disks by serial number, still blank, still nobody's."""
        now = {disk.name: disk for disk in self._kernel.disks()}
        with probe.held([blank.disk.node for blank in blanks]) as handles:
            for blank in blanks:
                disk = blank.disk
                same = now.get(disk.name)
                if same is None or (same.serial, same.size) != (disk.serial, disk.size) or handles[disk.node] is None:
                    raise DiskError(Code.DISKS_REFUSED, f"cannot use {disk.node}: it is no longer the free disk it was a moment ago")
                if probe.read_content(disk.node) != disk.content:
                    raise DiskError(Code.DISKS_REFUSED, f"cannot use {disk.node}: somebody wrote to it a moment ago")

    def _format(self, step: MakeFilesystem) -> None:
        if isinstance(step.on, Blank):
            self._prove_blank([step.on])
        elif step.clear:
            probe.clear(step.node, probe.read_content(step.node))
        striped = isinstance(step.on, Found) and step.on.kind is Kind.MD
        with probe.claimed({step.node: step.on.disk.serial} if isinstance(step.on, Blank) else {}):
            filesystem.make(self._tools, step.node, step.kind, striped=striped)
        self._made = set()
        self._unmountable = set()

    def _mount(self, node: str, point: str, kind: str) -> None:
        real = os.path.realpath(point)
        if real != point:  # the kernel would name the mount otherwise, and it might be a directory of the system
            raise DiskError(Code.DISKS_REFUSED, f"cannot mount at {point}: a symbolic link leads from there to {real}", hint=f"set mount = {real}")
        Path(point).mkdir(mode=0o000, parents=True, exist_ok=True)  # nobody fills the directory below while nothing is mounted on it
        filesystem.seal(Path(point), sealed=True)
        found = self._kernel.device(node)
        with probe.held([node]) as handles:
            free = handles[node] is not None
        if not free and found is not None:
            raise self._in_use(f"mount {node}", found[1], "it is mounted in a place that cannot be seen from here")
        for disk in self._kernel.disks():
            if disk.node == node:  # one that has the file system on itself, the only ones that are claimed for it
                probe.unclaim(node, disk.serial)
        filesystem.modprobe(self._tools, kind)
        try:
            filesystem.mount(self._tools, node, point, kind)
        except DiskError as error:
            damaged = any(sign in str(error) for sign in _DAMAGED) or (_INVALID in str(error) and probe.unused(node))
            if error.code is not Code.TOOL_FAILED or not damaged or not self._kernel.knows(kind):
                raise
            seen = probe.blkid(self._tools, node)
            log.warning("the file system of our stripe is damaged: %s", error)
            if seen.uuid:
                self._unmountable.add(seen.uuid)

    def unmount(self, point: str) -> None:
        """Unmount what is at `point`. Raises `DiskError`: in-use with the users, unless the run is a lazy one."""
        number = next((mount.number for mount in self._kernel.mounts() if mount.point == point), "")
        try:
            filesystem.unmount(self._tools, point, timeout=_UNMOUNT)
        except DiskError as error:
            if error.code is not Code.TOOL_FAILED:
                raise
            busy = self._in_use(f"unmount {point}", number, "it is busy")
            if not self._lazy:
                raise busy from error
            log.warning("%s; it is taken out of sight", busy)
            filesystem.unmount(self._tools, point, lazy=True, timeout=_UNMOUNT)


def _write_marker(path: Path, uuid: str) -> None:
    """Atomically: a marker is there whole or not at all."""
    text = json.dumps({"format": 1, "stripe": uuid, "made": clock.stamp(), "node": os.uname().nodename}) + "\n"
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
