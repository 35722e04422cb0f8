"""Fills a cache from nginx on loopback, by nvcache and by its peers, in turn, several rounds. It checks results but judges no figure.

Each run: the target is emptied and the disk synced, the origin's files are read once so that they lie in the page cache, then the command is
timed from its start to its end. The daemon is started before, on a fresh store; its start is reported, not counted. For nvcache the end means
verified, durable and ready; for the others the bytes may still be in the page cache: how long a `sync` then takes is reported beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.daemon import Daemon, clean_environment, fresh
from bench.machine import describe
from bench.measure import MeasureError, Usage, cpu_times, ratios, rotated, run, spread
from bench.rows import OURS, REPO, ROWS, Row, Task, sha256_of, wanted
from nvcache.settings import parse_size
from tests.support.models import make_llama
from tests.support.nginx import NginxHub

RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent.parent / ".cache" / "bench"
SHARDS = 4
SLOWEST = 20e6  # bytes per second below which a run is given up
NEEDED = {"nginx": "nginx", "aria2c": "aria2c", "curl": "curl"}


def origin(work: Path, size: int, seed: int = 0) -> Path:
    """The repository to serve, made once for each size and seed and kept."""
    directory = work / f"origin-{size}-{seed}"
    done = directory.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(directory, ignore_errors=True)
        make_llama(directory, size, SHARDS, seed)
        done.touch()
    return directory


def fill(directory: Path, rows: Sequence[Row], rounds: int, work: Path, *, tls: bool) -> dict[str, Any]:
    """Measure `rows` against each other; the result as JSON data. Raises `MeasureError` when a row fails or leaves wrong files."""
    machine = describe(work)
    runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    with NginxHub({REPO: directory}, fresh(work / "nginx"), tls=tls) as hub:
        nginx = int((work / "nginx/nginx.pid").read_text())
        files = wanted(directory, hub)
        for turn in range(rounds):
            for row in rotated(rows, turn):
                task = Task(files, hub.commits[REPO], fresh(work / "target"), hub.ca_file)
                read_through(directory)
                runs[row.name].append(once(row, task, clean_environment(work, hub.url, hub.ca_file), work, nginx, prove=turn == 0))
                print(f"round {turn + 1}  {row.name:12} {runs[row.name][-1]['wall']:7.2f} s", file=sys.stderr, flush=True)
        shutil.rmtree(work / "target")
    return {
        "scheme": "TLS" if tls else "http",
        "bytes": sum(file.size for file in files),
        "files": len(files),
        "rounds": rounds,
        "machine": machine,
        "rows": {row.name: summary(row, runs[row.name]) for row in rows},
        "ratios": {name: ratios(walls(runs[OURS.name]), walls(each)) for name, each in runs.items() if OURS.name in runs and name != OURS.name},
    }


def once(row: Row, task: Task, env: dict[str, str], work: Path, nginx: int, *, prove: bool) -> dict[str, Any]:
    """One run of one row. `prove` hashes what it left behind; sizes are always checked."""
    env |= dict(row.environment)
    started = 0.0
    with ExitStack() as stack:
        helpers: tuple[int, ...] = ()
        if row is OURS:
            daemon = stack.enter_context(Daemon(task.target / "store", env, work / "daemon.log"))
            env, helpers, started = daemon.env, (daemon.pid,), daemon.started
        before = sum(cpu_times([nginx]))
        usage: Usage = run(row.command(task), env=env, log=work / "row.log", helpers=helpers, timeout=60 + task.size / SLOWEST)
        origin_seconds = sum(cpu_times([nginx])) - before
        began = time.perf_counter()
        os.sync()
        synced = time.perf_counter() - began
        check(row, task, row.found(task, usage.output), prove=prove)
    return usage.to_dict() | {"sync": round(synced, 3), "origin_core_seconds": round(origin_seconds, 2), "daemon_start": round(started, 3)}


def check(row: Row, task: Task, found: Path, *, prove: bool) -> None:
    """Every file of the repository is under `found`, with the right size, and, if `prove`, the right bytes. Raises `MeasureError`."""
    for file in task.files:
        path = found / file.path
        size = path.stat().st_size if path.exists() else None
        if size != file.size:
            raise MeasureError(f"cannot use the run of {row.name}: {file.path} has {size} bytes instead of {file.size}")
        if prove and sha256_of(path) != file.sha256:
            raise MeasureError(f"cannot use the run of {row.name}: {file.path} has other bytes than the origin's")


def read_through(directory: Path) -> None:
    """Read every file once, so that the origin serves all rows from the page cache."""
    buffer = bytearray(4 * 2**20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def walls(runs: Sequence[dict[str, Any]]) -> list[float]:
    """The wall times of some runs."""
    return [each["wall"] for each in runs]


def summary(row: Row, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of each figure over the rounds; `processes` as seen in the run of median wall time."""
    figures = ("wall", "core_seconds", "user", "system", "peak_pss", "sync", "origin_core_seconds", "daemon_start")
    middle = min(runs, key=lambda each: abs(each["wall"] - statistics.median(walls(runs))))
    return {"verifies": row.verifies, **{name: spread([each[name] for each in runs]) for name in figures}, "processes": middle["processes"][:8]}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    names = {row.name: row for row in ROWS}
    parser = argparse.ArgumentParser(prog="python -m bench.fill", description="Fill from nginx on loopback: nvcache and its peers.")
    parser.add_argument("--size", type=parse_size, default="4.5GB", help="bytes of weights, in four shards (4.5GB)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--http", action="store_true", help="only http")
    parser.add_argument("--tls", action="store_true", help="only TLS; neither flag: both")
    parser.add_argument("--rows", default=",".join(names), help="comma-separated: " + ", ".join(names))
    parser.add_argument("--work", type=Path, default=WORK, help="directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where fill-http.json and fill-tls.json go")
    args = parser.parse_args(argv)
    if missing := [name for name, tool in NEEDED.items() if shutil.which(tool) is None]:
        parser.exit(2, f"cannot measure: {', '.join(missing)} not installed\n")
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    directory = origin(args.work.resolve(), args.size)
    rows = [names[name.strip()] for name in args.rows.split(",")]
    for scheme in [name for name in ("http", "tls") if getattr(args, name)] or ["http", "tls"]:
        result = fill(directory, rows, args.rounds, args.work.resolve(), tls=scheme == "tls")
        (args.out / f"fill-{scheme}.json").write_text(json.dumps(result, indent=1) + "\n")
        from bench.report import print_fill

        print_fill(result)


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
