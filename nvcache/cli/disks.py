"""`nvcache disks`: shows, plans, makes, keeps and gives back this machine's stripe. It asks no daemon and decides nothing: `core` decides what is
safe, `engine.stripe` acts, and this module prints what they report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nvcache.cli import output
from nvcache.cli.daemon import Json, exit_for, problem_of
from nvcache.cli.exits import Exit
from nvcache.cli.serve import SettingsCommand, config_option, set_by
from nvcache.errors import Code, ConfigError, NvcacheError, RequestError

if TYPE_CHECKING:
    from rich.text import Text

    from nvcache.engine.handover import StripeState
    from nvcache.engine.stripe import Report, Stripe
    from nvcache.settings import Settings

NO_DISK = "this node has no NVMe disk at all"
COLUMNS = ("DEVICE", "SIZE", "MODEL", "SERIAL", "VERDICT", "CODE", "WHY")

json_option = click.option("--json", "json_", is_flag=True, help="the report as JSON")


class DisksCommand(SettingsCommand):
    """A command with a flag for every setting of the disks."""

    settings = "DiskSettings"


class DisksGroup(DisksCommand, click.Group):
    """The same for the group."""


@click.group(cls=DisksGroup, invoke_without_command=True, subcommand_metavar="[COMMAND]")
@config_option
@json_option
@click.pass_context
def disks(context: click.Context, /, *, config: Path | None, json_: bool, **flags: Any) -> int | None:
    """Show the node's NVMe disks and what each is to nvcache; make, keep and give back the stripe.

    Without a command it lists every NVMe namespace: blank, ours, not used or refused, with a code and the reason. It writes to no disk. The settings
    are those of `serve` that concern disks; before a command's name an option means what it means after it. The remedy for each code:
    docs/troubleshooting.md.
    """
    if context.invoked_subcommand is None:
        return _report(json_, lambda: _stripe(config, flags).look(), show_disks)
    context.default_map = {name: {"config": config, "json_": json_, **set_by(flags)} for name in disks.commands}
    return None


@disks.command(cls=DisksCommand)
@config_option
@json_option
def plan(*, config: Path | None, json_: bool, **flags: Any) -> int:
    """Say what `ensure` would do, and do nothing.

    Writes to no disk and waits for none. Exit 11 if it would refuse.
    """
    return _report(json_, lambda: _stripe(config, flags, "plan a stripe").plan(), show_steps)


@disks.command(cls=DisksCommand)
@config_option
@json_option
def ensure(*, config: Path | None, json_: bool, **flags: Any) -> int:
    """Have the stripe mounted: adopt it, assemble it, or make it.

    Can be repeated at any time; what is as it should be is left alone. Only disks proven blank, or ours, are written to. Exit 0 only when the stripe
    is mounted and ours; 11 when it is refused, 10 while another nvcache works on the disks.
    """
    return _report(json_, lambda: _stripe(config, flags, "make a stripe", root=True).ensure(), show_stripe, mounted=True)


@disks.command(cls=DisksCommand)
@config_option
@json_option
def watch(*, config: Path | None, json_: bool, **flags: Any) -> int:
    """Have the stripe mounted and keep it so, in the foreground.

    For a process of its own beside `nvcache serve --follow`: tells it in the run directory's stripe.json what the stripe does, withdraws the stripe
    when a disk fails, and makes it anew. Prints a line for each change; SIGTERM and SIGINT stop it within 10 seconds with exit code 0, and the stripe
    stays mounted.
    """
    from nvcache import logs
    from nvcache.cli.keep import keep

    chosen = _settings(config, flags, "keep a stripe", root=True)
    logs.setup(chosen.log_level, chosen.log_format)
    return keep(chosen, json_=json_)


@disks.command(cls=DisksCommand)
@config_option
@json_option
def status(*, config: Path | None, json_: bool, **flags: Any) -> int:
    """Say what `disks watch` last said of the stripe.

    Reads the run directory's stripe.json and nothing else: it needs no root and waits for no disk. Exit 0 when the stripe is mounted, 11 when it is
    not, 9 when no `disks watch` has written there. What a daemon does that keeps its stripe itself, `nvcache doctor` shows.
    """
    from nvcache import settings
    from nvcache.cli.disks_status import tell

    return tell(settings.load(config=config, flags=set_by(flags)).run_directory, json_=json_)


@disks.command(cls=DisksCommand)
@click.option("--dry-run", is_flag=True, help="say what would be done, and do nothing")
@config_option
@json_option
def teardown(*, dry_run: bool, config: Path | None, json_: bool, **flags: Any) -> int:
    """Give the disks back blank; what is cached on them is lost.

    Unmounts the stripe, takes it apart and erases nvcache's own marks. Touches nothing that is not nvcache's, and refuses while something uses it.
    """

    def act() -> Report:
        stripe = _stripe(config, flags, "give the disks back", root=not dry_run)
        return stripe.plan_teardown() if dry_run else stripe.teardown()

    return _report(json_, act, show_steps)


@disks.command(cls=DisksCommand)
@click.option("--serial", "serials", multiple=True, required=True, metavar="S", help="serial number of a disk to erase; may be repeated")
@click.option("--yes-destroy", is_flag=True, help="really erase; without it, only say what would be erased")
@config_option
@json_option
def wipe(*, serials: tuple[str, ...], yes_destroy: bool, config: Path | None, json_: bool, **flags: Any) -> int:
    """Erase what somebody else left on disks named by serial number.

    Without --yes-destroy it says what it would erase and erases nothing. It never takes a disk of a model that is not allowed, nor one that is
    partitioned, mounted, held or in use. It clears what names the contents; the rest of the bytes stays until it is overwritten.
    """

    def act() -> Report:
        return _stripe(config, flags, "erase disks", root=yes_destroy).wipe(serials, destroy=yes_destroy)

    code = _report(json_, act, show_steps)
    if code == Exit.OK and not yes_destroy:
        output.say("nothing was erased; add --yes-destroy to do it")
    return code


def _settings(config: Path | None, flags: Mapping[str, Any], what: str, *, root: bool) -> Settings:
    """The settings, with a backend that makes stripes. Raises `ConfigError` for another, `RequestError` where root is needed."""
    from nvcache import settings

    chosen = settings.load(config=config, flags=set_by(flags))
    if root and os.geteuid() != 0:
        hint = "run it with sudo, or in a privileged container"
        raise RequestError(Code.NOT_ALLOWED, f"cannot {what}: it needs root, and this is uid {os.geteuid()}", hint=hint)
    if chosen.backend == "directory" and what:
        hint = "give --backend md or --backend lvm if the node's disks are to be striped"
        raise ConfigError(Code.BAD_CONFIG, f"cannot {what}: backend is directory, where somebody else makes the file system", hint=hint)
    return chosen if chosen.backend in ("md", "lvm") else chosen.model_copy(update={"backend": "md"})


def _stripe(config: Path | None, flags: Mapping[str, Any], what: str = "", *, root: bool = False) -> Stripe:
    """The stripe of this machine, as set; `what` is to be done with it, nothing when it is only looked at."""
    from nvcache import logs

    chosen = _settings(config, flags, what, root=root)
    logs.setup(chosen.log_level, "json" if chosen.log_format == "json" else "console")
    if os.geteuid() != 0:
        output.say(f"this is uid {os.geteuid()}: without root, what is on the disks cannot be read")
    from nvcache.engine.stripe import Stripe

    return Stripe(chosen, say=output.say)


def _report(json_: bool, act: Callable[[], Report], show: Callable[[Report], None], *, mounted: bool = False) -> Exit:
    """Do it and print what came of it; returns the exit code. `mounted`: it is a success only if the stripe is mounted now."""
    try:
        report = act()
    except NvcacheError as error:  # a wrong setting: nothing was looked at
        if not json_:
            raise
        problem = problem_of(error)
        output.as_json({"outcome": "Failed", "code": None, "reason": problem["detail"], "error": problem})
        output.complain(problem["detail"], problem["hint"])
        return exit_for(problem)
    refused = report.outcome == "Refused" or (mounted and not report.mounted)
    if json_:
        output.as_json(asdict(report))
    elif not refused:
        show(report)
    elif report.disks:
        show_disks(report)
    else:
        output.say(NO_DISK)
    if not refused:
        return Exit.OK
    output.complain(report.reason if report.reason.startswith("cannot ") else f"cannot use the disks: {_coded(report)}", remedy(report.code))
    return Exit.HELD if report.code == "D13" else Exit.DISK


def show_disks(report: Report) -> None:
    """The table of every namespace, what the stripe is, and what to do about each code."""
    if report.disks:
        output.table(COLUMNS, [_row(disk) for disk in report.disks], right=["SIZE"], whole=["DEVICE", "SIZE", "SERIAL"])
        click.echo()
    else:
        output.say(NO_DISK)
    output.fields(_summary(report))
    todo = [(code, remedy(code) or "") for code in _codes(report)]
    if todo:
        click.echo()
        output.table(["CODE", "WHAT TO DO"], todo)


def show_stripe(report: Report) -> None:
    """What `ensure` did and what is there now."""
    output.fields([("outcome", output.state(report.outcome)), *_summary(report), ("time", output.duration(report.seconds))])


def show_steps(report: Report) -> None:
    """A plan, or what was done of it."""
    output.fields([("outcome", output.state(report.outcome)), *_summary(report)])
    if report.steps:
        click.echo()
    for number, step in enumerate(report.steps, 1):
        click.echo(f"{number:3}. {output.visible(step)}")


def _summary(report: Report) -> list[tuple[str, str]]:
    from nvcache.core.stripe import CASES, Case

    return [
        *([("case", f"{report.case}: {CASES[Case(report.case)][0]}")] if report.case else []),
        ("why", _coded(report)),
        *([("stripe", on_disks(asdict(report))), ("members", " ".join(report.members))] if report.members else []),
        *([("store", report.store)] if report.store else []),
        *([("read-ahead", f"{report.read_ahead >> 10} KiB")] if report.read_ahead else []),
        *_queues(report),
        *[("warning", text) for text in report.warnings],
    ]


def _queues(report: Report) -> list[tuple[str, str]]:
    """What the queues of the stripe's disks are set to: `none`, or each value with its disks where they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for one in report.tuning:
        if one["setting"] != "read_ahead":
            found.setdefault(str(one["setting"]), {}).setdefault(str(one["now"]), []).append(str(one["device"]))
    return [
        (setting, next(iter(values)) if len(values) == 1 else "; ".join(f"{value}: {' '.join(disks)}" for value, disks in values.items()))
        for setting, values in found.items()
    ]


