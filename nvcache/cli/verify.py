"""`nvcache verify`: has the daemon re-read models from the disk, and says what was found and mended. It reads no weights itself."""

from __future__ import annotations

import functools
import time

import click

from nvcache.cli import complete, output
from nvcache.cli.daemon import Json, connected, daemon, exit_for
from nvcache.cli.exits import Exit, worst
from nvcache.cli.follow import Follower, Task
from nvcache.cli.models import HOLDS_BYTES
from nvcache.cli.progress import watcher
from nvcache.core.ref import shown


@click.command()
@click.argument("refs", nargs=-1, metavar="[REF...]", shell_complete=complete.refs)
@click.option("--all", "all_", is_flag=True, help="every model that is here, one after the other")
@click.option("--bandwidth", type=output.Size(), metavar="SIZE", help="read this much a second at most, such as 200MB  [default: no limit]")
@click.option("--timeout", type=output.Seconds(above=True), metavar="SECONDS", help="give up waiting after this long; the check goes on")
@click.option("--json", "json_", is_flag=True, help="one JSON object a model, one a line")
@connected
def verify(refs: tuple[str, ...], *, all_: bool, bandwidth: int | None, timeout: float | None, json_: bool) -> int:
    """Re-read models and mend what is wrong.

    Every chunk is read from the disk, past the page cache, and compared. Only bad chunks are fetched again, from the revision the model was made of.
    Exit code 0 means that every byte is right now. The daemon does the same by itself, slowly: see scrub_days in the settings.
    """
    if bool(refs) is all_:
        raise click.UsageError("give one REF or several, or --all")
    asked = daemon()
    if all_:
        refs = tuple(model["entry"] for model in asked.get("/v1/models")["models"] if model["state"] in HOLDS_BYTES)
        if not refs:
            output.say("no models yet")
    body: Json = {} if bandwidth is None else {"bandwidth": bandwidth}
    tasks = [Task(shown(ref), functools.partial(asked.on, "POST", ref, "/verify", body)) for ref in refs]
    until = None if timeout is None else time.monotonic() + timeout
    for batch in [[task] for task in tasks] if all_ else [tasks]:
        Follower(asked, watcher(), timeout=None if until is None else max(0.0, until - time.monotonic())).run(batch)
    return worst([_report(task, json_=json_) for task in tasks])


def _report(task: Task, *, json_: bool) -> Exit:
    """Print one model's outcome; returns its exit code."""
    job = task.job or {}
    bad, chunks = job.get("bad_files", []), job.get("repaired_chunks", 0)
    if json_:
        found = {"ref": task.label, "entry": job.get("entry"), "state": "failed" if task.problem else "ok", "bad_files": bad}
        cached = {name: job.get(name) for name in ("cached_before", "cached_after")}
        counts = {**cached, "repaired_chunks": chunks, "fetched_bytes": task.fetched, "seconds": round(task.seconds, 3)}
        output.as_json({**found, **counts, **({"error": task.problem} if task.problem else {})}, line=True)
    elif not task.problem and not bad:
        read = f"{output.size(job['progress']['bytes_total'])} read in {output.duration(task.seconds)}"
        click.echo(f"{task.label}: every byte is right, {read}{_cached(job)}")
    elif bad:
        click.echo(f"{task.label}: wrong bytes in {', '.join(bad)}")
        if not task.problem:
            click.echo(f"{task.label}: {output.count(chunks, 'chunk')} mended, {output.size(task.fetched)} fetched; every byte is right now")
    if task.problem:
        output.complain(task.problem["detail"], task.problem.get("hint"))
        return exit_for(task.problem)
    return Exit.OK


def _cached(job: Json) -> str:
    """What became of the page cache, where the model was in it."""
    before, after = job.get("cached_before") or 0, job.get("cached_after") or 0
    return f"; {output.size(before)} of it in memory before, {output.size(after)} after" if before else ""
