"""The instrument itself: what the other tests of this folder take for granted about the virtual machine. It runs nothing of nvcache."""

from __future__ import annotations

import pytest

from tests.node.conftest import MachineMaker
from tests.node.guest import GuestFailed
from tests.node.machine import DIRECT_DISK, Disk
from tests.node.node import Node

pytestmark = pytest.mark.slow


def test_hardware(machine: MachineMaker) -> None:
    """Disks have the names, serials and models asked for; they are plugged, unplugged, slowed, stalled and broken; images tell what was written."""
    four = machine([Disk("DISK0"), Disk("DISK1", model="Some Other Disk"), Disk("DISK2"), Disk("LATER", present=False)], hostname="rack7")
    blank = four.digests()
    assert len(set(blank.values())) == 1
    with four.boot(shuffle=1) as guest:
        node = Node(guest)
        names = node.view().disks
        assert set(names.values()) == {"DISK0", "DISK1", "DISK2"}
        assert list(names.values()) != sorted(names.values())
        assert guest.run("hostname; cat /sys/block/nvme*/device/model").check().split("\n") == [
            "rack7",
            *(f"{model:40}" for model in ("Some Other Disk" if serial == "DISK1" else DIRECT_DISK for serial in names.values())),
            "",
        ]
        first, second = node.device("DISK0"), node.device("DISK1")
        read = "dd if={} of=/dev/null bs=4k count=1 iflag=direct skip={}"
        guest.eio("DISK1", 8, 8)
        assert [guest.run(read.format(second, block)).status for block in (0, 1, 2)] == [0, 1, 0]
        guest.heal("DISK1")
        assert guest.run(read.format(second, 1)).status == 0
        guest.stall("DISK1")
        reading = guest.start(read.format(second, 3))
        with pytest.raises(GuestFailed, match="did not end"):
            reading.wait(1)
        guest.heal("DISK1")
        assert reading.wait(5).status == 0
        assert (
            guest.run(f"vmctl rate DISK0 4194304; TIMEFORMAT=%R; time dd if={first} of=/dev/null bs=1M count=4 iflag=direct 2>&1").err.strip() > "0.9"
        )
        assert four.digests() == blank
        guest.run(
            f"vmctl rate DISK0 0; printf x | dd of={first} bs=1 seek=65536 conv=fsync; dd if=/dev/zero of={second} bs=1M count=1 oflag=direct"
        ).check()
        written = four.digests()
        assert [serial for serial in written if written[serial] != blank[serial]] == ["DISK0"]
        guest.unplug("DISK1")
        guest.plug("LATER")
        guest.until("grep -q LATER /sys/block/nvme*/device/serial")
        assert set(node.view().disks.values()) == {"DISK0", "DISK2", "LATER"}
        job = guest.start("echo before; vmctl powercut; echo after")
        with pytest.raises(GuestFailed):
            job.wait()
        assert job.so_far().out == "before\n"
    assert four.digests() == written


def test_two_boots_and_a_root_disk_that_is_nvme(machine: MachineMaker) -> None:
    """What was written is there at the next boot; the root disk is as new; a machine can boot from NVMe."""
    one = machine(1)
    with one.boot() as guest:
        guest.run(f"printf kept > {Node(guest).device('DISK0')}; touch /etc/gone").check()
        guest.shutdown()
    one.os_disk = "nvme"
    with one.boot() as guest:
        view = Node(guest).view()
        assert set(view.disks.values()) == {"DISK0", "OSDISK"}
        assert guest.run(f"head -c 4 {Node(guest).device('DISK0')}").check() == "kept"
        assert guest.run("test -e /etc/gone").status == 1
        assert guest.nvcache("--version").wait().check().startswith("nvcache ")
