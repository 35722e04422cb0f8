"""`nvcache warm`: asks the daemon to make models ready, waits, prints where they are. It fetches nothing itself.

It is made to be a pod's init container: `podstart` does what such a pod needs besides.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from nvcache.cli import complete, output
from nvcache.cli.daemon import Daemon, Json, connected, daemon, exit_for, problem_of
from nvcache.cli.dryrun import dry_run as plan
from nvcache.cli.exits import Exit, worst
from nvcache.cli.follow import Follower, Task
from nvcache.cli.hold import TTL
from nvcache.cli.podstart import PodStart, write_variables
from nvcache.cli.progress import watcher
from nvcache.client import Prefetched, Problem
from nvcache.core.ref import shown
from nvcache.errors import NvcacheError

DAEMON_SECONDS = 300.0  # how long a pod that needs the model waits for a daemon: a node that boots makes its stripe first
OPPORTUNITY_SECONDS = 60.0  # and one that can do without it
RESULT = ("ref", "entry", "revision", "state", "path", "hub_cache", "files", "bytes")


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...", shell_complete=complete.refs)
@click.option("--revision", metavar="REV", help="branch, tag or commit, instead of REF@REV")
@click.option("--include", multiple=True, metavar="PATTERN", help="take only files that match (shell pattern over the whole path); may be repeated")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="leave out files that match; may be repeated")
@click.option("--as", "alias", metavar="ALIAS", help="show the model in the HuggingFace view under this org/name as well")
@click.option("--require-digest", is_flag=True, help="refuse a model when its source publishes no digest for one of its files")
@click.option("--pin", is_flag=True, help="never remove it to make room")
@click.option("--timeout", type=output.Seconds(above=True), metavar="SECONDS", help="give up waiting after this long; the fill goes on")
@click.option(
    "--wait-daemon",
    type=output.Seconds(),
    metavar="SECONDS",
    help=f"wait this long for a daemon that is just starting  [default: 0; {DAEMON_SECONDS:g} with --lease or --required, "
    f"{OPPORTUNITY_SECONDS:g} with --or-continue]",
)
@click.option("--no-wait", is_flag=True, help="start it and return")
@click.option("--dry-run", is_flag=True, help="say what would be fetched, and fetch nothing")
@click.option(
    "--page-cache",
    is_flag=True,
    help="when ready, read the files into the page cache, so that loading runs from memory; --timeout does not count here",
)
@click.option("--lease", is_flag=True, help="when ready, hold the model, and leave the lease for `nvcache hold` under the same holder")
@click.option(
    "--ttl",
    type=output.Seconds(between=TTL),
    metavar="SECONDS",
    help="how long that lease outlives this command  [default: the daemon's]",
)
@click.option("--required", is_flag=True, help="for init containers: wait for the daemon; without the model the exit code is the cause's, as always")
@click.option("--or-continue", is_flag=True, help="for init containers: exit 0 also without the model, and say in one line why it is not there")
@click.option(
    "--env-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="write lines for a shell: NVCACHE_MODEL, the directory; HF_HUB_CACHE and HF_HUB_OFFLINE if hub/ is here; none without the model",
)
@click.option("--json", "json_", is_flag=True, help="one JSON object a model, one a line")
@connected
def warm(  # noqa: PLR0913 - click hands over one argument an option
    refs: tuple[str, ...],
    *,
    revision: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    alias: str | None,
    require_digest: bool,
    pin: bool,
    timeout: float | None,
    wait_daemon: float | None,
    no_wait: bool,
    dry_run: bool,
    page_cache: bool,
    lease: bool,
    ttl: float | None,
    required: bool,
    or_continue: bool,
    env_file: Path | None,
    json_: bool,
) -> int:
    """Make models ready and print their directories.

    Fetches what is missing, proves every byte and waits until it is there. stdout has one path a model and nothing else, so that
    `DIR=$(nvcache warm org/name)` works; progress goes to stderr. The same REF twice is one fetch; Ctrl-C stops the waiting, not the fill.

    With --lease, --page-cache or --env-file the directory is one that can be read here: the flat one, else, where only the store's hub/ is mounted,
    the snapshot in it. --or-continue covers whatever keeps a model away, a REF that nvcache cannot read too; wrong options it does not.
    """
    if no_wait and (page_cache or lease or env_file):
        raise click.UsageError("--page-cache, --lease and --env-file are for what is ready, so they cannot go with --no-wait")
    if len(refs) > 1 and (alias or env_file):
        raise click.UsageError("--as and --env-file name one model, so give one REF")
    if required and or_continue:
        raise click.UsageError("--required and --or-continue contradict each other")
    if ttl is not None and not lease:
        raise click.UsageError("--ttl is the life of a lease, so it goes with --lease")
    if wait_daemon is None:
        wait_daemon = OPPORTUNITY_SECONDS if or_continue else DAEMON_SECONDS if lease or required else 0.0
    patterns: Json = {"include": list(include), "exclude": list(exclude)}
    wish = {"revision": revision, **patterns, "alias": alias, "pin": pin, "require_digest": require_digest}
    wish = {name: value for name, value in wish.items() if value}
    wishes = [{"ref": ref, **wish} for ref in refs]
    if dry_run:
        return _foresee(daemon(), wishes, timeout, json_=json_)
    try:
        if env_file is not None:
            write_variables(env_file, {})  # now: whatever happens, no old ones stay, and what cannot be written is told before anything is fetched
        asked = daemon()
        follower = Follower(asked, watcher(), wait=not no_wait, timeout=timeout, wait_daemon=wait_daemon)
        start = PodStart(asked, lease=lease, ttl=ttl, page_cache=page_cache, env_file=env_file)
        with _until_told():
            return _warm(asked, follower, start, wishes, json_=json_, or_continue=or_continue)
    except (Problem, NvcacheError) as error:
        if not or_continue:
            raise
        _go_on(problem_of(error))
        return Exit.OK


def _warm(asked: Daemon, follower: Follower, start: PodStart, wishes: Sequence[Json], *, json_: bool, or_continue: bool) -> Exit:
    """Make the models ready and do with them what was asked for; returns the exit code."""
    tasks = [Task(shown(body["ref"]), functools.partial(asked.post, "/v1/models", body)) for body in wishes]
    with start:
        try:
            follower.run(tasks)
        except KeyboardInterrupt:
            going = "; the fill goes on in the daemon, `nvcache jobs` shows it" if any(task.job for task in tasks) else ""
            output.say(f"stopped waiting{going}")
            raise
        for task in tasks:
            start.admit(task)
        exits = [_finish(task, start, json_=json_, or_continue=or_continue) for task in tasks]
        code = Exit.OK if or_continue else worst(exits)
        if code is Exit.OK:
            start.hand_over()
    return code


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: the first process of a container would not even notice it otherwise (pid_namespaces(7))."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _foresee(asked: Daemon, wishes: Sequence[Json], timeout: float | None, *, json_: bool) -> Exit:
    if timeout is not None:
        until = time.monotonic() + timeout
        asked.within(lambda: until - time.monotonic())
    return plan(asked, wishes, json_=json_)


def _go_on(problem: Json) -> None:
    """All of a problem in one line, of a pod that starts without the model."""
    output.say("; ".join([f"going on without the cache ({problem['code']}): {problem['detail']}", *filter(None, [problem.get("hint")])]))


def _finish(task: Task, start: PodStart, *, json_: bool, or_continue: bool) -> Exit:
    """Do what was asked for with one model and print its outcome; returns its exit code."""
    cached = start.read(task)
    start.name(task)
    if json_:
        output.as_json(result(task) | _of_page_cache(cached), line=True)
    if task.problem is not None:
        _go_on(task.problem) if or_continue else output.complain(task.problem["detail"], task.problem.get("hint"))
        return exit_for(task.problem)
    if task.model is None:
        if not json_:
            output.say(f"{task.label}: {task.state}, job {(task.job or {}).get('id')}")
        return Exit.OK
    for warning in task.model["warnings"]:
        output.say(f"warning: {task.label}: {warning}")
    if task.model["unproven"]:
        output.say(f"note: {task.label}: the source has no digest for {output.count(task.model['unproven'], 'file')} (first-use); see `nvcache show`")
    if task.model["note"]:
        output.say(f"note: {task.label}: {task.model['note']}")
    if not json_:
        click.echo(task.model["path"])
    return Exit.OK


def _of_page_cache(cached: Prefetched | None) -> Json:
    return {} if cached is None else {"page_cache": {**asdict(cached), "seconds": round(cached.seconds, 3)}}


def result(task: Task) -> Json:
    """What `--json` prints of one model; `seconds` is how long this command waited, `fetched_bytes` what crossed the network meanwhile."""
    found: Json = dict.fromkeys(RESULT)
    if task.problem is not None:
        known = {name: task.model[name] for name in RESULT} if task.model is not None else {}
        found |= known | {"ref": task.label, "state": "failed", "error": task.problem}
    elif task.model is not None:
        found |= {name: task.model[name] for name in RESULT}
    elif task.job is not None:
        found |= {"ref": task.label, "entry": task.job["entry"], "state": task.state, "job": task.job["id"]}
    return {**found, "fetched_bytes": task.fetched, "seconds": round(task.seconds, 3)}
