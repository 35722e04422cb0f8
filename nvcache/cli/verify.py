"""`nvcache verify`: has the daemon re-read models from the disk, and says what was found and mended. It reads no weights itself."""

from __future__ import annotations

import functools

import click

from nvcache.cli import complete, output
from nvcache.cli.daemon import Daemon, Json, connected, daemon, exit_for
from nvcache.cli.exits import Exit, worst
from nvcache.cli.follow import Follower, Task
from nvcache.cli.progress import watcher


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...", shell_complete=complete.refs)
@click.option("--timeout", type=output.Seconds(above=True), metavar="SECONDS", help="give up waiting after this long; the check goes on")
@click.option("--json", "json_", is_flag=True, help="one JSON object a model, one a line")
@connected
def verify(refs: tuple[str, ...], *, timeout: float | None, json_: bool) -> int:
    """Re-read models and mend what is wrong.

    Every chunk is read from the disk and compared. Only bad chunks are fetched again, from the revision the model was made of. Exit code 0 means
    that every byte is right now.
    """
    asked = daemon()
    tasks = [Task(ref, functools.partial(_ask, asked, ref)) for ref in refs]
    Follower(asked, watcher(), timeout=timeout).run(tasks)
    return worst([_report(task, json_=json_) for task in tasks])


def _ask(asked: Daemon, ref: str) -> Json:
    return asked.on("POST", ref, "/verify")


def _report(task: Task, *, json_: bool) -> Exit:
    """Print one model's outcome; returns its exit code."""
    job = task.job or {}
    bad, chunks = job.get("bad_files", []), job.get("repaired_chunks", 0)
    if json_:
        found = {"ref": task.label, "entry": job.get("entry"), "state": "failed" if task.problem else "ok", "bad_files": bad}
        counts = {"repaired_chunks": chunks, "fetched_bytes": task.fetched, "seconds": round(task.seconds, 3)}
        output.as_json({**found, **counts, **({"error": task.problem} if task.problem else {})}, line=True)
    elif not task.problem and not bad:
        click.echo(f"{task.label}: every byte is right, {output.size(job['progress']['bytes_total'])} read in {output.duration(task.seconds)}")
    elif bad:
        click.echo(f"{task.label}: wrong bytes in {', '.join(bad)}")
        if not task.problem:
            click.echo(f"{task.label}: {output.count(chunks, 'chunk')} mended, {output.size(task.fetched)} fetched; every byte is right now")
    if task.problem:
        output.complain(task.problem["detail"], task.problem.get("hint"))
        return exit_for(task.problem)
    return Exit.OK
