"""Makes the node's stripe so: looks, decides, acts, looks again, until it is mounted and ours or refused. It watches nothing; `keeper` does.

After each step the kernel is asked anew; an exit status alone is never believed. One lock in the run directory makes two runs at once impossible,
and every disk is locked against udev while steps are carried out.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nvcache.core.content import Kind
from nvcache.core.decide import decide, plan_teardown
from nvcache.core.disk_codes import DISK_CODES, DiskCode
from nvcache.core.disks import Blank, DiskFacts, Foreign, Ours, Rules, Verdict, judge, refused_wipe
from nvcache.core.stripe import (
    Case,
    Found,
    Machine,
    StripePlan,
)
from nvcache.core.tuning import Knob, Tuned, change, complaints
from nvcache.engine import clock, tuning
from nvcache.engine.failed import FailedDisks
from nvcache.engine.lock import DISKS_LOCK, FOLDER, KEEPER_LOCK, run_lock
from nvcache.engine.scan import Scanner
from nvcache.engine.steps import Steps
from nvcache.errors import Code, DiskError, NvcacheError
from nvcache.settings import DiskSettings
from nvcache.system import filesystem, probe
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel
from nvcache.system.udev import Hotplug

log = logging.getLogger(__name__)

ROUNDS = 16  # looks at the machine in one run; a creation takes four
WAIT_STEP = 2.0  # seconds between two looks while disks are waited for
KEEPER_PATIENCE = 15.0  # seconds that a person's command waits for a keeper's look at the disks; what takes longer is a change
_REFUSALS = {Code.DISKS_BUSY: DiskCode.D13, Code.IN_USE: DiskCode.N04}


@dataclass(frozen=True, slots=True)
class Report:
    """What a look, a plan or a run found and did. Every `disks` command prints one."""

    outcome: str  # Seen | Planned | Unchanged | Mounted | Assembled | Created | Rebuilt | Removed | Wiped | Refused
    case: str | None
    code: str | None  # N.., D13, D14, D15 when refused; R01 after a rebuild
    reason: str
    hint: str | None = None  # what to do about a refusal
    codes: tuple[str, ...] = ()  # every code that applies, the disks' included
    warnings: tuple[str, ...] = ()
    disks: tuple[dict[str, object], ...] = ()
    steps: tuple[str, ...] = ()
    backend: str | None = None
    filesystem: str | None = None
    array: str | None = None
    members: tuple[str, ...] = ()
    mount: str | None = None
    store: str | None = None
    fs_uuid: str | None = None
    read_ahead: int | None = None  # bytes, as the kernel says
    tuning: tuple[dict[str, object], ...] = ()  # device, setting, was, wanted, now: of each queue setting that the table names
    seconds: float = 0.0

    @property
    def mounted(self) -> bool:
        """Whether the stripe is mounted and ours."""
        return self.store is not None


class Stripe:
    """The stripe of this node under one set of settings. Blocking; for one thread. `say` is told each step as it begins."""

    def __init__(
        self,
        settings: DiskSettings,
        *,
        tools: Tools | None = None,
        kernel: Kernel | None = None,
        say: Callable[[str], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self._tools = tools or Tools()
        self._kernel = kernel or Kernel()
        self._say = say
        self._stopped = stopped
        self.rules = Rules(
            backend="lvm" if settings.backend == "lvm" else "md",
            filesystem=settings.filesystem,
            models=frozenset(model.strip() for model in settings.disk_models),
            exclude=frozenset(serial.strip() for serial in settings.disk_exclude),
            failed=FailedDisks(settings.run_directory).serials(),
            min_disk=settings.min_disk,
            expected=settings.expected_disks,
            allow_unequal=settings.allow_unequal,
            require_all=settings.require_all,
            rebuild=settings.on_lost == "rebuild",
            mount=str(settings.mount),
        )
        self._scanner = Scanner(self._tools, self._kernel, self.rules)

    # -- reading only

    def look(self) -> Report:
        """Every NVMe namespace with its verdict, and the case the node is in. Writes nothing."""
        return self._reported(lambda began: replace(self._plan(began), outcome="Seen"))

    def plan(self) -> Report:
        """What `ensure` would do now. Writes nothing and waits for no disk."""
        return self._reported(self._plan)

    def plan_teardown(self) -> Report:
        """What `teardown` would do now. Writes nothing."""
        return self._reported(lambda began: self._planned(plan_teardown, began))

    def _plan(self, began: float) -> Report:
        return self._planned(decide, began)

    def _planned(self, decider: Callable[[Machine, Rules], StripePlan], began: float) -> Report:
        with self._scanner.look() as machine:
            plan = decider(machine, self.rules)
        tuned = tuning.planned(self._kernel, self.settings, plan) if decider is decide else ()
        then = (*plan.then, *filter(None, (change(tuned),)))
        steps = (*(str(step) for step in plan.steps), *(f"then {follow}" for follow in then))
        outcome = "Refused" if plan.refused else "Unchanged" if plan.done else "Planned"
        return _with_tuning(self._report(plan, machine, began, outcome=outcome, steps=steps), tuned)

    # -- changing

    def ensure(self) -> Report:
        """Have the stripe mounted and ours. Returns a report also of a refusal; waits at most `settle_seconds` for disks that are missing."""
        return self._reported(self._ensure)

    def teardown(self) -> Report:
        """Give every disk of ours back blank."""
        report = self._reported(lambda began: self._unkept(lambda locks: self._run(plan_teardown, began, locks)))
        if report.outcome != "Refused":
            filesystem.seal(Path(self.rules.mount), sealed=False)
        return report

    def let_go(self, number: str) -> None:
        """Unmount the stripe that failed (its device is `number`), at once; what still uses it keeps its disks until it ends. Raises `DiskError`."""
        layers = [mount.number for mount in self._kernel.mounts() if mount.point == self.rules.mount]
        if layers and layers[-1] == number:  # never what somebody mounted over it
            with run_lock(self.settings.run_directory / DISKS_LOCK, "unmount the stripe"), ExitStack() as locks:
                self._steps(locks, lazy=True).unmount(self.rules.mount)

    def wipe(self, serials: Sequence[str], *, destroy: bool) -> Report:
        """Erase whatever is on the disks with these serial numbers, if nobody uses them. Without `destroy` it only says what would be erased.

        A keeper may run: what it is at is waited for. It looks again soon, for the lock was taken, and makes its stripe of the blank disks.
        """
        if not destroy:
            return self._reported(lambda began: self._plan_wipe(serials, began))
        return self._reported(lambda began: self._changing(lambda locks: self._wipe(serials, began, locks), patience=KEEPER_PATIENCE))

    def _reported(self, work: Callable[[float], Report]) -> Report:
        """The work's report, with what stopped it as a refusal."""
        began = clock.monotonic()
        try:
            report = work(began)
        except NvcacheError as error:
            hung = error.code in (Code.TOOL_STALLED, Code.DISK_STALLED)
            code = DiskCode.N06 if hung else _REFUSALS.get(error.code, DiskCode.N08)
            given = error.facts.get("disk_code", code)  # None where no code says it better than the message
            named = None if given is None else str(given)
            report = Report(
                outcome="Refused",
                case=str(Case.C14) if hung else None,
                code=named,
                reason=str(error),
                hint=error.hint,
                codes=(named,) if named else (),
                seconds=round(clock.monotonic() - began, 3),
            )
        return report

    def _ensure(self, began: float) -> Report:
        with run_lock(self.settings.run_directory / DISKS_LOCK, "change the disks"):
            with ExitStack() as locks:
                report = self._run(decide, began, locks)
            return replace(self._tuned(report), seconds=round(clock.monotonic() - began, 3)) if report.mounted else report

    def _tuned(self, report: Report) -> Report:
        """Set the queues of the mounted stripe, once udev is done with its disks, and say what came of it."""
        if report.outcome != "Unchanged":
            tuning.settle(self._tools, self._kernel)
        found = tuning.wanted(self._kernel, self.settings, str(report.backend), report.array or report.members[0], report.members)
        step = change(found)
        if step:
            self._say(step)
        found = tuning.put(self._kernel, found)
        told = tuple(f"{DiskCode.W04}: {text}" for text in complaints(found))
        for text in told:
            log.warning("%s", text)
        codes = tuple(dict.fromkeys((*report.codes, *([str(DiskCode.W04)] if told else ()))))
        steps = (*report.steps, *([step] if step else ()))
        return _with_tuning(replace(report, codes=codes, warnings=(*report.warnings, *told), steps=steps), found)

    def _steps(self, locks: ExitStack, *, lazy: bool) -> Steps:
        return Steps(self._scanner, locks, say=self._say, furnish=self.furnish, lazy=lazy)

    def _unkept(self, work: Callable[[ExitStack], Report]) -> Report:
        """What `work` reports, while no keeper runs: it would make a stripe of what is given back at once."""
        with run_lock(self.settings.run_directory / KEEPER_LOCK, "take the stripe apart"):
            return self._changing(work)

    def _changing(self, work: Callable[[ExitStack], Report], *, patience: float = 0.0) -> Report:
        with run_lock(self.settings.run_directory / DISKS_LOCK, "change the disks", patience=patience, say=self._say), ExitStack() as locks:
            return work(locks)

    def _run(self, decider: Callable[[Machine, Rules], StripePlan], began: float, locks: ExitStack) -> Report:
        run = self._steps(locks, lazy=decider is decide)
        waiting_since = clock.monotonic()
        previous: StripePlan | None = None
        failed: list[StripePlan] = []
        for _ in range(ROUNDS):
            machine, plan = run.decide(decider, settled=clock.monotonic() - waiting_since >= self.settings.settle_seconds)
            while plan.waiting and not self._stopped():
                self._say(f"{plan.case} {plan.reason}")
                with Hotplug() as hotplug:
                    left = self.settings.settle_seconds - (clock.monotonic() - waiting_since)
                    hotplug.wait(max(0.1, min(WAIT_STEP, left)))
                machine, plan = run.decide(decider, settled=clock.monotonic() - waiting_since >= self.settings.settle_seconds)
            if plan.done:
                return self._finish(run, plan, machine, began)
            if plan.refused or not plan.steps:
                return self._report(plan, machine, began, outcome="Refused", steps=tuple(run.did))
            if plan.steps in [tried.steps for tried in failed] and run.failure:
                raise DiskError(run.failure.code, f"cannot {plan.steps[0]}: {run.failure}")
            if previous is not None and previous.steps == plan.steps:
                raise DiskError(Code.TOOL_FAILED, f"cannot {plan.steps[0]}: the kernel shows no change ({self._tools.last})")
            previous = plan
            if not run.carry_out(plan):
                failed.append(plan)
        raise DiskError(Code.TOOL_FAILED, f"cannot settle the stripe: after {ROUNDS} looks it is still in case {plan.case}")

    def _finish(self, run: Steps, plan: StripePlan, machine: Machine, began: float) -> Report:
        if plan.stripe is None or plan.stripe.name is None:  # a teardown; whoever asked for it has looked at the disks
            FailedDisks(self.settings.run_directory).forget()
            return self._report(plan, machine, began, outcome="Removed" if run.did else "Unchanged", steps=tuple(run.did))
        self.furnish()
        report = self._report(plan, machine, began, outcome=run.outcome, steps=tuple(run.did))
        lost = run.lost
        if lost is not None:
            report = replace(report, code=str(DiskCode.R01), reason=lost, codes=(str(DiskCode.R01), *report.codes))
        return report

    def furnish(self) -> None:
        """Make the store's folder and those that pods mount, owned by `store_owner`; nothing that is there is changed but its owner.

        That owner may put anything in a folder's place at any moment, so each is opened once, through no link. Raises `DiskError`.
        """
        with ExitStack() as opened:
            try:
                handle = os.open(self.settings.mount, FOLDER)
                opened.callback(os.close, handle)
                store = _given(handle, "store", self.owner, opened)
                for name in ("models", "hub"):
                    _given(store, name, self.owner, opened)
            except OSError as error:
                raise DiskError(
                    Code.DISKS_REFUSED if error.errno in (errno.ENOTDIR, errno.ELOOP) else Code.DISK_IO,
                    f"cannot use the store's folder {error.filename} at {self.settings.mount}: {error.strerror} (it must be a directory, no link)",
                ) from error

    @property
    def owner(self) -> tuple[int, int]:
        """uid and gid that the store is given."""
        if self.settings.store_owner is None:
            return os.geteuid(), os.getegid()
        uid, _, gid = self.settings.store_owner.partition(":")
        return int(uid), int(gid)

    def _plan_wipe(self, serials: Sequence[str], began: float) -> Report:
        with self._scanner.look() as machine:
            plan = decide(machine, self.rules)
            steps = tuple(_erasure(self._wipeable(machine, plan, serial)) for serial in serials)
        return self._report(plan, machine, began, outcome="Planned", steps=steps)

    def _wipe(self, serials: Sequence[str], began: float, locks: ExitStack) -> Report:
        self._steps(locks, lazy=False).lock()
        with self._scanner.look() as machine:
            plan = decide(machine, self.rules)
            chosen = [self._wipeable(machine, plan, serial) for serial in serials]  # all are judged before the first is written to
        steps = tuple(_erasure(disk) for disk in chosen)
        for disk, step in zip(chosen, steps, strict=True):
            if disk.content is None:
                raise DiskError(Code.DISKS_REFUSED, f"cannot {step}: it cannot be read ({disk.unreadable})")
            self._say(step)
            probe.clear(disk.node, disk.content)
        with self._scanner.look() as machine:
            plan = decide(machine, self.rules)
        left = [disk.node for disk in machine.disks if disk.serial in serials and not isinstance(judge(disk, self.rules), Blank)]
        if left:
            raise DiskError(Code.TOOL_FAILED, f"cannot wipe {', '.join(left)}: something is still recognised on it")
        return self._report(plan, machine, began, outcome="Wiped", steps=steps)

    def _wipeable(self, machine: Machine, plan: StripePlan, serial: str) -> DiskFacts:
        found = [disk for disk in machine.disks if disk.serial == serial]
        if len(found) != 1:
            why = "no NVMe disk has this serial number" if not found else f"{len(found)} disks have this serial number"
            raise DiskError(
                Code.DISKS_REFUSED,
                f"cannot wipe the disk with serial {serial}: {why}",
                hint="`nvcache disks` shows the serial numbers",
                facts={"disk_code": None},
            )
        if plan.stripe is not None and found[0] in [member.disk for member in plan.stripe.members]:
            what = f"cannot wipe {found[0].node}: it is a member of our whole stripe"
            raise DiskError(Code.DISKS_REFUSED, what, hint="`nvcache disks teardown` gives all its disks back", facts={"disk_code": None})
        refusal = refused_wipe(found[0], self.rules)
        if refusal is not None:
            why, facts = f"{refusal.code} {refusal.reason}", {"disk_code": refusal.code}
            raise DiskError(Code.DISKS_REFUSED, f"cannot wipe {found[0].node}: {why}", hint=DISK_CODES[refusal.code].remedy, facts=dict(facts))
        return found[0]

    # -- telling

    def _report(self, plan: StripePlan, machine: Machine, began: float, *, outcome: str, steps: tuple[str, ...]) -> Report:
        stripe, mounted = plan.stripe, machine.mounts[-1] if machine.mounts else None
        ours = plan.done and stripe is not None and mounted is not None
        codes = [str(plan.code)] if plan.code else []
        codes += [str(code) for code, _ in plan.warnings]
        codes += [str(verdict.code) for verdict in plan.verdicts if isinstance(verdict, Foreign)]
        top = machine.top(stripe.name) if stripe and stripe.name else None
        return Report(
            outcome=outcome,
            case=str(plan.case),
            code=str(plan.code) if plan.code else None,
            reason=plan.reason,
            hint=DISK_CODES[plan.code].remedy if plan.code else None,
            codes=tuple(dict.fromkeys(codes)),
            warnings=tuple(f"{code}: {text}" for code, text in plan.warnings),
            disks=tuple(_shown(verdict) for verdict in plan.verdicts),
            steps=steps,
            backend=_backend(stripe),
            filesystem=mounted.filesystem if ours and mounted else (top.probe.type if top else None),
            array=stripe.node if stripe and stripe.kind in (Kind.MD, Kind.LVM) else None,
            members=tuple(member.disk.node for member in stripe.members) if stripe else (),
            mount=self.rules.mount if ours else None,
            store=str(self.settings.mount / "store") if ours else None,
            fs_uuid=top.probe.uuid if top else None,
            seconds=round(clock.monotonic() - began, 3),
        )


