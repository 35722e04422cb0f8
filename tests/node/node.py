"""The two views that every scenario compares: what `nvcache disks` reports, and what the guest's kernel and blkid show of the same disks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.node.guest import Guest, Job

MOUNT = "/var/lib/nvcache/mnt"
STORE = f"{MOUNT}/store"
_LOOK = """
for d in /sys/block/nvme*n*; do [ -e $d ] && echo disk ${d##*/} $(cat $d/device/serial); done
for d in /sys/block/md*; do [ -e $d ] && echo md ${d##*/} $(cat $d/dev) $(cat $d/md/level) $(cat $d/md/array_state) -- $(ls $d/slaves); done
for d in /sys/block/dm-*; do [ -e $d ] && echo lvm ${d##*/} $(cat $d/dev) $(cat $d/dm/name) $(cat $d/dm/suspended) -- $(ls $d/slaves); done
while read -r id parent number root point options rest; do [ $point = MOUNT ] && echo mount $number ${rest##*- }; done < /proc/1/mountinfo
true
""".replace("MOUNT", MOUNT)


@dataclass(frozen=True, slots=True)
class Built:
    """Something the kernel has built of disks: an array or a mapping. `state` is array_state for md."""

    kind: str  # md | lvm
    name: str
    number: str
    state: str
    label: str  # the raid level, or the mapping's name
    members: frozenset[str]  # serials


@dataclass(frozen=True, slots=True)
class View:
    """What the kernel shows."""

    disks: dict[str, str]  # serials by kernel name
    built: tuple[Built, ...]
    mounts: tuple[tuple[str, str], ...]  # (major:minor, file system) of each layer at MOUNT

    def built_of(self, serials: Iterable[str]) -> list[Built]:
        """What is built of any of these disks."""
        return [built for built in self.built if not built.members.isdisjoint(serials)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a disks command said: its exit status, its report and its progress lines."""

    status: int
    report: dict[str, Any]
    said: str

    def verdicts(self) -> dict[str, tuple[str, str | None]]:
        """Verdict and code of each disk, by serial."""
        return {disk["serial"]: (disk["verdict"], disk["code"]) for disk in self.report["disks"]}

    def reason(self, serial: str) -> str:
        """Why a disk is what it is, in words."""
        return str(next(disk["reason"] for disk in self.report["disks"] if disk["serial"] == serial))


class Node:
    """One boot of a machine as a person with `nvcache disks` sees it. `flags` go to every command."""

    def __init__(self, guest: Guest, *flags: str) -> None:
        self.guest = guest
        self.flags = ("--min-disk", "0", *flags)

    def start(self, command: str, *flags: str) -> Job:
        """Start `nvcache disks COMMAND`; the empty command lists the disks."""
        return self.guest.nvcache("disks", *([command] if command else []), "--json", *self.flags, *flags)

    def disks(self, command: str = "", *flags: str, timeout: float = 90) -> Answer:
        """Run `nvcache disks COMMAND` to its end."""
        return answer(self.start(command, *flags), timeout)

    def ensure(self, outcome: str, *flags: str) -> Answer:
        """`disks ensure`, which must succeed with this outcome and agree with the kernel."""
        found = self.disks("ensure", *flags)
        assert (found.status, found.report["outcome"]) == (0, outcome), (found.report, found.said)
        self.agree(found.report)
        return found

    def refused(self, code: str, *flags: str) -> Answer:
        """`disks ensure`, which must refuse with this code and leave nothing of its own mounted or built."""
        before = self.view()
        found = self.disks("ensure", *flags)
        assert (found.status, found.report["outcome"], found.report["code"]) == (11, "Refused", code), (found.report, found.said)
        assert self.view() == before
        return found

    def agree(self, report: dict[str, Any]) -> None:
        """A report of a mounted stripe says what the kernel shows: one layer, of this device, of these members, with this file system."""
        view = self.view()
        serials = {view.disks[node.removeprefix("/dev/")] for node in report["members"]}
        assert len(view.mounts) == 1, view
        number, kind = view.mounts[0][0], view.mounts[0][1]
        assert kind == report["filesystem"], (view, report)
        if len(serials) == 1:
            device = report["members"][0]
            assert view.built_of(serials) == [], view
        else:
            device = report["array"]
            (built,) = view.built_of(serials)
            assert (built.kind, f"/dev/{built.name}", built.members) == (report["backend"], report["array"], serials), (view, report)
            assert built.number == number, view
            assert (built.label, built.state) in (("raid0", "clean"), ("nvcache-cache", "0")), view
        name = device.removeprefix("/dev/")
        asked = f"cat /sys/block/{name}/dev; blkid -p -o value -s LABEL -s UUID {device}"
        assert self.guest.run(asked).check().split() == [number, "nvcache", report["fs_uuid"]]
        now = {(one["device"], one["setting"]): one["now"] for one in report["tuning"]}
        assert now == self.queues(now), report["tuning"]
        assert now[device, "read_ahead"] == report["read_ahead"]

    def queues(self, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int | str]:
        """What the kernel shows of each (device, setting) of the block queues; a read-ahead in bytes."""
        asked = list(wanted)
        files = [f"{device[5:]}/queue/{'read_ahead_kb' if setting == 'read_ahead' else setting}" for device, setting in asked]
        found: dict[tuple[str, str], int | str] = {}
        for (device, setting), line in zip(asked, self.guest.run(f"cd /sys/block; cat {' '.join(files)}").check().splitlines(), strict=True):
            active = next((word.strip("[]") for word in line.split() if word.startswith("[")), line.strip())
            found[device, setting] = active if setting == "scheduler" else int(active) * (1024 if setting == "read_ahead" else 1)
        return found

    def view(self) -> View:
        """What the kernel shows now."""
        disks: dict[str, str] = {}
        built, mounts = [], []
        for line in self.guest.run(_LOOK).check().splitlines():
            what, *words = line.split()
            match what:
                case "disk":
                    disks[words[0]] = words[1]
                case "mount":
                    mounts.append((words[0], words[1]))
                case _:
                    own, members = words[: words.index("--")], words[words.index("--") + 1 :]
                    name, number, *label, state = own
                    serials = frozenset(disks.get(member, member) for member in members)
                    built.append(Built(what, name, number, state, " ".join(label), serials))
        return View(disks, tuple(built), tuple(mounts))

    def device(self, serial: str) -> str:
        """The node of a disk in this boot."""
        return next(f"/dev/{name}" for name, found in self.view().disks.items() if found == serial)

    def blkid(self, serial: str) -> tuple[int, str]:
        """What `blkid -p` says of a disk: exit status (2: nothing) and type."""
        found = self.guest.run(f"blkid -p -o value -s TYPE -s PTTYPE {self.device(serial)}")
        return found.status, found.out.strip()

    def write(self, folder: str, sizes: Iterable[int]) -> str:
        """Write files of random bytes, synced; returns what `sums` says of them."""
        made = [f"head -c {size} /dev/urandom > {shlex.quote(f'{folder}/{number}')}" for number, size in enumerate(sizes)]
        self.guest.run(f"mkdir -p {folder}; {'; '.join(made)}; sync").check()
        return self.sums(folder)

    def sums(self, folder: str) -> str:
        """SHA-256 of every file below a folder, as read from the disks and not from the page cache."""
        return self.guest.run(f"echo 3 > /proc/sys/vm/drop_caches; cd {folder} && find . -type f -print0 | sort -z | xargs -0 sha256sum", 120).check()


def answer(job: Job, timeout: float = 90) -> Answer:
    """Wait for a disks command and read its report."""
    done = job.wait(timeout)
    try:
        return Answer(done.status, json.loads(done.out), done.err)
    except ValueError:
        raise AssertionError(f"{done.command} ended with {done.status} and without a report:\n{done.out}\n{done.err}") from None
