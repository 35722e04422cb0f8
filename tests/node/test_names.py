"""A stripe is found whatever the kernel and udev made of it: other device names, another array name, half assembled, on a host of another name."""

from __future__ import annotations

import pytest

from tests.node.conftest import MachineMaker
from tests.node.node import MOUNT, Node

pytestmark = pytest.mark.slow


def test_whatever_the_boot_made_of_the_array(machine: MachineMaker) -> None:
    """The same array met as udev assembled it, not assembled, stopped, inactive for want of members, under a foreign name, on a renamed host."""
    node_machine = machine(4, hostname="made-here")
    with node_machine.boot() as guest:
        node = Node(guest)
        made = node.ensure("Created").report
        sums = node.write(f"{MOUNT}/store/data", (1 << 20, 12345))
        names = node.view().disks
        guest.shutdown()

    node_machine.hostname = "elsewhere"
    with node_machine.boot(shuffle=1) as guest:
        node = Node(guest)
        view = node.view()
        assert view.disks != names
        assert sorted(view.disks.values()) == sorted(names.values())
        (auto,) = view.built
        assert (auto.name, auto.state, auto.label) == ("md127", "clean", "raid0")  # udev was first

        def again(outcome: str, *steps: str) -> None:
            found = node.ensure(outcome).report
            assert (found["fs_uuid"], found["code"]) == (made["fs_uuid"], None)
            assert [step for step in steps if not any(step in each for each in found["steps"])] == [], found["steps"]
            assert node.sums(f"{MOUNT}/store/data") == sums

        again("Mounted", "mount /dev/md127")
        guest.run(f"umount {MOUNT} && mdadm --stop /dev/md127 && udevadm settle").check()
        again("Assembled")
        # Only some members were there when udev looked: an inactive array that holds them.
        guest.run(f"umount {MOUNT} && mdadm --stop /dev/md127 && udevadm settle").check()
        guest.run(f"mdadm --incremental {node.device('DISK2')}; mdadm --incremental {node.device('DISK0')}; udevadm settle")
        (half,) = node.view().built
        assert (half.state, half.members) == ("inactive", {"DISK0", "DISK2"})
        again("Assembled", f"stop the array /dev/{half.name}")
        # Started by hand under another name, with the members in another order.
        guest.run(f"umount {MOUNT} && mdadm --stop /dev/md127 && udevadm settle").check()
        guest.run(f"mdadm --assemble /dev/md5 {' '.join(map(node.device, ('DISK3', 'DISK0', 'DISK2', 'DISK1')))}; udevadm settle").check()
        assert [built.name for built in node.view().built] == ["md5"]
        again("Mounted", "mount /dev/md5")


def test_a_host_without_udev(machine: MachineMaker) -> None:
    """Nobody makes device links and nobody assembles anything: md and LVM stripes are made and found all the same, and given back."""
    with machine(2).boot() as guest:
        guest.run("udevadm control --exit; until ! pgrep -x systemd-udevd; do sleep 0.1; done; rm -r /run/udev").check()
        for backend, stop in (("md", "mdadm --stop /dev/md127"), ("lvm", "DM_DISABLE_UDEV=1 vgchange -an nvcache")):
            node = Node(guest, "--backend", backend)
            node.ensure("Created")
            sums = node.write(f"{MOUNT}/store/data", (1 << 20,))
            guest.run(f"umount {MOUNT} && {stop}").check()
            assert node.view().built_of(("DISK0", "DISK1")) == []
            node.ensure("Assembled")
            assert node.sums(f"{MOUNT}/store/data") == sums
            assert node.disks("teardown").report["outcome"] == "Removed"
            assert [node.blkid(serial) for serial in ("DISK0", "DISK1")] == [(2, "")] * 2
