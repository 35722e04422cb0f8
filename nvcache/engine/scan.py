"""One look at the machine: gathers the facts `core.decide` decides from. It writes to no disk and decides nothing.

What sysfs alone refuses is never opened. The rest is opened exclusively, all disks together, and read while it is held; what an array of ours holds
is read without that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from nvcache.core.content import Content, Kind
from nvcache.core.disks import MD_NAME, DiskFacts, Mount, Rules, refused_unseen
from nvcache.core.stripe import ArrayFacts, Machine, TopFacts, VolumeFacts
from nvcache.errors import DiskError
from nvcache.system import lvm, probe
from nvcache.system.patience import within
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel

MARKER = ".nvcache.json"
_READ_SECONDS = 10.0


@dataclass
class Scanner:
    """Looks at the disks under the operator's rules."""

    tools: Tools
    kernel: Kernel
    rules: Rules

    def candidates(self) -> list[DiskFacts]:
        """The disks that sysfs does not refuse: those that are opened, and locked before anything is changed."""
        return [disk for disk in self.kernel.disks() if refused_unseen(disk, self.rules) is None]

    @contextmanager
    def look(self) -> Iterator[Machine]:
        """Everything there is. The disks stay held exclusively until the context is left: nobody can take one while it is decided about."""
        disks = self.kernel.disks()
        wanted = [disk for disk in disks if refused_unseen(disk, self.rules) is None]
        with ExitStack() as holding:
            seen = {disk.name: self._examine(disk, holding) for disk in wanted}
            members = [disk.node for disk in seen.values() if disk.content is not None and disk.content.kind is Kind.LVM]
            volume = lvm.group(self.tools, members) if members else None
            known = lvm.physical_volumes(self.tools, members) if members else {}
            examined = tuple(replace(found, pv=known.get(found.node)) if (found := seen.get(disk.name)) else disk for disk in disks)
            yield self._machine(examined, volume)

    def _examine(self, disk: DiskFacts, holding: ExitStack) -> DiskFacts:
        """The disk with what both witnesses say; one that is failing is told so, and keeps nobody from looking at the others."""
        exclusive = None
        try:
            if not (disk.holders or disk.mounts):
                exclusive = holding.enter_context(probe.held([disk.node]))[disk.node] is not None
            if exclusive is False:
                return replace(disk, exclusive=False)
            content = probe.read_content(disk.node, timeout=_READ_SECONDS)
        except DiskError as error:
            return replace(disk, exclusive=exclusive, unreadable=str(error))
        return replace(disk, exclusive=exclusive, content=content, probe=probe.blkid(self.tools, disk.node))

    def _machine(self, disks: Sequence[DiskFacts], volume: VolumeFacts | None) -> Machine:
        arrays = tuple(self._named(array, disks) for array in self.kernel.arrays())
        mounts = self.kernel.mounts()
        here = tuple(mount for mount in mounts if mount.point == self.rules.mount)
        # Bind mounts of a part of it (a pod's volume) are users of the stripe, not a second place for it.
        elsewhere = tuple((mount.number, mount.point) for mount in mounts if mount.point != self.rules.mount and mount.root == "/")
        tops = [(array.name, array.node, array.number) for array in arrays if array.label == MD_NAME and array.state not in ("inactive", "clear")]
        if volume is not None and volume.name and volume.node and volume.number:
            tops.append((volume.name, volume.node, volume.number))
        tops += [(disk.name, disk.node, disk.number) for disk in disks if disk.content is not None and disk.content.kind in (Kind.XFS, Kind.EXT4)]
        return Machine(
            disks=tuple(disks),
            arrays=arrays,
            volume=volume,
            tops=tuple((name, self._top(node, number, here)) for name, node, number in tops),
            mounts=here,
            elsewhere=elsewhere,
            marker=self.marker() if here else None,
        )

    def _named(self, array: ArrayFacts, disks: Sequence[DiskFacts]) -> ArrayFacts:
        """The array with the name and UUID that a member's superblock gives it."""
        contents = {disk.name: disk.content for disk in disks}
        for name in array.members:
            content = contents.get(name)
            if content is None:
                try:
                    content = probe.read_content(f"/dev/{name}", timeout=_READ_SECONDS)
                except DiskError:
                    continue  # gone or failing; another member may tell
            if content.kind is Kind.MD:
                return replace(array, uuid=content.uuid, label=content.label)
        return array

    def _top(self, node: str, number: str, here: Sequence[Mount]) -> TopFacts:
        content: Content | None = None
        if not any(mount.number == number for mount in here):  # a mounted one is judged by its marker
            try:
                content = probe.read_content(node, timeout=_READ_SECONDS)
            except DiskError:
                content = None
        found = self.kernel.device(node)
        return TopFacts(node, number, found[2] if found else 0, probe.blkid(self.tools, node), content)

    def marker(self) -> str | None:
        """The stripe's UUID that the marker file names; None without a file, "" for one that says nothing. Raises `DiskError` (disk-stalled)."""

        def read() -> str | None:
            try:
                with open(f"{self.rules.mount}/{MARKER}", "rb") as file:  # noqa: PTH123 - a bounded read of what may be hostile
                    found = json.loads(file.read(65536))
            except FileNotFoundError:
                return None
            except (ValueError, OSError):
                return ""
            stripe = found.get("stripe") if isinstance(found, dict) else None
            return stripe if isinstance(stripe, str) else ""

        return within(_READ_SECONDS, f"read the marker at {self.rules.mount}", read)
