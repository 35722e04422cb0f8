"""The hardware a test describes: NVMe disks with sizes, serials, models and speeds, whose images outlive a boot. What happens in a boot is `guest`.

`digest_of` and `digests` look at the images from outside: a witness, independent of everything in the guest, of what was written.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.node.guest import Guest, Plug
from tests.node.image import CHECKOUT, image
from tests.node.nbd import digest

MIB = 1 << 20
DIRECT_DISK = "Microsoft NVMe Direct Disk v2"
REMOTE_DISK = "MSFT NVMe Accelerator v1.0"


@dataclass(slots=True)
class Disk:
    """One NVMe disk. `size` in bytes, `rate` in bytes a second (0: unlimited). One that is not `present` has a port and no disk at boot."""

    serial: str
    size: int = 512 * MIB
    model: str = DIRECT_DISK
    rate: int = 0
    present: bool = True


def disks(count: int, *, size: int = 512 * MIB, rate: int = 0) -> list[Disk]:
    """That many equal disks, DISK0 and on."""
    return [Disk(f"DISK{number}", size=size, rate=rate) for number in range(count)]


class Machine:
    """Disks, and a root disk that is as new at every boot. `folder` keeps the images; `boot` may be called again once the last guest has gone.

    `disks`, `hostname` and `os_disk` may be changed between boots: a disk with a new serial is a new, blank disk.
    """

    def __init__(
        self,
        folder: Path,
        disks: Iterable[Disk],
        *,
        os_disk: Literal["virtio", "nvme"] = "virtio",
        os_model: str = REMOTE_DISK,
        hostname: str = "node",
        memory: str = "1G",
        cpus: int = 2,
        shares: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.disks = list(disks)
        self.os_disk: Literal["virtio", "nvme"] = os_disk
        self.os_model = os_model
        self.hostname = hostname
        self.memory = memory
        self.cpus = cpus
        self.shares = {"repo": CHECKOUT, **(shares or {})}  # by tag, below /mnt, read-only
        self.witness: Callable[[str, int, bytes | None], None] = lambda serial, at, data: None  # of all writes and flushes, see `nbd`
        self._boots = 0
        folder.mkdir(parents=True, exist_ok=True)

    def boot(self, *, shuffle: int | None = None) -> Guest:
        """Start it and wait until commands can be run (about 6 s). `shuffle` puts the disks into ports, and so under names, by that seed."""
        for disk in self.disks:
            self._make(disk)
        ports = list(range(len(self.disks)))
        if shuffle is not None:
            random.Random(shuffle).shuffle(ports)
        self._boots += 1
        plugs = {
            disk.serial: Plug(self.image_of(disk.serial), port, disk.model, disk.rate, disk.present)
            for disk, port in zip(self.disks, ports, strict=True)
        }
        return Guest(
            self.folder / f"boot{self._boots}",
            image(),
            plugs,
            os_model=self.os_model if self.os_disk == "nvme" else None,
            hostname=self.hostname,
            memory=self.memory,
            cpus=self.cpus,
            shares=self.shares,
            witness=self.witness,
        )

    def image_of(self, serial: str) -> Path:
        """The image of a disk."""
        return self.folder / f"{serial}.img"

    def blank(self, *serials: str) -> None:
        """Make disks (all, unless some are named) as new: what a node finds after it moved to another host."""
        for serial in serials or self.serials:
            self.image_of(serial).unlink(missing_ok=True)

    def flip(self, serial: str, at: int, length: int = 4096) -> None:
        """Invert bytes of an image: silent corruption."""
        with self.image_of(serial).open("r+b") as file:
            found = os.pread(file.fileno(), length, at)
            os.pwrite(file.fileno(), bytes(byte ^ 0xFF for byte in found), at)

    def digest_of(self, serial: str) -> str:
        """The digest of a disk's content; a disk that was never plugged in counts as blank."""
        disk = next(each for each in self.disks if each.serial == serial)
        self._make(disk)
        return digest(self.image_of(serial))

    def digests(self) -> dict[str, str]:
        """The digest of every disk's content, by serial."""
        return {serial: self.digest_of(serial) for serial in self.serials}

    @property
    def serials(self) -> Sequence[str]:
        """Of all disks, in their order."""
        return [disk.serial for disk in self.disks]

    def _make(self, disk: Disk) -> None:
        path = self.image_of(disk.serial)
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(disk.size)
