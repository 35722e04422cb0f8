"""The power goes at any moment, in the middle of commands too: whatever is left on the disks, the next start makes a mounted stripe of it.

Every write and flush of each command is recorded outside the guest. A prefix of the record is what a power cut leaves; a disk with a volatile cache
may also have lost any write since its last flush. All prefixes are judged here; some of each step are put onto the disks and healed in the guest
(NVCACHE_CRASH_STATES of each, 1 unless set), and a few cuts are real ones with a real boot after.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nvcache.core.content import ENDS, Kind
from nvcache.core.disks import Blank, DiskFacts, Ours, PvFacts, Rules, judge
from nvcache.system import probe
from nvcache.system.run import Tools
from tests.node.conftest import MachineMaker
from tests.node.guest import Guest
from tests.node.job import Job
from tests.node.machine import DIRECT_DISK, MIB, REMOTE_DISK, Disk, Machine
from tests.node.node import MOUNT, Node, answer
from tests.node.staging import blank, restaged

pytestmark = pytest.mark.slow
STATES = int(os.environ.get("NVCACHE_CRASH_STATES", "1"))
STRIPED = ("DISK0", "DISK1", "DISK2", "DISK3")
SOLO = "SOLO"
REMOTE = "REMOTE"  # never ours: whatever happens, it stays as it is
KINDS: Sequence[tuple[str, str, Sequence[str]]] = (("md", "xfs", STRIPED), ("lvm", "ext4", STRIPED), ("md", "ext4", (SOLO,)))


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One write, or a flush (`data` None); an int is that many zeros. `step` counts the lines of progress that were there."""

    serial: str
    at: int
    data: bytes | int | None
    step: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.at + (0 if self.data is None else self.data if isinstance(self.data, int) else len(self.data))

    def apply(self, image: int) -> None:
        """Do it."""
        if self.data is not None:
            os.pwrite(image, bytes(self.data) if isinstance(self.data, int) else self.data, self.at)


@dataclass
class Recorder:
    """Takes down what reaches the disks."""

    entries: list[Entry] = field(default_factory=list)
    progress: Callable[[], str] = str
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, serial: str, at: int, data: bytes | None) -> None:
        step = self.progress().count("\n")
        with self._lock:
            self.entries.append(Entry(serial, at, len(data) if data is not None and data.count(0) == len(data) else data, step))


@dataclass(frozen=True, slots=True)
class Record:
    """What one command did: the node's flags, all that was written before and by it, and its progress."""

    name: str
    flags: tuple[str, ...]
    disks: tuple[str, ...]
    before: int  # entries that are not its own
    entries: tuple[Entry, ...]
    said: tuple[str, ...]

    def step(self, at: int) -> str:
        """What was being done when entry `at` came, in its first words."""
        told = [line for line in self.said[: self.entries[at].step] if line.startswith("nvcache: ")]
        words = told[-1].split()[1:4] if told else ["begin"]
        return words[0] if words[0] in ("mount", "unmount", "write") else " ".join(words)

    def cuts(self) -> Mapping[str, list[int]]:
        """Its own writes, by step."""
        found: dict[str, list[int]] = {}
        for at in range(self.before, len(self.entries)):
            if self.entries[at].data is not None:
                found.setdefault(self.step(at), []).append(at)
        return found

    def left(self, cut: int, chance: random.Random | None = None, of: Iterable[int] | None = None) -> Iterator[Entry]:
        """What is on the disks when the power goes right after entry `cut`. With `chance`, writes since a disk's last flush may be missing."""
        flushed = {entry.serial: at for at, entry in enumerate(self.entries[: cut + 1]) if entry.data is None}
        for at in range(cut + 1) if of is None else of:
            entry = self.entries[at]
            if at <= cut and (chance is None or at < max(self.before, flushed.get(entry.serial, 0)) or chance.random() < 0.5):
                yield entry


