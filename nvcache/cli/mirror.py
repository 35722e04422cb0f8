"""`nvcache mirror`: copies a Hub model into Azure Blob, in this process. It asks no daemon; plan and result go to stdout, progress to stderr."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from nvcache.cli import output
from nvcache.cli.daemon import Json, exit_for, problem_of
from nvcache.cli.exits import Exit
from nvcache.cli.follow import Task
from nvcache.cli.progress import watcher
from nvcache.cli.serve import config_option

if TYPE_CHECKING:
    from nvcache.engine.lanes import Progress
    from nvcache.engine.mirror import Look, Outcome

LANES = 8
NAMED = 5  # foreign files that are named


@click.command()
@click.argument("ref", metavar="REF")
@click.argument("destination", metavar="AZ")
@click.option("--include", multiple=True, metavar="PATTERN", help="take only files that match (shell pattern over the whole path); may be repeated")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="leave out files that match; may be repeated")
@click.option("--lanes", type=click.IntRange(1, 64), default=LANES, show_default=True, metavar="N", help="blocks of 16 MiB on their way at a time")
@click.option("--quick", is_flag=True, help="read nothing back: rely on the MD5 that Azure checks of each block")
@click.option("--replace", is_flag=True, help="write over and beside files that no mirror of this model put there")
@click.option("--dry-run", is_flag=True, help="say what would be sent, and send nothing")
@click.option("--json", "json_", is_flag=True, help="one JSON object")
@config_option
def mirror(  # noqa: PLR0913 - click hands over one argument an option
    ref: str,
    destination: str,
    *,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    lanes: int,
    quick: bool,
    replace: bool,
    dry_run: bool,
    json_: bool,
    config: Path | None,
) -> int:
    """Copy a Hub model into Azure Blob, with the Hub's digests.

    REF is [hf://]org/name[@revision], AZ is az://account/container/prefix. Every file is proven against the Hub's digest before it becomes a blob,
    and read back afterwards. The same command again goes on where it was broken off, and does nothing when all is there. A prefix that holds files
    of anybody else is refused. Settings and credentials are the daemon's: HF_TOKEN, AZURE_STORAGE_…, NVCACHE_AZ_…, FILE.
    """
    from nvcache import logs, settings
    from nvcache.core.manifest import Selection
    from nvcache.core.ref import parse_ref
    from nvcache.engine.mirror import Mirror

    began = time.monotonic()
    to, chosen = parse_ref(destination), settings.load(config=config)
    logs.setup(chosen.log_level, chosen.log_format)
    with Mirror(chosen, to, lanes) as copying:
        look = copying.look(parse_ref(ref), Selection(include, exclude), replace=replace)
        found = {"ref": str(look.resolved.ref), "destination": str(to), **_figures(look)}
        if dry_run:
            _show_plan(found, look, json_=json_)
            return exit_for(problem_of(look.refusal)) if look.refusal else Exit.OK
        if not look.refusal:
            _warn(look)
        try:
            with _Shown(str(look.resolved.ref.at(None))) as shown:
                outcome = copying.run(look, quick=quick, watch=shown.watch)
        except KeyboardInterrupt:
            output.say("stopped; what was sent is kept, and the same command goes on from there. Readers refuse the copy until it is finished")
            raise click.Abort from None  # for a bare interrupt click writes an empty line
    _report(found, look, outcome, time.monotonic() - began, json_=json_)
    return Exit.OK


class _Shown:
    """The run as the one task that the watchers of jobs know to show."""

    def __init__(self, label: str) -> None:
        self._task = Task(label, dict)
        self._watcher = watcher()

    def __enter__(self) -> Self:
        self._watcher.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watcher.__exit__(kind, error, trace)

    def watch(self, stage: str, progress: Progress) -> None:
        """Something may have changed."""
        figures = {name: getattr(progress, name) for name in ("bytes_done", "bytes_total", "files_done", "files_total", "rate", "eta_s")}
        self._task.job = {"state": stage, "progress": {**figures, "bytes_fetched": progress.bytes_done}}
        self._watcher.update([self._task])


def _figures(look: Look) -> Json:
    plan = look.plan
    return {"commit": plan.commit, "files": len(plan.files), "bytes": plan.size, "foreign": list(plan.foreign)}


def _state(look: Look, index: int) -> str:
    copy = look.plan.files[index]
    return "resume" if look.resumes(copy) else copy.state


def _show_plan(found: Json, look: Look, *, json_: bool) -> None:
    plan = look.plan
    rows = [(copy.file.path, copy.file.size, _state(look, index)) for index, copy in enumerate(plan.files)]
    rows += [(left.path, left.size, "left out") for left in plan.left_out]
    plain: Json = {"endpoint": look.endpoint, "credential": look.credential, "bytes_to_send": plan.bytes_to_send, "finished": plan.whole}
    if json_:
        plain["refusal"] = problem_of(look.refusal) if look.refusal else None
        output.as_json({**found, **plain, "paths": [{"path": path, "size": size, "state": state} for path, size, state in rows]}, line=True)
        return
    output.table(["FILE", "SIZE", "STATE"], [(path, output.size(size), state) for path, size, state in rows], right=["SIZE"])
    click.echo()
    resumed = sum(look.resumes(copy) for copy in plan.to_send)
    taken_up = f", {resumed} of them sent in part before" if resumed else ""
    output.fields(
        [
            ("model", found["ref"]),
            ("to", found["destination"]),
            ("endpoint", look.endpoint),
            ("credential", look.credential),
            ("all", f"{output.size(plan.size)} in {output.count(len(plan.files), 'file')}"),
            ("to send", f"{output.size(plan.bytes_to_send)} in {output.count(len(plan.to_send), 'file')}{taken_up}"),
            ("manifest", "as it will be" if plan.whole else "to be written"),
        ]
    )
    if look.refusal:
        output.complain(f"refused: {look.refusal}", look.refusal.hint)
    else:
        _warn(look)


def _warn(look: Look) -> None:
    if look.plan.foreign:
        names = ", ".join(look.plan.foreign[:NAMED]) + (" and more" if len(look.plan.foreign) > NAMED else "")
        what = f"{output.count(len(look.plan.foreign), 'file')} at the destination that the model has not: {names}"
        output.say(f"warning: {what}. Readers take them for part of it and do not show the Hub's commit; remove them, or choose another prefix")


def _report(found: Json, look: Look, outcome: Outcome, seconds: float, *, json_: bool) -> None:
    did = {"files_sent": outcome.files, "bytes_sent": outcome.sent, "bytes_resumed": outcome.found, "bytes_read_back": outcome.read_back}
    if json_:
        output.as_json({**found, **did, "changed": not look.plan.whole, "revision": outcome.revision, "seconds": round(seconds, 3)}, line=True)
        return
    whole = f"{output.size(look.plan.size)} in {output.count(len(look.plan.files), 'file')}"
    if look.plan.whole:
        output.say(f"nothing to do: {whole} are there, at commit {look.plan.commit[:12]}")
    else:
        taken_up = f", {output.size(outcome.found)} taken up from before" if outcome.found else ""
        output.say(
            f"{whole} are there: {output.size(outcome.sent)} sent{taken_up}, {output.size(outcome.read_back)} read back, {output.duration(seconds)}"
        )
    click.echo(f"{found['destination']}@{outcome.revision}")
