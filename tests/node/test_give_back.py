"""Teardown and wipe take what they were told to and no more; `ensure` repeated changes nothing; two at once do not meet."""

from __future__ import annotations

import pytest

from tests.node.conftest import MachineMaker
from tests.node.guest import Guest
from tests.node.machine import Disk, disks
from tests.node.node import MOUNT, Node, answer

pytestmark = pytest.mark.slow
_THEIRS = (
    "set -e; mdadm --create /dev/md/theirs --run --homehost=any --name=theirs --level=1 --raid-devices=2 {ARRAY} missing;"
    " vgcreate -q theirs {GROUP}; lvcreate -q -y -l 4 -n data theirs; mkfs.ext4 -q -F -L theirs {PLAIN};"
    " sync; udevadm settle; until grep -qx clean /sys/block/md*/md/array_state; do sleep 0.1; done; sync"
)
OTHERS = ("ARRAY", "GROUP", "PLAIN")


def make_theirs(guest: Guest, node: Node) -> None:
    """An active array, an active volume group and a file system, of somebody else's, each on a disk of an allowed model."""
    guest.run(_THEIRS.format(**{serial: node.device(serial) for serial in OTHERS})).check()


@pytest.mark.parametrize("backend", ["md", "lvm"])
def test_ours_and_no_other(machine: MachineMaker, backend: str) -> None:
    """Beside arrays, groups and file systems of others: made by one of two at once, unchanged the second time, given back blank."""
    node_machine = machine([*disks(2), *map(Disk, OTHERS)])
    blank = node_machine.digest_of("DISK0")

    def theirs() -> list[str]:
        return [node_machine.digest_of(serial) for serial in OTHERS]

    with node_machine.boot() as guest:
        guest.run("modprobe xfs && echo 720000 > /proc/sys/fs/xfs/xfssyncd_centisecs").check()  # XFS writes nothing of its own accord
        node = Node(guest, "--backend", backend, "--no-require-all")
        make_theirs(guest, node)
        before = theirs()

        first, second = node.start("ensure"), node.start("ensure")
        won, lost = sorted((answer(first), answer(second)), key=lambda each: each.status)
        assert (won.status, won.report["outcome"]) == (0, "Created"), won
        assert (lost.status, lost.report["outcome"], lost.report["code"]) == (10, "Refused", "D13"), lost
        node.agree(won.report)

        guest.run("sync").check()
        made = node_machine.digests()
        assert [made[serial] for serial in OTHERS] == before
        again = node.ensure("Unchanged").report
        assert (again["steps"], again["fs_uuid"], again["code"]) == ([], won.report["fs_uuid"], None)
        guest.run("sync").check()
        assert node_machine.digests() == made

        # While somebody uses it, it is not given back; a dry run gives nothing back either.
        holder = guest.start(f"cd {MOUNT} && exec sleep 600")
        guest.until("pgrep -x sleep")
        assert node.disks("teardown", "--dry-run").report["outcome"] == "Planned"
        refused = node.disks("teardown")
        assert (refused.status, refused.report["outcome"], refused.report["code"]) == (11, "Refused", "N04"), refused
        assert "sleep" in refused.report["reason"]
        node.ensure("Unchanged")
        holder.signal("KILL")

        assert node.disks("teardown").report["outcome"] == "Removed"
        guest.run("sync").check()
        assert theirs() == before
        assert [node.blkid(serial) for serial in ("DISK0", "DISK1")] == [(2, "")] * 2
        assert node.view().built_of(("DISK0", "DISK1")) == []
        assert node.disks("teardown").report["outcome"] == "Unchanged"
        assert blank not in (node_machine.digest_of("DISK0"), node_machine.digest_of("DISK1"))  # what names the contents is gone, not the contents


def test_wipe_by_serial(machine: MachineMaker) -> None:
    """It erases the disk that was named, only when told twice, and never one that somebody uses."""
    node_machine = machine([*disks(1), *map(Disk, OTHERS), Disk("UNKNOWN", model="Samsung SSD 980")])
    with node_machine.boot() as guest:
        node = Node(guest)
        make_theirs(guest, node)
        before = node_machine.digests()
        assert node.disks("wipe", "--serial", "PLAIN").report["outcome"] == "Planned"
        for serial, code in (("ARRAY", "D07"), ("GROUP", "D07"), ("UNKNOWN", "D03"), ("NOBODY", "no NVMe disk has this serial number")):
            refused = node.disks("wipe", "--serial", serial, "--yes-destroy")
            assert (refused.status, refused.report["outcome"]) == (11, "Refused"), refused
            assert code in refused.report["reason"]
        both = node.disks("wipe", "--serial", "PLAIN", "--serial", "ARRAY", "--yes-destroy")
        assert both.status == 11
        guest.run("sync").check()
        assert node_machine.digests() == before
        wiped = node.disks("wipe", "--serial", "PLAIN", "--yes-destroy")
        assert (wiped.status, wiped.report["outcome"]) == (0, "Wiped"), wiped
        assert (node.blkid("PLAIN"), wiped.verdicts()["PLAIN"]) == ((2, ""), ("blank", None))
        guest.run("sync").check()
        after = node_machine.digests()
        assert {serial for serial in after if after[serial] != before[serial]} == {"PLAIN"}