def test_every_crash_heals(machine: MachineMaker, tmp_path: Path) -> None:
    """md, LVM and a single disk: create, rebuild and teardown, cut short at every write."""
    disks = [*(Disk(serial, size=128 * MIB) for serial in STRIPED), Disk(SOLO, size=384 * MIB), Disk(REMOTE, size=32 * MIB, model=REMOTE_DISK)]
    node, recorder = machine(disks), Recorder()
    node.witness = recorder
    remote = node.digest_of(REMOTE)
    with node.boot() as guest:
        records = [record for kind in KINDS for record in commands(node, guest, recorder, *kind)]
        for record in records:
            judge_every_cut(node, record, tmp_path)
        tried = 0
        for record, step, cut, chance in chosen(records):
            put(node, guest, record.left(cut, chance))
            found = Node(guest, *record.flags).disks("ensure", "--settle-seconds", "0")
            assert found.status == 0, (record.name, step, cut, chance is not None, found.report["reason"], found.said)
            Node(guest, *record.flags).agree(found.report)
            tried += 1
        assert tried >= 14, "a kind of step was not met"
    assert node.digest_of(REMOTE) == remote


def commands(machine: Machine, guest: Guest, recorder: Recorder, backend: str, filesystem: str, serials: Sequence[str]) -> Iterator[Record]:
    """The record of a creation on blank disks, of a rebuild after one of several was replaced, and of a teardown."""
    others = [serial for serial in (*STRIPED, SOLO) if serial not in serials]
    flags = ("--backend", backend, "--filesystem", filesystem, *(flag for serial in others for flag in ("--disk-exclude", serial)))
    node = Node(guest, *flags)
    recorder.entries.clear()
    put(machine, guest, ())
    wanted = [("create", "ensure", "Created"), ("rebuild", "ensure", "Rebuilt"), ("teardown", "teardown", "Removed")]
    for name, command, outcome in wanted if len(serials) > 1 else (wanted[0], wanted[2]):
        if name == "rebuild":
            with restaged(guest):
                blank(machine, "DISK2")
            recorder.entries[:] = [entry for entry in recorder.entries if entry.serial != "DISK2"]
        before = len(recorder.entries)
        job = node.start(command, "--settle-seconds", "0")
        recorder.progress = lambda job=job: job.so_far().err  # type: ignore[misc]
        found = answer(job)
        recorder.progress = str
        assert found.report["outcome"] == outcome, (name, found.report, found.said)
        yield Record(f"{name} {backend} {filesystem}", flags, tuple(serials), before, tuple(recorder.entries), tuple(found.said.splitlines()))


def put(machine: Machine, guest: Guest, entries: Iterable[Entry]) -> None:
    """Have exactly these writes on the disks, as if the guest had just started: udev meets them as new ones."""
    with restaged(guest):
        files = {}
        for serial in (*STRIPED, SOLO):
            blank(machine, serial)
            files[serial] = os.open(machine.image_of(serial), os.O_RDWR)
        for entry in entries:
            if entry.serial in files:
                entry.apply(files[entry.serial])
        for file in files.values():
            os.close(file)


def judge_every_cut(machine: Machine, record: Record, folder: Path) -> None:
    """After each write, and with writes lost that were not flushed, both witnesses call every disk ours or blank."""
    sizes = {disk.serial: disk.size for disk in machine.disks}
    for serial in record.disks:
        near = [at for at, entry in enumerate(record.entries) if entry.serial == serial and (entry.at < ENDS or entry.end > sizes[serial] - ENDS)]
        for cut in [at for at in near if at >= record.before and record.entries[at].data is not None]:
            for chance in (None, random.Random(cut)):
                image = folder / f"{serial}.img"
                image.unlink(missing_ok=True)
                file = os.open(image, os.O_RDWR | os.O_CREAT)
                os.truncate(file, sizes[serial])
                for entry in record.left(cut, chance, near):
                    entry.apply(file)
                os.close(file)
                verdict = judge(facts(image, serial, sizes[serial]), Rules(min_disk=0))
                assert isinstance(verdict, (Blank, Ours)), (record.name, record.step(cut), cut, chance is not None, verdict)


