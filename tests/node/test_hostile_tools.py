"""Every program nvcache runs is replaced, one at a time, by one that lies, fails, babbles or hangs. Nothing foreign is written to, each run ends in
time, and the report names the program or the disk. What `Tools` does with a program that floods or cannot be killed is tried in tests/unit/system.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from tests.node.conftest import MachineMaker
from tests.node.guest import Guest
from tests.node.machine import MIB, Disk, Machine
from tests.node.node import MOUNT, Answer, Node
from tests.node.staging import blank, restaged

pytestmark = pytest.mark.slow
SIZE = 384 * MIB
BOUND = 40.0  # seconds any command may take; the longest wait of these is 20 s for umount
TOOLS = ("blkid", "mdadm", "lvm", "mkfs.xfs", "mkfs.ext4", "mount", "umount", "udevadm", "modprobe")
# /run/real has the programs as they are; what is in /usr/sbin is found first.
_KEEP = f"mkdir /run/real; for tool in {' '.join(TOOLS)}; do cp $(readlink -f $(command -v $tool)) /run/real/$tool; done"
_HONEST = f"for tool in {' '.join(TOOLS)}; do ln -sf /run/real/$tool /usr/sbin/$tool; done"

SILENT = "exit 0"
GARBAGE = "head -c 3000 /dev/urandom; head -c 3000 /dev/urandom >&2; exit 0"
LOCALIZED = "echo 'Gerät oder Ressource belegt: Vorgang wird abgebrochen' >&2; exit 1"
HANG = "echo working; exec sleep 1000"
DIES = "echo TYPE=; echo half a sente >&2; kill -KILL $$"
WRITES_AND_FAILS = "head -c 70000 /dev/urandom | dd of=${!#} bs=4k seek=5 2>&1; exit 1"
NO_VGCREATE = f'[ $1 = vgcreate ] || exec /run/real/lvm "$@"; {LOCALIZED}'
OTHER_GROUP = r"""[ $1 = pvs ] || exec /run/real/lvm "$@"
/run/real/lvm "$@" | sed -E 's/"vg_name":"[^"]*"/"vg_name":"theirs"/g'"""
OURS_EVERYWHERE = "echo DEVNAME=$5; echo LABEL=nvcache; echo UUID=1b4e28ba-2fa1-11d2-883f-0016d3cca427; echo TYPE=xfs"


@dataclass(frozen=True, slots=True)
class Trial:
    """`tool` becomes `script`; then `command` on the disks named ends with one of `codes` (None: it works), and says all of `words`."""

    tool: str
    script: str
    disks: tuple[str, ...]
    codes: tuple[str | None, ...]
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    command: str = "ensure"
    writes: bool = False  # whether our own blank disks may have been written to
    heals: bool = False  # then the same command with the honest program makes a stripe of what is left


PAIR, SOLO = ("A", "B"), ("A",)
LVM = ("--backend", "lvm")
WITH_THEIRS = ("A", "B", "THEIRS")
TRIALS = (
    Trial("blkid", "exit 2", WITH_THEIRS, ("N03",), ("THEIRS", "blkid sees nothing")),
    Trial("blkid", OURS_EVERYWHERE, WITH_THEIRS, ("N03",), ("THEIRS", "xfs")),
    Trial("blkid", GARBAGE, WITH_THEIRS, ("N03",), ("THEIRS", "blkid")),
    Trial("blkid", SILENT, WITH_THEIRS, ("N03",), ("THEIRS", "blkid")),
    Trial("blkid", LOCALIZED, WITH_THEIRS, ("N03",), ("THEIRS", "blkid", "belegt")),
    Trial("blkid", DIES, WITH_THEIRS, ("N03",), ("THEIRS", "blkid")),
    Trial("blkid", HANG, WITH_THEIRS, ("N06",), ("blkid", "10 s")),
    Trial("mdadm", "echo 'mdadm: array /dev/md/nvcache started.' >&2; exit 0", PAIR, ("N08",), ("mdadm", "no change", "started"), writes=True),
    Trial("mdadm", LOCALIZED, PAIR, ("N08",), ("mdadm", "belegt"), writes=True, heals=True),
    Trial("mdadm", f'/run/real/mdadm "$@" >/dev/null 2>&1; {GARBAGE}', PAIR, (None,), writes=True),
    Trial("lvm", GARBAGE, PAIR, ("N08",), ("lvm", "no change"), LVM, writes=True),
    Trial("lvm", NO_VGCREATE, PAIR, ("N08",), ("lvm vgcreate", "belegt"), LVM, writes=True, heals=True),
    Trial("lvm", f'[ $1 != pvs ] && exec /run/real/lvm "$@"; {GARBAGE}', PAIR, ("N08",), ("LVM's report",), LVM, writes=True, heals=True),
    Trial("lvm", OTHER_GROUP, PAIR, ("N03",), ("D07", "nvcache-cache"), LVM, writes=True),
    Trial("mkfs.xfs", SILENT, SOLO, ("N08",), ("mkfs.xfs", "no change"), writes=True, heals=True),
    Trial("mkfs.xfs", LOCALIZED, SOLO, ("N08",), ("mkfs.xfs", "belegt"), writes=True),
    Trial(
        "mkfs.ext4",
        WRITES_AND_FAILS,
        SOLO,
        ("N08",),
        ("mkfs.ext4",),
        ("--filesystem", "ext4"),
        writes=True,
        heals=True,
    ),
    Trial("mount", SILENT, SOLO, ("N08",), ("mount", "no change"), writes=True, heals=True),
    Trial("mount", LOCALIZED, SOLO, ("N08",), ("mount", "belegt"), writes=True),
    Trial("modprobe", GARBAGE, SOLO, (None,), writes=True),
    Trial("modprobe", LOCALIZED, SOLO, (None,), writes=True),
    Trial("udevadm", HANG, SOLO, (None,), writes=True),
)


def test_tools_that_cannot_be_trusted(machine: MachineMaker) -> None:
    """Each on a node that is blank again but for one disk with somebody else's ext4."""
    node = machine([Disk("A", size=SIZE), Disk("B", size=SIZE), Disk("THEIRS", size=SIZE)])
    with node.boot() as guest:
        guest.run(f"mkfs.ext4 -q -L theirs {Node(guest).device('THEIRS')}; {_KEEP}; {_HONEST}; sync").check()
        theirs = node.digest_of("THEIRS")
        for trial in TRIALS:
            fresh(node, guest)
            before = node.digests()
            with_tool(guest, trial.tool, trial.script)
            found = timed(Node(guest, *excluding(trial.disks)), trial)
            told = (trial, found.report["reason"], found.said)
            assert found.report["code"] in trial.codes, told
            assert (found.status == 0) == (None in trial.codes), told
            assert all(word in found.report["reason"] for word in trial.words), told
            after = node.digests()
            assert after["THEIRS"] == theirs, told
            assert trial.writes or after == before, told
            guest.run(_HONEST).check()
            if trial.heals:
                healed = Node(guest, *excluding(trial.disks)).disks("ensure", "--settle-seconds", "0", *trial.flags)
                assert healed.status == 0, (trial, healed.report["reason"], healed.said)
        assert node.digest_of("THEIRS") == theirs


