"""Disks that are not as they were: too few at the start, gone, back again, replaced, all of them new, or of unequal size."""

from __future__ import annotations

import pytest

from tests.node.conftest import MachineMaker
from tests.node.machine import MIB, Disk, disks
from tests.node.node import MOUNT, Node, answer

pytestmark = pytest.mark.slow
DATA = f"{MOUNT}/store/data"


@pytest.mark.parametrize("backend", ["md", "lvm"])
def test_members_come_and_go(machine: MachineMaker, backend: str) -> None:
    """The life of one node's disks, boot by boot."""
    node_machine = machine([*disks(3), Disk("DISK3", present=False)])
    flags = ("--backend", backend, "--settle-seconds", "1")

    def members(node: Node, report: dict[str, list[str]]) -> set[str]:
        serials = node.view().disks
        return {serials[member.removeprefix("/dev/")] for member in report["members"]}

    blank = node_machine.digests()
    with node_machine.boot() as guest:  # the fourth disk comes late
        node = Node(guest, *flags)
        short = node.refused("D15", "--expected-disks", "4")
        assert "found 3 of 4 expected disks" in short.report["reason"]
        assert node_machine.digests() == blank
        waiting = node.start("ensure", "--expected-disks", "4", "--settle-seconds", "60")
        guest.wait_for(lambda: "3 of 4 expected disks" in waiting.so_far().err, 30, "it did not wait for the fourth disk")
        assert node_machine.digests() == blank
        guest.plug("DISK3")
        made = answer(waiting)
        assert (made.status, made.report["outcome"]) == (0, "Created"), made
        node.agree(made.report)
        assert members(node, made.report) == {"DISK0", "DISK1", "DISK2", "DISK3"}
        node.write(DATA, (1 << 20,))
        guest.shutdown()
    old = node_machine.digests()

    with node_machine.boot(shuffle=1) as guest:  # and is gone at the next boot
        node = Node(guest, *flags)
        lost = node.refused("N01", "--on-lost", "refuse")
        assert "1 of 4 " in lost.report["reason"]
        assert node_machine.digests() == old
        made = node.ensure("Rebuilt")
        assert (made.report["code"], members(node, made.report)) == ("R01", {"DISK0", "DISK1", "DISK2"})
        assert "1 of 4 " in made.report["reason"]
        assert guest.run(f"ls {MOUNT}/store/data").status == 2
        sums = node.write(DATA, (1 << 20, 77))
        guest.shutdown()
    assert node_machine.digest_of("DISK3") == old["DISK3"]

    node_machine.disks[3].present = True
    with node_machine.boot(shuffle=2) as guest:  # it is back, with the stripe it knew
        node = Node(guest, *flags)
        found = node.disks("ensure")
        assert found.status == 0, found
        assert members(node, found.report) == {"DISK0", "DISK1", "DISK2"}
        assert node.sums(DATA) == sums
        guest.shutdown()
    assert node_machine.digest_of("DISK3") == old["DISK3"]

    node_machine.disks[1:] = [Disk("NEW1"), Disk("DISK2")]
    with node_machine.boot(shuffle=3) as guest:  # one of the three was replaced by a new one
        node = Node(guest, *flags)
        made = node.ensure("Rebuilt")
        assert (made.report["code"], members(node, made.report)) == ("R01", {"DISK0", "NEW1", "DISK2"})


def test_new_disks_and_unequal_ones(machine: MachineMaker) -> None:
    """A node that moved to other hardware begins anew; a larger disk among equals is refused until somebody decides."""
    node_machine = machine(3)
    with node_machine.boot() as guest:
        first = Node(guest).ensure("Created").report["fs_uuid"]
        guest.shutdown()
    node_machine.blank()
    node_machine.disks.append(Disk("BIG", size=640 * MIB))
    blank = node_machine.digests()
    with node_machine.boot(shuffle=1) as guest:
        node = Node(guest)
        refused = node.refused("D14")
        assert f"{node.device('BIG')} 671.1 MB" in refused.report["reason"]
        assert node_machine.digests() == blank
        anew = node.ensure("Created", "--disk-exclude", "BIG").report
        assert (anew["code"], anew["fs_uuid"] != first, len(anew["members"])) == (None, True, 3)
        guest.run("sync").check()
        assert node_machine.digest_of("BIG") == blank["BIG"]
        assert node.disks("teardown").report["outcome"] == "Removed"
        assert len(node.ensure("Created", "--allow-unequal").report["members"]) == 4
