"""Measures how long a node is without its model after an outage: by nvcache with the source away, by downloading anew, from files on the OS disk.

For nvcache a daemon has the model and a pod has it loaded. nginx, the source, is stopped; daemon and pod are killed (SIGKILL), the page cache of the
model's files is dropped and looked at page by page. Then the clock starts, and a daemon and a pod with it, at the same moment, as on a node that
comes back. It stops when the pod has every tensor, has touched every byte and has the checksum. No figure is judged; a wrong checksum, or a source
that answers where it must not, ends the bench. Memory is sampled in a round of its own, because sampling costs the loader time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import arguments, cold
from bench.daemon import Daemon, clean_environment, fresh
from bench.fill import RESULTS, WORK, origin, read_through
from bench.machine import describe
from bench.measure import MeasureError, Watch, cpu_times, ratios, rotated, run, spread
from bench.outage import Scene, kill, refused, staged
from bench.pod import Pod
from bench.report_cold_start import table
from bench.rows import HF, OURS
from bench.stages import hub
from nvcache.settings import parse_size

PARTS = ("daemon up", "model there", "import", "load")  # each begins where the one before ends


@dataclass
class Run:
    """One run of one row: seconds of each of `PARTS`, the checksum of what was loaded, and what it took; `peak_pss` only if the scene is watched."""

    parts: dict[str, float]
    checksum: str
    core_seconds: float
    peak_pss: int

    @property
    def total(self) -> float:
        """Seconds from the clock's start to the last tensor."""
        return sum(self.parts.values())


def outage(scene: Scene) -> Run:
    """Daemon and pod were killed and nothing of the model is in memory."""
    with scene.daemon() as daemon, scene.pod() as pod:
        pod.loaded(scene.patience)
        kill(daemon.pid, pod.pid)
    cold.drop(scene.view)
    return timed(scene, scene.pod(), starting=scene.daemon())


def restart(scene: Scene) -> Run:
    """Only the pod was killed: the daemon runs on and the page cache has the model."""
    with scene.daemon() as daemon:
        with scene.pod() as pod:
            pod.loaded(scene.patience)
            kill(pod.pid)
        cold.warm(scene.view)
        return timed(scene, scene.pod(), running=daemon)


def download(scene: Scene) -> Run:
    """A new node: `hf download` into an empty cache, then the stock loader, on what the download has just put into the page cache."""
    with hub(scene.origin, scene.work, False) as stage:
        task = stage.task(fresh(scene.work / "target"))
        read_through(stage.kept)
        env = clean_environment(scene.work, stage.hub, None) | dict(HF.environment)
        fetched = run(HF.command(task), env=env, log=scene.work / "row.log", timeout=scene.patience)
        found = timed(scene, scene.pod(HF.found(task, fetched.output)))
    shutil.rmtree(task.target)
    found.parts["model there"] += fetched.wall
    found.core_seconds += fetched.core_seconds
    found.peak_pss = max(found.peak_pss, fetched.peak_pss)
    return found


def from_copy(scene: Scene) -> Run:
    """The files lie on the OS disk and nothing of them is in memory; the stock loader."""
    cold.drop(scene.copy)
    return timed(scene, scene.pod(scene.copy))


@dataclass(frozen=True)
class Row:
    """One way to have the model again; `source` says whether the Hub is there meanwhile."""

    name: str
    source: str
    measure: Callable[[Scene], Run]


AWAY = "away"
ROWS = (
    Row("nvcache", AWAY, outage),
    Row("nvcache, only the pod", AWAY, restart),
    Row("hf download + load", "there", download),
    Row("load from the OS disk", AWAY, from_copy),
)