def facts(image: Path, serial: str, size: int) -> DiskFacts:
    """A disk that nobody uses, with this content; a physical volume is in no group, as far as is known."""
    content = probe.read_content(str(image))
    pv = PvFacts("", "", (), 0, 0) if content.kind is Kind.LVM else None
    seen = probe.blkid(Tools(), str(image))
    return DiskFacts("nvme0n1", "/dev/nvme0n1", "259:0", size, DIRECT_DISK, serial, probe=seen, content=content, exclusive=True, pv=pv)


def chosen(records: Iterable[Record]) -> Iterator[tuple[Record, str, int, random.Random | None]]:
    """Of each kind of step of each command some cuts; every other one loses what was not flushed."""
    met: set[tuple[str, str]] = set()
    lossy = False
    for record in records:
        for step, cuts in record.cuts().items():
            command = record.name.split()[0] if step.startswith(("erase", "remove", "make an md", "make a striped")) else ""
            if (command, step) in met and STATES == 1:
                continue
            met.add((command, step))
            chance = random.Random(f"{record.name} {step}")
            for cut in sorted(chance.sample(cuts, min(STATES, len(cuts)))):
                yield record, step, cut, chance if lossy else None
                lossy = not lossy


class PowerCut:
    """Takes the power away at the write number `after` of the step whose progress line begins with `step`; nothing is written from then on."""

    def __init__(self) -> None:
        self.step, self.after = "", 0
        self.progress: Callable[[], str] = str
        self.off, self.gone = threading.Event(), threading.Event()

    def __call__(self, serial: str, at: int, data: bytes | None) -> None:
        if self.step and not self.off.is_set() and data is not None:
            told = [line for line in self.progress().splitlines() if line.startswith("nvcache: ")]
            if told and told[-1].startswith(f"nvcache: {self.step}"):
                self.after -= 1
            if self.after < 0:
                self.off.set()
        if self.off.is_set():
            self.gone.wait(60)
            raise ConnectionAbortedError("the power is off")

    def during(self, step: str, after: int, guest: Guest, start: Callable[[], Job]) -> None:
        """Start a command and pull the plug."""
        job = start()
        self.progress = lambda: job.so_far().err
        self.after, self.step = after, step
        assert self.off.wait(60), f"{step!r} did not come: {job.so_far().err}"
        self.gone.set()
        guest.powercut()


@pytest.mark.parametrize("backend", ["md", "lvm"] if STATES > 1 else ["md"])
def test_power_cuts_and_boots(machine: MachineMaker, backend: str) -> None:
    """Real ones: while formatting, while filling, while taking apart. Each next boot has a whole stripe, and what was synced."""
    disks = machine([*(Disk(f"DISK{number}", size=160 * MIB) for number in range(3)), Disk(REMOTE, size=32 * MIB, model=REMOTE_DISK)])
    remote = disks.digest_of(REMOTE)
    flags = ("--backend", backend, "--settle-seconds", "0")
    cut = disks.witness = PowerCut()
    with disks.boot() as guest:
        cut.during("make an xfs", 40, guest, lambda: Node(guest, *flags).start("ensure"))
    cut = disks.witness = PowerCut()
    with disks.boot(shuffle=1) as guest:
        node = Node(guest, *flags)
        node.ensure("Created")
        sums = node.write(f"{MOUNT}/store/synced", (1, 4096, (4 << 20) + 17))
        guest.run(f"mkdir {MOUNT}/store/filling; head -c 8M /dev/urandom > {MOUNT}/store/filling/part").check()
        guest.powercut()
    cut = disks.witness = PowerCut()
    with disks.boot(shuffle=2) as guest:
        node = Node(guest, *flags)
        node.ensure("Mounted" if backend == "md" else "Assembled")
        assert node.sums(f"{MOUNT}/store/synced") == sums
        cut.during("erase our", 9, guest, lambda: node.start("teardown"))
    disks.witness = PowerCut()
    with disks.boot(shuffle=3) as guest:
        node = Node(guest, *flags)
        node.ensure("Rebuilt" if backend == "md" else "Created")
        gone = node.disks("teardown")
        assert {gone.verdicts()[serial] for serial in disks.serials if serial != REMOTE} == {("blank", None)}
    assert disks.digest_of(REMOTE) == remote