def test_an_umount_that_cannot_be_trusted(machine: MachineMaker) -> None:
    """A mounted stripe is given back only once it is unmounted, whatever umount says; nothing on it is erased before."""
    node = machine([Disk("A", size=SIZE)])
    with node.boot() as guest:
        guest.run(f"{_KEEP}; {_HONEST}").check()
        ours = Node(guest)
        ours.ensure("Created")
        sums = ours.write(f"{MOUNT}/store/data", (100000,))
        for script, code, word in ((SILENT, "N04", "release"), (LOCALIZED, "N04", "unmount"), (HANG, "N06", "umount"), (GARBAGE, "N04", "release")):
            with_tool(guest, "umount", script)
            found = timed(ours, Trial("umount", script, SOLO, (code,), command="teardown"))
            assert found.report["code"] == code, (script, found.report["reason"], found.said)
            assert word in found.report["reason"], (script, found.report["reason"])
            assert ours.sums(f"{MOUNT}/store/data") == sums
        guest.run(_HONEST).check()
        ours.ensure("Unchanged")


def timed(node: Node, trial: Trial) -> Answer:
    """Run the trial's command, and see that it ends in time."""
    begun = time.monotonic()
    found = node.disks(trial.command, "--settle-seconds", "0", *trial.flags, timeout=2 * BOUND)
    assert time.monotonic() - begun < BOUND, (trial, found.said)
    return found


def excluding(disks: tuple[str, ...]) -> tuple[str, ...]:
    """The flags that leave all other disks out."""
    return tuple(flag for serial in ("A", "B", "THEIRS") if serial not in disks for flag in ("--disk-exclude", serial))


def with_tool(guest: Guest, tool: str, script: str) -> None:
    """Put a script in the place of a program."""
    (guest.share / "script").write_text(f"#!/bin/bash\n{script}\n")
    guest.run(f"{_HONEST}; rm /usr/sbin/{tool}; install -m 755 /host/script /usr/sbin/{tool}").check()


def fresh(machine: Machine, guest: Guest) -> None:
    """Have our disks blank again, and met by the guest as such."""
    with restaged(guest):
        for serial in PAIR:
            blank(machine, serial)