def _given(parent: int, name: str, owner: tuple[int, int], opened: ExitStack) -> int:
    """The folder `name` in `parent`, opened; made if it is not there, and given to `owner` if it is another's. Raises OSError."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent)
    handle = os.open(name, FOLDER, dir_fd=parent)
    opened.callback(os.close, handle)
    found = os.fstat(handle)
    if (found.st_uid, found.st_gid) != owner:
        os.fchown(handle, *owner)
        os.fchmod(handle, 0o755)
    return handle


def _erasure(disk: DiskFacts) -> str:
    found = (disk.probe.type or disk.probe.table) if disk.probe else None
    return f"erase {found or 'what has no known signature'} on {disk.node} (serial {disk.serial})"


def _shown(verdict: Verdict) -> dict[str, object]:
    disk = verdict.disk
    named: dict[str, object] = {"name": disk.name, "node": disk.node, "serial": disk.serial, "model": disk.model, "size": disk.size}
    match verdict:
        case Ours(_, kind, stripe, _):
            return {
                **named,
                "verdict": "ours",
                "code": None,
                "reason": f"member of our {kind} stripe {stripe}" if stripe else "left of a creation cut short",
            }
        case Blank():
            return {**named, "verdict": "blank", "code": None, "reason": "blank, by blkid and by its own bytes"}
        case Foreign(_, code, reason, counts):
            return {**named, "verdict": "refused" if counts else "not used", "code": str(code), "reason": reason}


def _with_tuning(report: Report, tuned: Sequence[Tuned]) -> Report:
    read_ahead = next((one.now for one in tuned if one.knob is Knob.READ_AHEAD), None)
    return replace(report, tuning=tuning.shown(tuned), read_ahead=read_ahead if isinstance(read_ahead, int) else None)


def _backend(stripe: Found | None) -> str | None:
    if stripe is None:
        return None
    return str(stripe.kind) if stripe.kind in (Kind.MD, Kind.LVM) else "single"
