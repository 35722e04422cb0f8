"""A stripe is made of blank disks, filled, and found again after a reboot under other device names, with every byte right and its queues set anew."""

from __future__ import annotations

from typing import Any

import pytest

from tests.node.conftest import MachineMaker
from tests.node.guest import Guest
from tests.node.node import MOUNT, Node

pytestmark = pytest.mark.slow
# With the two of test_serve, every pair of backend, file system and count comes once; one disk is neither md nor lvm.
COMBINATIONS = (("lvm", "ext4", 4), ("md", "ext4", 8), ("lvm", "xfs", 8), ("md", "xfs", 2), ("md", "ext4", 1), ("md", "xfs", 1))
TABLE = """
[tuning.md]
read_ahead = "6MiB"
rq_affinity = 2
[tuning.lvm]
read_ahead = "2MiB"
scheduler = "kyber"
[tuning.disk]
rq_affinity = 0
"""
WANTED: dict[str, dict[str, int | str]] = {
    "md": {"read_ahead": 6 << 20, "scheduler": "none", "rq_affinity": 2},
    "lvm": {"read_ahead": 2 << 20, "scheduler": "kyber"},
    "disk": {"read_ahead": 4 << 20, "scheduler": "none", "rq_affinity": 0},
}
IMPOSSIBLE = '[tuning.md]\nscheduler = "nope"\n[tuning.lvm]\nscheduler = "nope"\n[tuning.disk]\nscheduler = "nope"\n'
RULE = 'ACTION=="add|change", SUBSYSTEM=="block", KERNEL=="nvme*n*", ENV{DEVTYPE}=="disk", ATTR{queue/scheduler}="mq-deadline"\n'


def tuned(node: Node, report: dict[str, Any], kind: str) -> None:
    """The kernel shows the table's values, and the report says just that."""
    device = report["array"] or report["members"][0]
    wanted = {(at, setting): value for setting, value in WANTED[kind].items() for at in ([device] if setting == "read_ahead" else report["members"])}
    assert node.queues(wanted) == wanted
    assert {(one["device"], one["setting"]): one["wanted"] for one in report["tuning"]} == wanted
    assert (report["read_ahead"], [text for text in report["warnings"] if "W04" in text]) == (WANTED[kind]["read_ahead"], [])


def set_anew(node: Node, kind: str) -> None:
    """What somebody changes under a mounted stripe is set again; a scheduler that there is not is a warning, and the stripe stays."""
    report = node.ensure("Unchanged").report
    assert report["steps"] == []
    device, disk = report["array"] or report["members"][0], report["members"][-1]
    changed = {(device, "read_ahead"): 128 << 10, (disk, "scheduler"): "mq-deadline"}
    node.guest.run(f"cd /sys/block; echo 128 > {device[5:]}/queue/read_ahead_kb; echo mq-deadline > {disk[5:]}/queue/scheduler").check()
    planned = node.disks("plan").report
    assert {(one["device"], one["setting"]): one["was"] for one in planned["tuning"] if one["was"] != one["wanted"]} == changed
    assert planned["steps"] == [f"then {planned['steps'][0][5:]}"]
    assert node.queues(changed) == changed
    again = node.ensure("Unchanged").report
    assert {(one["device"], one["setting"]): one["was"] for one in again["tuning"] if one["was"] != one["now"]} == changed
    tuned(node, again, kind)
    node.guest.share.joinpath("impossible").write_text(IMPOSSIBLE)
    refused = node.ensure("Unchanged", "--config", "/host/impossible").report
    (warning,) = [text for text in refused["warnings"] if text.startswith("W04: ")]
    assert "not nope: the kernel refuses it (Invalid argument); it offers " in warning
    assert "W04" in refused["codes"]
    tuned(node, node.ensure("Unchanged").report, kind)


def prepared(guest: Guest, backend: str, filesystem: str) -> Node:
    """A node with the table, and udev rules that give every disk another scheduler whenever something has written to it."""
    guest.share.joinpath("table").write_text(TABLE)
    guest.share.joinpath("rule").write_text(RULE)
    guest.run("cp /host/rule /etc/udev/rules.d/60-test-scheduler.rules; udevadm control --reload").check()
    return Node(guest, "--config", "/host/table", "--backend", backend, "--filesystem", filesystem)


def test_every_kind_of_stripe_survives_a_reboot(machine: MachineMaker) -> None:
    """One boot each: take over what the last boot made, check it byte by byte, give it back, make the next kind and fill it."""
    node_machine = machine(8)
    sums, held, kinds = "", 0, set(WANTED)
    for boot, (backend, filesystem, count) in enumerate((*COMBINATIONS, ("", "", 0))):
        for number, disk in enumerate(node_machine.disks):
            disk.present = number < max(count, held)
        with node_machine.boot(shuffle=boot) as guest:
            if held:
                last_backend, last_filesystem, _ = COMBINATIONS[boot - 1]
                kind = last_backend if held > 1 else "disk"
                node = prepared(guest, last_backend, last_filesystem)
                # More blank disks may be here than the stripe has: they are told about, and the stripe is not grown.
                found = node.ensure("Assembled" if last_backend == "lvm" else "Mounted")
                assert (len(found.report["members"]), found.report["case"]) == (held, "C2" if count > held else "C1")
                tuned(node, found.report, kind)
                assert node.sums(f"{MOUNT}/store/data") == sums
                if kind in kinds:  # once each: it takes a while
                    set_anew(node, kind)
                    kinds.remove(kind)
                gone = node.disks("teardown")
                assert (gone.status, gone.report["outcome"]) == (0, "Removed"), (gone.report, gone.said)
                assert {verdict for verdict, _ in gone.verdicts().values()} == {"blank"}
                assert (node.view().built, node.view().mounts) == ((), ())
            for disk in node_machine.disks[count:held]:
                guest.unplug(disk.serial)
            if count:
                node = prepared(guest, backend, filesystem)
                made = node.ensure("Created")
                tuned(node, made.report, backend if count > 1 else "disk")
                assert (made.report["backend"] if count > 1 else backend, made.report["filesystem"], len(made.report["members"])) == (
                    backend,
                    filesystem,
                    count,
                )
                sums = node.write(f"{MOUNT}/store/data", (1, 4096, 1 << 20, (4 << 20) + 17))
                assert sums.count("\n") == 4
            guest.shutdown()
        held = count
