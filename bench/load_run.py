"""Runs one row of `bench.load` once: the page cache put in order, loaders in processes of their own, fio. It compares checksums, but no figures.

A row runs three times: cold, when the page cache holds nothing of the model; by a second process, while the first still holds its tensors; warm, when
the page cache holds all of it. The row `fio` is the limit: it reads the same files once around the page cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.cold import drop, warm
from bench.loaders import Load, files_of
from bench.measure import MeasureError, Watch, run
from bench.report_load import CASES, LIMIT

CHECKOUT = Path(__file__).parent.parent
FIO = "--name=limit --rw=read --direct=1 --ioengine=libaio --iodepth=8 --readonly --file_service_type=sequential --output-format=json"
BLOCK = 4 * 2**20
Figures = dict[str, dict[str, float]]  # of one run: case, then seconds and core_seconds


@dataclass(frozen=True)
class Scene:
    """What all runs share: a directory for logs, the environment of the loaders, and how long one may take, in seconds."""

    work: Path
    env: dict[str, str]
    timeout: float


class Loading:
    """A process that loads `model` and then holds its tensors; a context manager, which ends it."""

    def __init__(self, row: str, model: Path, scene: Scene) -> None:
        self._what = f"{model} by {row}"
        self._log = scene.work / "loader.log"
        argv = [sys.executable, "-m", "bench.loaders", row, str(model), "--hold"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(argv, cwd=CHECKOUT, env=scene.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._guard = threading.Timer(scene.timeout, self._process.kill)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def loaded(self) -> Load:
        """Wait until it holds every tensor. Raises `MeasureError`."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return Load(**json.loads(line))
        raise MeasureError(
            f"cannot load {self._what}: it ended with {self._process.wait()} and said: {self._log.read_text(errors='replace')[-2000:]}"
        )

    def __enter__(self) -> Self:
        self._guard.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:  # closes its standard input, which ends it, and waits; not for ever, because of the guard
            pass
        self._guard.cancel()
        self._guard.join()


class Agreement:
    """Whether every load gave the same tensors."""

    def __init__(self) -> None:
        self._first: tuple[str, str] | None = None

    def check(self, load: Load, who: str) -> None:
        """Raises `MeasureError` when this checksum is not that of the loads before."""
        self._first = self._first or (load.checksum, who)
        checksum, other = self._first
        if load.checksum != checksum:
            raise MeasureError(f"cannot use this run: the tensors of {who} have checksum {load.checksum}, those of {other} have {checksum}")


def once(row: str, label: str, model: Path, scene: Scene, agreement: Agreement) -> Figures:
    """One run of one row on one path: seconds and core-seconds of each case. Raises `MeasureError`."""
    drop(model)
    if row == LIMIT:
        return {CASES[0]: fio(model, scene)}
    with Loading(row, model, scene) as first:
        loads = [first.loaded()]
        with Loading(row, model, scene) as second:
            loads.append(second.loaded())
    warm(model)
    with Loading(row, model, scene) as third:
        loads.append(third.loaded())
    for case, load in zip(CASES, loads, strict=True):
        agreement.check(load, f"{row} from {label}, {case}")
    return {case: {"seconds": load.seconds, "core_seconds": load.core_seconds} for case, load in zip(CASES, loads, strict=True)}


def fio(model: Path, scene: Scene) -> dict[str, float]:
    """The limit: seconds and core-seconds of reading the model's files around the page cache, keeping nothing. Raises `MeasureError`."""
    sizes = {str(path).replace(":", "\\:"): path.stat().st_size for path in files_of(model)}
    block = min(BLOCK, min(sizes.values()) // 4096 * 4096)  # fio reads no file that is shorter than a block
    argv = ["fio", *FIO.split(), f"--bs={block}", f"--filename={':'.join(sizes)}"]
    usage = run(argv, env=scene.env, log=scene.work / "fio.log", timeout=scene.timeout)
    job = json.loads(usage.output[usage.output.index("{") :])["jobs"][0]
    seconds = sum(sizes.values()) / job["read"]["bw_bytes"]  # the last part of a block of each file is counted, though not read
    return {"seconds": seconds, "core_seconds": usage.core_seconds}


def memory(row: str, model: Path, scene: Scene) -> int:
    """The most that a process that holds the tensors and a second one that loads them took together: PSS in bytes."""
    with Loading(row, model, scene) as first:
        first.loaded()
        with Loading(row, model, scene) as second, Watch((first.pid, second.pid)) as watch:
            second.loaded()
    return watch.peak
