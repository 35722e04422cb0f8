"""Keeps the stripe: makes it so, watches it, withdraws it when it fails, and makes it anew. What is in the store is not its business.

Nothing in the kernel announces that a RAID0 lost a member: the array stays `clean` until an I/O meets the hole, and a disk that fails every read
is never reported at all. So each round looks at sysfs and reads a block of every member around the page cache.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from nvcache.core.disk_codes import DISK_CODES, DiskCode
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.failed import FailedDisks
from nvcache.engine.handover import StripeState, StripeStatus
from nvcache.engine.lock import DISKS_LOCK, KEEPER_LOCK, run_lock, taken_by_another
from nvcache.engine.stripe import Report, Stripe
from nvcache.errors import SPENT, DiskError
from nvcache.settings import DiskSettings
from nvcache.system import probe
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel
from nvcache.system.udev import Hotplug

log = logging.getLogger(__name__)

WATCH_EVERY = 1.0  # seconds between two looks at a mounted stripe
READ_STALL = 8.0  # seconds a member's read may take before the disk counts as dead
SILENT_LOOKS = 3  # and the looks that found it silent: after a pause of this process or of the machine, seconds alone say nothing
BLOCK = 4096
STRIDE = 1009 * (1 << 20) + BLOCK  # bytes between two reads of a member: no power of two, so that they come to lie everywhere
DOUBTED_BLOCKS = 64  # read of each member when the serving part met an error
ACKNOWLEDGE = 10.0  # seconds the serving part is given to let go; it promises five
RETRY_FIRST = 5.0  # seconds until a refused or held stripe is tried again; doubles while nothing happens
RETRY_MOST = 300.0
RETRY_IN_USE = 30.0  # the most of them while something is in use
# In use: it ends with an `umount` or a process, and no device that comes or goes tells of that.
IN_USE = frozenset({DiskCode.N04, DiskCode.N07, DiskCode.N09, DiskCode.D08, DiskCode.D12, DiskCode.D13})


@dataclass
class _Member:
    """One disk of the mounted stripe, and the read of it that is under way."""

    name: str
    node: str
    serial: str
    size: int
    next: int = 0  # where the next block is read
    reading: Future[object] | None = None
    since: float = 0.0  # when it answered last, or began to be asked
    silent: int = 0  # looks since

    def places(self, count: int) -> list[int]:
        """Offsets of the next `count` blocks to read; over time they spread over the whole disk."""
        found = []
        for _ in range(count):
            found.append(self.next)
            self.next = (self.next + STRIDE) % max(1, self.size - BLOCK) // BLOCK * BLOCK
        return found

    def read(self, places: list[int]) -> None:
        """Read the blocks; one that fails once is read again. Raises `DiskError` (disk-io)."""
        for place in places:
            try:
                probe.read_block(self.node, place)
            except DiskError:
                probe.read_block(self.node, place)
            self.since, self.silent = clock.monotonic(), 0


@dataclass(frozen=True, slots=True)
class _Loss:
    """Why a stripe cannot be used any more, and which disks are to blame."""

    reason: str
    serials: frozenset[str] = frozenset()


@dataclass
class Keeper:
    """Owns the stripe for as long as `run` lasts; it stays mounted afterwards, pods may be reading it.

    `publish` is told each new state; `acknowledged(generation, seconds)` waits until the serving part has let go of the stripe; `doubted` tells
    whether that part met an I/O error since it was last asked.
    """

    settings: DiskSettings
    publish: Callable[[StripeState], None]
    acknowledged: Callable[[int, float], bool]
    doubted: Callable[[], bool]
    first_generation: int = 1
    say: Callable[[str], None] = lambda text: log.info("%s", text)
    tools: Tools = field(default_factory=Tools)
    kernel: Kernel = field(default_factory=Kernel)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._hotplug: Hotplug | None = None
        self._reads = DaemonExecutor("member", 64)
        self._generation = self.first_generation - 1
        self._state: StripeState | None = None
        self._members: list[_Member] = []
        self._number = ""
        self._failed = FailedDisks(self.settings.run_directory)

    def stop(self) -> None:
        """End `run` soon; from any thread. The stripe stays mounted."""
        self._stop.set()
        if self._hotplug is not None:
            self._hotplug.wake()

    def run(self) -> None:
        """Keep the stripe until `stop`. Raises `DiskError` (disks-busy) when another keeper runs."""
        with run_lock(self.settings.run_directory / KEEPER_LOCK, "keep the stripe"), Hotplug() as hotplug:
            self._hotplug = hotplug
            pause = RETRY_FIRST
            while not self._stop.is_set():
                report = self._ensure()
                if report.mounted:
                    pause = RETRY_FIRST
                    self._watch(hotplug, report)
                else:
                    self._stop.wait(RETRY_FIRST)  # whatever comes and goes: what was just tried may itself have made an array come and go
                    pause = min(pause, _longest(report))
                    pause = RETRY_FIRST if self._news(hotplug, pause - RETRY_FIRST) else pause * 2

    def without(self, reason: str) -> None:
        """Publish that there is no stripe because `run` could not begin. Not while it runs."""
        self._tell(StripeStatus.ABSENT, None, reason)

    def _news(self, hotplug: Hotplug, seconds: float) -> bool:
        """Wait, for at most so long, until a disk comes or goes or somebody else was at the disks; whether that was so."""
        until = clock.monotonic() + seconds
        while not hotplug.wait(min(WATCH_EVERY, until - clock.monotonic())):
            if taken_by_another(self.settings.run_directory / DISKS_LOCK):  # since the last try, which left it as ours
                return True
            if self._stop.is_set() or clock.monotonic() >= until:
                return False
        return True

    # -- having it

    def _stripe(self) -> Stripe:
        return Stripe(self.settings, tools=self.tools, kernel=self.kernel, say=self.say, stopped=self._stop.is_set)

    def _ensure(self) -> Report:
        report = self._stripe().ensure()
        line = f"stripe: {report.code or report.case} {report.outcome.lower()}: {report.reason}"
        facts = {"case": report.case, "code": report.code, "seconds": report.seconds, "codes": list(report.codes)}
        log.log(logging.INFO if report.mounted else logging.ERROR, line, extra={"facts": facts})
        status = StripeStatus.MOUNTED if report.mounted else StripeStatus.ABSENT
        self._tell(status, report.code, report.reason, report)
        return report

    def _tell(self, status: StripeStatus, code: str | None, reason: str, report: Report | None = None) -> None:
        """Publish a state; one that says the same as the last is not a new one."""
        before = self._state
        details = _details(report) if report is not None else before.details if before is not None else {}
        fs_uuid = report.fs_uuid if report is not None else before.fs_uuid if before is not None else None
        store = report.store if report is not None else None
        same = before is not None and (before.state, before.code, before.fs_uuid, before.reason) == (status, code, fs_uuid, reason)
        if not same:
            self._generation += 1
        self._state = StripeState(generation=self._generation, state=status, code=code, reason=reason, fs_uuid=fs_uuid, store=store, details=details)
        self.publish(self._state)

    # -- watching it

    def _watch(self, hotplug: Hotplug, report: Report) -> None:
        """Look at the mounted stripe until it fails or the keeper is stopped; a failed one is withdrawn and taken apart."""
        self._members = [
            _Member(str(disk["name"]), str(disk["node"]), str(disk["serial"]), int(str(disk["size"])))
            for disk in report.disks
            if disk["node"] in report.members
        ]
        self._number = next((mount.number for mount in self.kernel.mounts() if mount.point == str(self.settings.mount)), "")
        while not self._stop.is_set():
            hotplug.wait(WATCH_EVERY)
            try:
                loss = self._lost(report)
            except DiskError as error:  # the machine is short of something, which is no fault of a disk
                log.warning("cannot look at the stripe just now: %s", error)
                continue
            if loss is not None and not self._stop.is_set():
                self._withdraw(loss)
                return
            if self._state is not None:
                self.publish(self._state)  # again: so it tells when the stripe was last seen to be well, and is there though /run was emptied

    def _lost(self, report: Report) -> _Loss | None:
        """What is wrong with the stripe, if anything; bounded, whatever the disks do."""
        here = {disk.serial: disk for disk in self.kernel.disks()}
        gone = [member for member in self._members if member.serial not in here]
        if gone:
            return _Loss(f"{_told(gone)} vanished", frozenset(member.serial for member in gone))
        for array in self.kernel.arrays():
            if array.node == report.array and (array.state in ("broken", "inactive", "clear") or array.faulty):
                bad = frozenset(member.serial for member in self._members if member.name in array.faulty)
                return _Loss(f"the kernel calls {array.name} {array.state}, {', '.join(array.faulty) or 'no member'} faulty", bad)
        mounts = [mount for mount in self.kernel.mounts() if mount.point == str(self.settings.mount)]
        if not mounts or mounts[-1].number != self._number:
            return _Loss(f"{self.settings.mount} was unmounted or covered by another mount")
        if "ro" in mounts[-1].options:
            return _Loss("the kernel made the file system read-only")
        return self._unreadable() or self._shut_down()

    def _unreadable(self) -> _Loss | None:
        """Read one block of each member, each time at another place; a read that is still under way is not doubled."""
        blocks = DOUBTED_BLOCKS if self.doubted() else 1
        for member in self._members:
            if member.reading is None:
                member.since, member.silent = clock.monotonic(), 0
                member.reading = self._reads.submit(member.read, member.places(blocks))
        deadline = clock.monotonic() + WATCH_EVERY
        for member in self._members:
            reading = member.reading
            if reading is None:
                continue
            try:
                reading.result(max(0.01, deadline - clock.monotonic()))
            except TimeoutError:
                waited = clock.monotonic() - member.since
                member.silent += 1
                if waited > READ_STALL and member.silent >= SILENT_LOOKS:
                    return _Loss(f"{_told([member])} does not answer for {waited:.0f} s", frozenset({member.serial}))
            except DiskError as error:
                member.reading = None
                if error.facts.get("errno") not in SPENT:
                    return _Loss(f"{_told([member])} fails: {error}", frozenset({member.serial}))
            else:
                member.reading = None
        return None

    def _shut_down(self) -> _Loss | None:
        """A file system that shut itself down refuses to open anything, with EIO."""
        looking = self._reads.submit(os.listdir, self.settings.mount)
        for _ in range(int(READ_STALL)):  # in parts: a pause of this process uses up no more than one of them
            try:
                looking.result(1.0)
            except TimeoutError:
                continue
            except OSError as error:
                if errno.errorcode.get(error.errno or 0) in SPENT:
                    return None
                return _Loss(f"the file system at {self.settings.mount} fails: {error.strerror}")
            return None
        return _Loss(f"the file system at {self.settings.mount} does not answer for {READ_STALL:g} s")

    # -- losing it

    def _withdraw(self, loss: _Loss) -> None:
        """Take the stripe from the serving part, then take it apart; what cannot be unmounted yet is tried again by `run`."""
        log.error("the stripe failed: %s", loss.reason, extra={"facts": {"serials": sorted(loss.serials)}})
        self._failed.add(loss.serials)
        self._tell(StripeStatus.WITHDRAWING, str(DiskCode.R01), loss.reason)
        if not self.acknowledged(self._generation, ACKNOWLEDGE):
            log.warning("the serving part did not let go of the stripe in %g s", ACKNOWLEDGE)
        self._tell(StripeStatus.LOST, str(DiskCode.R01), loss.reason)
        try:
            self._stripe().let_go(self._number)
        except DiskError as error:
            log.error("%s", error, extra={"facts": {"code": str(error.code)}})  # noqa: TRY400 - expected, and told in full


def _longest(report: Report) -> float:
    """Seconds that what was refused may wait for the next try."""
    return RETRY_IN_USE if IN_USE.intersection(report.codes) else RETRY_MOST


def _told(members: list[_Member]) -> str:
    return ", ".join(f"{member.node} (serial {member.serial})" for member in members)


def _details(report: Report) -> dict[str, object]:
    """What GET /v1/stripe shows besides the state."""
    remedy = DISK_CODES[DiskCode(report.code)].remedy if report.code else None
    return {
        "case": report.case,
        "codes": list(report.codes),
        "warnings": list(report.warnings),
        "remedy": remedy,
        "backend": report.backend,
        "filesystem": report.filesystem,
        "array": report.array,
        "members": list(report.members),
        "mount": report.mount,
        "read_ahead": report.read_ahead,
        "tuning": [dict(each) for each in report.tuning],
        "disks": [dict(disk) for disk in report.disks],
    }