def on_disks(stripe: Mapping[str, Any]) -> str:
    """A stripe in one phrase, from a report or the daemon's answer: `md of 4 disks, /dev/md127, xfs, mounted at /var/lib/nvcache/mnt`."""
    members = stripe.get("members") or ()
    kind = f"{stripe['backend']} of {output.count(len(members), 'disk')}" if len(members) > 1 else "1 disk"
    where = f"mounted at {stripe['mount']}" if stripe.get("mount") else "not mounted"
    return ", ".join(part for part in (kind, stripe.get("array"), stripe.get("filesystem"), where) if part)


def stripe_line(found: Json) -> str | None:
    """What the daemon says of the node's disks, in one line; None where its store is a plain directory."""
    state = found.get("state", "mounted")
    if state == "mounted":
        return None if found.get("backend") in (None, "directory") else on_disks(found)
    return f"{state}: {' '.join(str(found[name]) for name in ('code', 'reason') if found.get(name))}"


def word(state: StripeState) -> str:
    """What the disks part says, in one line."""
    return stripe_line({"state": state.state, "code": state.code, "reason": state.reason, **state.details}) or state.state


def remedy(code: str | None) -> str | None:
    """What a person does about a code of the disks; None without a code, or for one that a newer version made up."""
    from nvcache.core.disk_codes import DISK_CODES, DiskCode

    return DISK_CODES[DiskCode(code)].remedy if code and code in DiskCode.__members__ else None


def _codes(report: Report) -> list[str]:
    """The codes a person should read about: all, but where there is a stripe those of disks that are never used are no news."""
    unused = {disk["code"] for disk in report.disks if disk["verdict"] == "not used"} if report.members else set()
    refused = {disk["code"] for disk in report.disks if disk["verdict"] == "refused"}
    return [code for code in report.codes if code not in unused - refused]


def _row(disk: Json) -> tuple[str | Text, ...]:
    verdict = output.state(disk["verdict"])
    return disk["node"], output.size(disk["size"]), disk["model"], disk["serial"], verdict, disk["code"] or "", disk["reason"]


def _coded(report: Report) -> str:
    return f"{report.code} {report.reason}" if report.code else report.reason
