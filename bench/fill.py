"""Fills a cache from a server on loopback, by nvcache and by its peers, in turn, several rounds. It checks results but judges no figure.

The server is a Hub (nginx) or, with `--source azure`, Blob Storage (nginx, and Azurite); the peers are those people use for either.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import arguments
from bench.blobs import BLOB_ROWS
from bench.daemon import Daemon, clean_environment, fresh
from bench.machine import describe
from bench.measure import MeasureError, Usage, cpu_times, ratios, rotated, run, spread
from bench.rows import HUB_ROWS, OURS, Row, Task, sha256_of
from bench.stages import Staging, azurite, blobs, hub
from nvcache.settings import parse_size
from tests.support.azcopy import AZCOPY
from tests.support.models import make_llama

RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent.parent / ".cache" / "bench"
SHARDS = 4
SLOWEST = 20e6  # bytes per second below which a run is given up


@dataclass(frozen=True)
class Case:
    """One origin over http or TLS; `stem` names the file of the result."""

    stem: str
    origin: str
    tls: bool
    staging: Staging


@dataclass(frozen=True)
class Source:
    """What can be measured of a source: the origins, the ways to fetch from them, and the programmes that takes."""

    cases: tuple[Case, ...]
    rows: tuple[Row, ...]
    needed: tuple[str, ...]


SOURCES = {
    "hub": Source((Case("fill-http", "nginx", False, hub), Case("fill-tls", "nginx", True, hub)), HUB_ROWS, ("nginx", "aria2c", "curl")),
    "azure": Source(
        (
            Case("fill-azure-nginx-http", "nginx", False, blobs),
            Case("fill-azure-nginx-tls", "nginx", True, blobs),
            Case("fill-azure-azurite-http", "azurite", False, azurite),
        ),
        BLOB_ROWS,
        ("nginx", str(AZCOPY)),
    ),
}


def origin(work: Path, size: int, seed: int = 0) -> Path:
    """The model to serve, made once for each size and seed and kept."""
    directory = work / f"origin-{size}-{seed}"
    done = directory.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(directory, ignore_errors=True)
        make_llama(directory, size, SHARDS, seed)
        done.touch()
    return directory


def fill(case: Case, directory: Path, rows: Sequence[Row], rounds: int, work: Path) -> dict[str, Any]:
    """Measure `rows` against each other; the result as JSON data. Raises `MeasureError` when a row fails or leaves wrong files."""
    machine = describe(work)
    runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    with case.staging(directory, work, case.tls) as stage:
        for turn in range(rounds):
            for row in rotated(rows, turn):
                task = stage.task(fresh(work / "target"))
                read_through(stage.kept)
                runs[row.name].append(once(row, task, clean_environment(work, stage.hub, stage.ca_file), work, stage.pid, prove=turn == 0))
                print(f"round {turn + 1}  {row.name:17} {runs[row.name][-1]['wall']:7.2f} s", file=sys.stderr, flush=True)
        shutil.rmtree(work / "target")
    return {
        "origin": stage.name,
        "scheme": "TLS" if case.tls else "http",
        "bytes": sum(file.size for file in stage.files),
        "files": len(stage.files),
        "rounds": rounds,
        "machine": machine,
        "rows": {row.name: summary(row, runs[row.name]) for row in rows},
        "ratios": against(runs, "wall"),
        "ratios_to_last_write": against(runs, "last_write"),
    }


def against(runs: dict[str, list[dict[str, Any]]], figure: str) -> dict[str, dict[str, float]]:
    """nvcache's wall time over that `figure` of each other row."""
    if OURS.name not in runs:
        return {}
    ours = [each["wall"] for each in runs[OURS.name]]
    return {name: ratios(ours, [each[figure] for each in found]) for name, found in runs.items() if name != OURS.name}