def timed(scene: Scene, pod: Pod, *, running: Daemon | None = None, starting: Daemon | None = None) -> Run:
    """Start the clock, `pod` and `starting` at once, and wait until the pod holds the model. Memory and time of the daemon count, either one's."""
    with ExitStack() as stack:
        at_work = [running.pid] if running else []
        used = -sum(cpu_times(at_work))
        began = answers = time.monotonic()
        at_work.append(stack.enter_context(pod).pid)
        if starting:
            at_work.append(stack.enter_context(starting).pid)
            answers = time.monotonic()
        with Watch(at_work) if scene.watched else nullcontext() as watch:
            loaded = pod.loaded(scene.patience)
        used += sum(cpu_times(at_work))
    marks = (began, answers, loaded.knew, loaded.imported, loaded.done)
    parts = {part: after - before for part, (before, after) in zip(PARTS, pairwise(marks), strict=True)}
    return Run(parts, loaded.checksum, used, watch.peak if watch else 0)


def once(row: Row, scene: Scene) -> Run:
    """One run. Raises `MeasureError` when it failed, loaded something else than the model, or met a source that should be away."""
    if row.source == AWAY:
        refused(scene.source)
    found = row.measure(scene)
    if row.source == AWAY:
        refused(scene.source)
    if found.checksum != scene.checksum:
        raise MeasureError(f"cannot use the run of {row.name}: its tensors have checksum {found.checksum}, the model's have {scene.checksum}")
    return found


def measure(scene: Scene, rounds: int) -> dict[str, Any]:
    """Every row in turn, and once more for memory; the result as JSON data. Raises `MeasureError`."""
    machine = describe(scene.store)
    runs: dict[str, list[Run]] = {row.name: [] for row in ROWS}
    for turn in range(rounds):
        for row in rotated(ROWS, turn):
            runs[row.name].append(once(row, scene))
            print(f"round {turn + 1}  {row.name:22} {runs[row.name][-1].total:7.2f} s", file=sys.stderr, flush=True)
    peaks = {row.name: once(row, replace(scene, watched=True)).peak_pss for row in ROWS}
    totals = {name: [each.total for each in found] for name, found in runs.items()}
    files = [path for path in scene.origin.rglob("*") if path.is_file()]
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "checksum": scene.checksum,
        "rounds": rounds,
        "machine": machine,
        "os_disk": describe(scene.copy),
        "same_disk": scene.copy.stat().st_dev == scene.store.stat().st_dev,
        "rows": {row.name: {"source": row.source, **summary(runs[row.name]), "peak_pss": peaks[row.name]} for row in ROWS},
        "ratios": {row.name: ratios(totals[OURS.name], totals[row.name]) for row in ROWS[1:]},
    }


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Median, least and most of each figure over the rounds, and the parts of the run of median total, which add up to it."""
    return {
        "total": spread([each.total for each in runs]),
        "core_seconds": spread([each.core_seconds for each in runs]),
        "parts": {part: spread([each.parts[part] for each in runs]) for part in PARTS},
        "median_run": sorted(runs, key=lambda each: each.total)[(len(runs) - 1) // 2].parts,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold_start", description="How long a node is without its model, by nvcache and by others.")
    parser.add_argument("--size", type=parse_size, default="4GB", help="bytes of weights, in four shards (4GB)")
    parser.add_argument("--rounds", type=arguments.rounds, default=3)
    parser.add_argument("--work", type=Path, default=WORK, help="where the origin and the download are (.cache/bench)")
    parser.add_argument("--store", type=Path, help="directory on the disk, or the stripe, that nvcache's store is to be on (--work)")
    parser.add_argument("--os-disk", type=Path, help="directory on the disk that the files are loaded from without nvcache (--work)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where cold-start.json goes")
    args = parser.parse_args(argv)
    if shutil.which("nginx") is None:
        parser.exit(2, "cannot measure: nginx not installed\n")
    work, out = args.work.resolve(), args.out
    for directory in (work, out):
        directory.mkdir(parents=True, exist_ok=True)
    with staged(origin(work, args.size), work, (args.store or work).resolve(), (args.os_disk or work).resolve()) as scene:
        result = measure(scene, args.rounds)
    (out / "cold-start.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
