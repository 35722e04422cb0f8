"""Loads a model from one disk or several, by nvcache and by its peers, in turn, several rounds. It judges no figure; what it cannot trust ends it.

Each round takes the paths and the rows in another order; what one run is, `bench.load_run` says. Memory is sampled afterwards, in runs of its own,
because sampling a process that maps a whole model takes processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import arguments
from bench.daemon import clean_environment, fresh
from bench.fill import RESULTS, WORK, origin
from bench.load_run import CHECKOUT, Agreement, Figures, Scene, memory, once
from bench.loaders import ROWS, files_of
from bench.machine import describe
from bench.measure import MeasureError, ratios, rotated, spread
from bench.report_load import CASES, LIMIT, OURS, table
from nvcache.settings import parse_size

NAMES = (*ROWS, LIMIT)
COPY = "nvcache-bench-load"  # the model's directory below each --path
SLOWEST = 5e6  # bytes per second below which a load is given up


def measure(models: dict[str, Path], rows: Sequence[str], rounds: int, work: Path) -> dict[str, Any]:
    """Measure `rows` on each of `models`, by the path's label; the result as JSON data. Raises `MeasureError`."""
    machine = describe(work)
    files = files_of(next(iter(models.values())))
    size = sum(path.stat().st_size for path in files)
    scene = Scene(work, clean_environment(work, None, None), 60 + 3 * size / SLOWEST)
    (work / "loader.log").unlink(missing_ok=True)
    agreement = Agreement()
    runs: dict[str, dict[str, list[Figures]]] = {label: {row: [] for row in rows} for label in models}
    for turn in range(rounds):
        for label in rotated(list(models), turn):
            for row in rotated(rows, turn):
                runs[label][row].append(once(row, label, models[label], scene, agreement))
                tell(f"round {turn + 1}  {label}  {row:15}", runs[label][row][-1])
    last = list(models.values())[-1]
    return {
        "bytes": size,
        "files": len(files),
        "rounds": rounds,
        "machine": machine,
        "paths": {label: {"machine": describe(model), **summary(runs[label])} for label, model in models.items()},
        "peak_pss": {row: memory(row, last, scene) for row in rows if row != LIMIT},
    }


def tell(what: str, figures: Figures) -> None:
    """Say how it goes."""
    print(what, *(f"{case} {each['seconds']:.2f} s " for case, each in figures.items()), file=sys.stderr, flush=True)


def summary(runs: dict[str, list[Figures]]) -> dict[str, Any]:
    """Of one path: median, least and most of each row's figures, nvcache's seconds over those of the others, and its cold rate over fio's."""
    seconds = {row: {case: [run[case]["seconds"] for run in found] for case in found[0]} for row, found in runs.items()}
    result: dict[str, Any] = {
        "rows": {
            row: {case: {figure: spread([run[case][figure] for run in found]) for figure in found[0][case]} for case in found[0]}
            for row, found in runs.items()
        }
    }
    if ours := seconds.pop(OURS, None):
        if limit := seconds.pop(LIMIT, None):
            result["of_limit"] = ratios(limit[CASES[0]], ours[CASES[0]])
        result["ratios"] = {row: {case: ratios(ours[case], theirs[case]) for case in CASES} for row, theirs in seconds.items()}
    return result


def place_of(model: Path) -> str:
    """What to call the place of a model that is loaded where it is."""
    return str(model.parent.relative_to(CHECKOUT) if model.is_relative_to(CHECKOUT) else model.parent)


@contextmanager
def copies(model: Path, paths: Sequence[Path]) -> Iterator[dict[str, Path]]:
    """The model copied into each of `paths` while the context lasts, by the path as it was given."""
    targets = {str(path): path.resolve() / COPY for path in paths}
    try:
        for target in targets.values():
            shutil.copytree(model, fresh(target), dirs_exist_ok=True)
        yield targets
    finally:
        for target in targets.values():
            shutil.rmtree(target, ignore_errors=True)


def available(rows: Sequence[str]) -> list[str]:
    """Those of `rows` that can run here; of the others it is said what to install."""
    found = []
    for row in rows:
        missing = [package for name, package in ROWS[row].packages.items() if not importlib.util.find_spec(name)] if row != LIMIT else []
        if row == LIMIT and shutil.which("fio") is None:
            print(f"{row} is left out: apt-get install fio", file=sys.stderr)
        elif missing:
            print(f"{row} is left out: pip install {' '.join(missing)}", file=sys.stderr)
        else:
            found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description="Load a model from one disk or several: nvcache and its peers.")
    parser.add_argument("--path", type=Path, action="append", help="directory on a disk to load from; once for each disk (where the model is)")
    parser.add_argument("--model", type=arguments.model, help="a model's directory; not given: a Llama shape in bf16, made")
    parser.add_argument("--size", type=parse_size, default="4.5GB", help="bytes of weights to make, in four shards (4.5GB)")
    parser.add_argument("--rounds", type=arguments.rounds, default=5)
    parser.add_argument("--rows", help=f"comma-separated; not given: all ({', '.join(NAMES)})")
    parser.add_argument("--work", type=Path, default=WORK, help="where the model is made and logs are (.cache/bench)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where load.json goes")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    args = parser.parse_args(argv)
    chosen = [name.strip() for name in args.rows.split(",")] if args.rows else list(NAMES)
    if unknown := [name for name in chosen if name not in NAMES]:
        parser.error(f"no such row: {', '.join(unknown)}")
    if strange := [path for path in args.path or () if not path.is_dir()]:
        parser.error(f"no such directory: {', '.join(map(str, strange))}")
    if not (rows := available(chosen)):
        parser.exit(2, "cannot measure: no row is left\n")
    for directory in (args.work, args.out):
        directory.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    model = args.model.resolve() if args.model else origin(work, args.size)
    if args.path:
        with copies(model, args.path) as models:
            result = measure(models, rows, args.rounds, work)
    else:
        result = measure({place_of(model): model}, rows, args.rounds, work)
    (args.out / "load.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        table(result).show()


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
