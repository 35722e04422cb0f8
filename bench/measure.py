"""Runs a command and measures it: wall time, core-seconds and peak memory over every process that worked for it. It knows no peer and no origin.

* **Core-seconds** are user + system time. Of the command itself they come from `wait4`, which includes every descendant it waited for; of a
  daemon that worked for it, from `/proc/<pid>/stat` before and after, own and reaped children's times added up (10 ms ticks).
* **Peak memory** is the sum of PSS over all those processes, sampled from `/proc/<pid>/smaps_rollup` every `INTERVAL` seconds: a page shared by
  two processes counts once, page cache that is not mapped not at all, and a peak between two samples is missed.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

INTERVAL = 0.1
TICK = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")


class MeasureError(Exception):
    """A measured command failed or took too long; the message has the end of what it said."""


@dataclass
class Process:
    """One process as last seen: its own core-seconds since the watch began, and its highest PSS in bytes."""

    pid: int
    command: str
    cpu: float = 0.0
    pss: int = 0


@dataclass
class Usage:
    """What one run cost. Seconds and bytes; `processes` tells where it went, the costliest first."""

    wall: float
    user: float
    system: float
    peak_pss: int
    output: str = field(default="", repr=False)
    processes: list[Process] = field(default_factory=list)

    @property
    def core_seconds(self) -> float:
        """User and system time together."""
        return self.user + self.system

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data, without the command's output."""
        return {
            "wall": round(self.wall, 4),
            "user": round(self.user, 3),
            "system": round(self.system, 3),
            "core_seconds": round(self.core_seconds, 3),
            "peak_pss": self.peak_pss,
            "processes": [asdict(process) for process in self.processes],
        }


def run(argv: Sequence[str], *, env: Mapping[str, str], log: Path, helpers: Iterable[int] = (), timeout: float) -> Usage:
    """Run `argv` to its end and measure it together with the trees of `helpers`, daemons that work for it and live on.

    Its output goes to the file `log`; standard output is also returned. Raises `MeasureError` when it exits other than 0 or after `timeout` seconds.
    """
    helpers = tuple(helpers)
    before = cpu_times(helpers)
    with log.open("wb") as errors, log.with_suffix(".out").open("w+b") as output, Watch(helpers) as watch:
        began = time.perf_counter()
        process = subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)
        watch.add(process.pid)
        guard = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        guard.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        guard.cancel()
        guard.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        after = cpu_times(helpers)
        output.seek(0)
        said = output.read().decode(errors="replace")
    if process.returncode:
        tail = (said + log.read_text(errors="replace"))[-2000:]
        raise MeasureError(f"cannot measure {argv[0]}: it ended with {process.returncode} after {wall:.1f} s and said: {tail}")
    user, system = usage.ru_utime + after[0] - before[0], usage.ru_stime + after[1] - before[1]
    return Usage(wall, user, system, watch.peak, said, watch.seen())


class Watch:
    """A thread that samples PSS and processor time of some process trees until it is left."""

    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = list(roots)
        self._processes: dict[int, Process] = {}
        self._start: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_over, name="watch")
        self.peak = 0

    def add(self, pid: int) -> None:
        """Watch one more tree."""
        self._roots.append(pid)

    def seen(self) -> list[Process]:
        """Every process that was seen, the costliest first."""
        return sorted(self._processes.values(), key=lambda process: -process.cpu)

    def __enter__(self) -> Watch:
        for pid in tree(self._roots):  # what it used before is not of this run
            self._start[pid] = sum(_own_times(pid))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample_until_over(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()  # before the sample: the last one is of the end
            self.peak = max(self.peak, sum(self._sample(pid) for pid in tree(self._roots)))
            self._over.wait(INTERVAL)

    def _sample(self, pid: int) -> int:
        """PSS of one process in bytes; 0 when it has just ended."""
        pss = pss_of(pid)
        if pss:
            process = self._processes.get(pid) or self._processes.setdefault(pid, Process(pid, _command(pid)))
            process.pss = max(process.pss, pss)
            process.cpu = round(max(process.cpu, sum(_own_times(pid)) - self._start.get(pid, 0.0)), 3)
        return pss


def tree(roots: Iterable[int]) -> list[int]:
    """The living processes among `roots` and all their descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _stat(int(name))):
            children.setdefault(int(stat[1]), []).append(int(name))
    found: list[int] = []
    todo = [pid for pid in roots if _stat(pid)]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def cpu_times(roots: Iterable[int]) -> tuple[float, float]:
    """User and system seconds of the living trees of `roots`, and of what those processes have reaped so far."""
    user = system = 0.0
    for pid in tree(roots):
        if stat := _stat(pid):
            user += (int(stat[11]) + int(stat[13])) / TICK
            system += (int(stat[12]) + int(stat[14])) / TICK
    return user, system


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, taken round by round (both ran within the same minute), then median, least and most."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def rotated(rows: Sequence[T], turn: int) -> list[T]:
    """The rows in another order each round, so that none always runs after the same neighbour."""
    turn %= len(rows)
    return [*rows[turn:], *rows[:turn]]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (index 0 is field 3 of proc(5)); None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _own_times(pid: int) -> list[float]:
    stat = _stat(pid)
    return [int(ticks) / TICK for ticks in stat[11:13]] if stat else [0.0]


def pss_of(pid: int) -> int:
    """PSS of one process in bytes; 0 when it ended, or is a zombie without memory."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            return next((int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _command(pid: int) -> str:
    """A process's command line, shortened to the programme and its first words."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return "?"
    return " ".join(os.path.basename(word) for word in words[:5]).strip()