def once(row: Row, task: Task, env: dict[str, str], work: Path, server: int, *, prove: bool) -> dict[str, Any]:
    """One run of one row; `server` is the origin's process. `prove` hashes what it left behind; sizes are always checked."""
    env |= dict(row.environment)
    started = 0.0
    with ExitStack() as stack:
        helpers: tuple[int, ...] = ()
        if row.daemon:
            daemon = stack.enter_context(Daemon(task.target / "store", env, work / "daemon.log"))
            env, helpers, started = daemon.env, (daemon.pid,), daemon.started
        before, began_at = sum(cpu_times([server])), time.time()
        usage: Usage = run(row.command(task), env=env, log=work / "row.log", helpers=helpers, timeout=60 + task.size / SLOWEST)
        origin_seconds = sum(cpu_times([server])) - before
        began = time.perf_counter()
        os.sync()
        synced = time.perf_counter() - began
        last_write = check(row, task, row.found(task, usage.output), prove=prove) - began_at
    return usage.to_dict() | {
        "last_write": round(last_write, 3),
        "sync": round(synced, 3),
        "origin_core_seconds": round(origin_seconds, 2),
        "daemon_start": round(started, 3),
    }


def check(row: Row, task: Task, found: Path, *, prove: bool) -> float:
    """Every file of the model is under `found`, with the right size, and, if `prove`, the right bytes: when the last was written (unix seconds).

    Raises `MeasureError`.
    """
    for file in task.files:
        path = found / file.path
        size = path.stat().st_size if path.exists() else None
        if size != file.size:
            raise MeasureError(f"cannot use the run of {row.name}: {file.path} has {size} bytes instead of {file.size}")
        if prove and sha256_of(path) != file.sha256:
            raise MeasureError(f"cannot use the run of {row.name}: {file.path} has other bytes than the origin's")
    return max((found / file.path).stat().st_mtime for file in task.files)


def read_through(directory: Path) -> None:
    """Read every file once, so that the origin serves all rows from the page cache."""
    buffer = bytearray(4 * 2**20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def summary(row: Row, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of each figure over the rounds; `processes` as seen in the run of median wall time."""
    figures = ("wall", "last_write", "core_seconds", "user", "system", "peak_pss", "sync", "origin_core_seconds", "daemon_start")
    median = statistics.median(each["wall"] for each in runs)
    middle = min(runs, key=lambda each: abs(each["wall"] - median))
    return {"verifies": row.verifies, **{name: spread([each[name] for each in runs]) for name in figures}, "processes": middle["processes"][:8]}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.fill", description="Fill from a server on loopback: nvcache and its peers.")
    parser.add_argument("--source", choices=SOURCES, default="hub", help="what to fill from: a Hub (default) or Azure Blob Storage")
    parser.add_argument("--origin", choices=("nginx", "azurite"), help="only this server; not given: all that the source has")
    parser.add_argument("--size", type=parse_size, default="4.5GB", help="bytes of weights, in four shards (4.5GB)")
    parser.add_argument("--rounds", type=arguments.rounds, default=5)
    parser.add_argument("--http", action="store_true", help="only http")
    parser.add_argument("--tls", action="store_true", help="only TLS; neither flag: both, Azurite by http only")
    parser.add_argument("--rows", help="comma-separated; not given: all. " + "; ".join(f"{name}: {', '.join(names_of(name))}" for name in SOURCES))
    parser.add_argument("--work", type=Path, default=WORK, help="directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where fill-….json go")
    args = parser.parse_args(argv)
    source, names = SOURCES[args.source], names_of(args.source)
    if missing := [tool for tool in source.needed if shutil.which(tool) is None]:
        parser.exit(2, f"cannot measure: {', '.join(missing)} not installed\n")
    chosen = [name.strip() for name in args.rows.split(",")] if args.rows else list(names)
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no such row: {', '.join(unknown)}")
    tls = {name == "tls" for name in ("http", "tls") if getattr(args, name)} or {False, True}
    cases = [case for case in source.cases if case.tls in tls and args.origin in (None, case.origin)]
    if not cases:
        parser.error("this origin is not measured in this way")
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    directory = origin(args.work.resolve(), args.size)
    for case in cases:
        result = fill(case, directory, [names[name] for name in chosen], args.rounds, args.work.resolve())
        (args.out / f"{case.stem}.json").write_text(json.dumps(result, indent=1) + "\n")
        from bench.report_fill import show

        show(result)


def names_of(source: str) -> dict[str, Row]:
    """The rows of a source by name."""
    return {row.name: row for row in SOURCES[source].rows}


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
