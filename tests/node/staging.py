"""Changes the disks under a running guest, which then meets them as after a boot. Says nothing about what is put on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.node.guest import Guest
from tests.node.machine import Machine
from tests.node.node import MOUNT

# Without udevd, which would assemble again what was just stopped, from disks that are about to be others; a new one, as after a boot, meets those.
_LET_GO = (
    f"udevadm settle --timeout=20; pkill -9 udev; umount {MOUNT}; mdadm -q --stop --scan; dmsetup remove_all --noudevsync; rm -rf /dev/nvcache; "
    "! ls -d /sys/block/md* /sys/block/dm-* 2>/dev/null"
)
_AS_AFTER_A_BOOT = (
    "blockdev --flushbufs /dev/nvme*n1; rm -rf /run/udev/data/b*; /lib/systemd/systemd-udevd --daemon; "
    "udevadm trigger --action=add --subsystem-match=block; "
    "udevadm settle --timeout=60 || udevadm settle --timeout=60"  # the first may have reached the one that was killed ("Broken pipe")
)


@contextmanager
def restaged(guest: Guest) -> Iterator[None]:
    """Inside, nothing in the guest uses the disks and their images may be changed; afterwards udev meets them as new ones."""
    guest.run(_LET_GO).check()
    yield
    guest.run(_AS_AFTER_A_BOOT).check()


def blank(machine: Machine, serial: str) -> None:
    """Make a disk blank that is plugged in."""
    size = next(disk.size for disk in machine.disks if disk.serial == serial)
    os.truncate(machine.image_of(serial), 0)
    os.truncate(machine.image_of(serial), size)
