"""`nvcache warm`: asks the daemon to make models ready, waits, prints where they are. It fetches nothing itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import click

from nvcache.cli import complete, output
from nvcache.cli.daemon import Daemon, Json, connected, daemon, exit_for, failed, problem_from, problem_of
from nvcache.cli.exits import Exit, worst
from nvcache.cli.follow import Follower, Task
from nvcache.cli.progress import watcher
from nvcache.client import Problem
from nvcache.errors import Code, DiskError

RESULT = ("ref", "entry", "revision", "state", "path", "hub_cache", "files", "bytes")


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...", shell_complete=complete.refs)
@click.option("--revision", metavar="REV", help="branch, tag or commit, instead of REF@REV")
@click.option("--include", multiple=True, metavar="PATTERN", help="take only files that match (shell pattern over the whole path); may be repeated")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="leave out files that match; may be repeated")
@click.option("--as", "alias", metavar="ALIAS", help="show the model in the HuggingFace view under this org/name as well")
@click.option("--pin", is_flag=True, help="never remove it to make room")
@click.option("--timeout", type=output.Seconds(above=True), metavar="SECONDS", help="give up waiting after this long; the fill goes on")
@click.option("--wait-daemon", type=output.Seconds(), default=0.0, metavar="SECONDS", help="wait this long for a daemon that is just starting")
@click.option("--no-wait", is_flag=True, help="start it and return")
@click.option("--dry-run", is_flag=True, help="say what would be fetched, and fetch nothing")
@click.option("--page-cache", is_flag=True, help="when ready, read the files into the page cache, so that the first load runs from memory")
@click.option("--json", "json_", is_flag=True, help="one JSON object a model, one a line")
@connected
def warm(  # noqa: PLR0913 - click hands over one argument an option
    refs: tuple[str, ...],
    *,
    revision: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    alias: str | None,
    pin: bool,
    timeout: float | None,
    wait_daemon: float,
    no_wait: bool,
    dry_run: bool,
    page_cache: bool,
    json_: bool,
) -> int:
    """Make models ready and print their directories.

    Fetches what is missing, proves every byte and waits until it is there. stdout has one path a model and nothing else, so that
    `DIR=$(nvcache warm org/name)` works; progress goes to stderr. The same REF twice is one fetch; Ctrl-C stops the waiting, not the fill.
    """
    if alias and len(refs) > 1:
        raise click.UsageError("--as names one model, so give one REF")
    wish: Json = {"revision": revision, "include": list(include), "exclude": list(exclude), "alias": alias, "pin": pin}
    wish = {name: value for name, value in wish.items() if value}
    wishes = [{"ref": ref, **wish} for ref in refs]
    asked = daemon()
    if dry_run:
        if timeout is not None:
            until = time.monotonic() + timeout
            asked.within(lambda: until - time.monotonic())
        return _dry_run(asked, wishes, json_=json_)
    tasks = [Task(body["ref"], functools.partial(asked.post, "/v1/models", body)) for body in wishes]
    follower = Follower(asked, watcher(), wait=not no_wait, timeout=timeout, wait_daemon=wait_daemon)
    try:
        follower.run(tasks)
    except KeyboardInterrupt:
        output.say("stopped waiting; the fill goes on in the daemon, `nvcache jobs` shows it")
        raise
    return worst([_report(task, json_=json_, page_cache=page_cache) for task in tasks])


def _report(task: Task, *, json_: bool, page_cache: bool) -> Exit:
    """Print one model's outcome; returns its exit code."""
    if task.model is not None and task.model["state"] != "ready":
        task.problem = task.model.get("error") or problem_from(Code.NOT_READY, f"cannot give a path for {task.label}: it is {task.model['state']}")
    if json_:
        output.as_json(result(task), line=True)
    if task.problem is not None:
        output.complain(task.problem["detail"], task.problem.get("hint"))
        return exit_for(task.problem)
    if task.model is None:
        if not json_:
            output.say(f"{task.label}: {task.state}, job {(task.job or {}).get('id')}")
        return Exit.OK
    for warning in task.model["warnings"]:
        output.say(f"warning: {task.label}: {warning}")
    if task.model["note"]:
        output.say(f"note: {task.label}: {task.model['note']}")
    if page_cache:
        _prefetch(task.label, task.model["path"])
    if not json_:
        click.echo(task.model["path"])
    return Exit.OK


def result(task: Task) -> Json:
    """What `--json` prints of one model; `seconds` is how long this command waited, `fetched_bytes` what crossed the network meanwhile."""
    found: Json = dict.fromkeys(RESULT)
    if task.problem is not None:
        found |= {"ref": task.label, "state": "failed", "error": task.problem}
    elif task.model is not None:
        found |= {name: task.model[name] for name in RESULT}
    elif task.job is not None:
        found |= {"ref": task.label, "entry": task.job["entry"], "state": task.state, "job": task.job["id"]}
    return {**found, "fetched_bytes": task.fetched, "seconds": round(task.seconds, 3)}


def _prefetch(label: str, path: str) -> None:
    from nvcache.client import prefetch

    try:
        done = prefetch(path)
    except OSError as error:
        raise DiskError(Code.DISK_IO, f"cannot read {path} into the page cache: {error.strerror}") from error
    left = f", {output.size(done.left_out)} left out for want of memory" if done.left_out else ""
    read = f"{output.size(done.read)} read at {output.rate(done.rate)}"
    output.say(f"{label}: {read}, {output.size(done.already_cached)} were in the page cache already{left}")


def _dry_run(asked: Daemon, wishes: Sequence[Json], *, json_: bool) -> int:
    exits = []
    for wish in wishes:
        try:
            plan = asked.post("/v1/models", {**wish, "dry_run": True})
        except Problem as problem:
            exits.append(failed(wish["ref"], problem_of(problem), json_=json_))
            continue
        if json_:
            output.as_json(plan, line=True)
        else:
            _show_plan(plan)
        exits.append(exit_for(plan["refusal"]) if plan["refusal"] else Exit.OK)
    return worst(exits)


def _show_plan(plan: Json) -> None:
    output.table(
        ["FILE", "SIZE", "STATE"],
        [(file["path"], output.size(file["size"]), "here" if file["here"] else "to fetch") for file in plan["paths"]]
        + [(file["path"], output.size(file["size"]), "left out") for file in plan["left_out"]],
        right=["SIZE"],
    )
    click.echo()
    left = sum(file["size"] for file in plan["left_out"])
    took = "unknown: no rate measured yet" if plan["seconds"] is None else f"about {output.duration(plan['seconds'])} at the last measured rate"
    if not plan["bytes_to_fetch"]:
        took = "none"
    output.fields(
        [
            ("model", plan["ref"]),
            ("entry", plan["entry"]),
            ("all", f"{output.size(plan['bytes'])} in {output.count(plan['files'], 'file')}"),
            ("here by digest", output.size(plan["bytes_here"])),
            ("to fetch", output.size(plan["bytes_to_fetch"])),
            ("left out", f"{output.size(left)} in {output.count(len(plan['left_out']), 'file')}"),
            ("time", took),
            ("fits", "yes" if plan["fits"] else "no"),
        ]
    )
    if plan["refusal"]:
        output.complain(plan["refusal"]["detail"], plan["refusal"]["hint"])
