"""What is not ours is not touched: one foreign disk among three blank ones, and not a byte of any of the four changes."""

from __future__ import annotations

import pytest

from tests.node import foreign
from tests.node.conftest import MachineMaker
from tests.node.machine import DIRECT_DISK, MIB, REMOTE_DISK, Disk
from tests.node.node import Node

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("things", [foreign.ON_THE_DISK, foreign.IN_USE], ids=["on-the-disk", "in-use"])
def test_nothing_is_written_beside_a_foreign_disk(machine: MachineMaker, things: tuple[foreign.Foreign, ...]) -> None:
    """Each thing in turn on the second of four disks: `ensure` refuses, and names the disk, the code and the owner."""
    four = machine(4)
    failures = []
    with four.boot() as guest:
        node = Node(guest)
        device = node.device("DISK1")
        for thing in things:
            guest.run(f"set -e; export D={device}; {thing.make}; sync; udevadm settle").check()
            before = four.digests()
            refusal = node.disks("ensure")
            guest.run("sync").check()
            told = f"{device} (serial DISK1): {thing.code} "
            needle = thing.needle.format(name=device.removeprefix("/dev/"))
            verdicts = dict.fromkeys(("DISK0", "DISK2", "DISK3"), ("blank", None)) | {"DISK1": ("refused", thing.code)}
            checks = {
                "refused": (refusal.status, refusal.report["outcome"], refusal.report["code"]) == (11, "Refused", "N03"),
                "verdicts": refusal.verdicts() == verdicts,
                "named": told in refusal.report["reason"] and needle in refusal.report["reason"],
                "untouched": four.digests() == before,
            }
            failures += [f"{thing.name}: {check}: {refusal.report}" for check, passed in checks.items() if not passed]
            guest.run(f"export D={device}; {thing.undo}; {foreign.ERASE}").check()
        assert failures == []
        # The rest is as blank as before: what refused was the foreign thing and nothing else.
        assert node.disks("plan").report["case"] == "C7"


def test_models_that_are_not_ours_to_use(machine: MachineMaker) -> None:
    """A remote disk, an unknown model, a small and an excluded disk are left alone beside a stripe of the others; a network disk is none at all."""
    odd = (Disk("REMOTE", model=REMOTE_DISK), Disk("UNKNOWN", model="Samsung SSD 980"), Disk("SMALL", size=64 * MIB), Disk("EXCLUDED"))
    six = machine([Disk("DISK0"), Disk("DISK1"), *odd])
    before = six.digests()
    with six.boot() as guest:
        guest.run(foreign.NETWORK_DISK).check()
        guest.until("grep -q FAR /sys/block/nvme*/device/serial")
        node = Node(guest, "--min-disk", "256MiB", "--disk-exclude", "EXCLUDED")
        small = node.refused("N03")
        assert small.verdicts() == {
            "DISK0": ("blank", None),
            "DISK1": ("blank", None),
            "REMOTE": ("not used", "D02"),
            "UNKNOWN": ("not used", "D03"),
            "SMALL": ("refused", "D05"),
            "EXCLUDED": ("not used", "D17"),
            "FAR": ("not used", "D01"),
        }
        far = {disk["reason"] for disk in small.report["disks"] if disk["serial"] == "FAR"}  # the disk, and the hidden path to it
        assert far == {"not a local NVMe namespace (transport=tcp)", "not a whole, visible NVMe namespace"}
        assert six.digests() == before
        node = Node(guest, "--min-disk", "256MiB", "--disk-exclude", "EXCLUDED", "--no-require-all")
        made = node.ensure("Created").report
        assert {node.view().disks[member.removeprefix("/dev/")] for member in made["members"]} == {"DISK0", "DISK1"}
        guest.run("sync").check()
        after = six.digests()
        assert {serial for serial in after if after[serial] != before[serial]} == {"DISK0", "DISK1"}


@pytest.mark.parametrize(("model", "code", "status"), [(REMOTE_DISK, "D02", 0), (DIRECT_DISK, "D08", 11)])
def test_the_root_disk_is_nvme(machine: MachineMaker, model: str, code: str, status: int) -> None:
    """A remote root disk is no hindrance; one that has an allowed model, as an ephemeral OS disk has, makes the node refuse."""
    three = machine(3, os_disk="nvme", os_model=model)
    before = three.digests()
    with three.boot() as guest:
        node = Node(guest)
        found = node.disks("ensure")
        assert found.status == status, found.report
        assert found.verdicts()["OSDISK"][1] == code
        if status:
            assert "mounted at /" in found.reason("OSDISK")
            assert three.digests() == before
        else:
            node.agree(found.report)
            assert len(found.report["members"]) == 3
        assert guest.run("touch /still-there; sync; echo 3 > /proc/sys/vm/drop_caches; md5sum /bin/bash").status == 0


def test_only_remote_disks(machine: MachineMaker) -> None:
    """A node that has lost its local disks to the cloud's own arrangement is told so."""
    remote = machine([Disk("REMOTE0", model=REMOTE_DISK), Disk("REMOTE1", model=REMOTE_DISK)])
    before = remote.digests()
    with remote.boot() as guest:
        found = Node(guest).refused("N00")
        assert "ephemeral OS disk" in found.report["reason"]
    assert remote.digests() == before
