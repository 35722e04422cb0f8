"""Shows running jobs on stderr: bars on a terminal, a line now and then elsewhere (`kubectl logs`). It follows no job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nvcache.cli import output
from nvcache.cli.follow import Task, Watcher

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY = 5.0  # seconds between lines for one job where nobody sees bars


def watcher() -> Watcher:
    """What suits stderr."""
    return Bars() if sys.stderr.isatty() else Lines()


class Lines:
    """A line for each job when its state changes, and every few seconds while it runs."""

    def __init__(self, write: Callable[[str], None] = output.say, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._shown: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, tasks: Sequence[Task]) -> None:
        """Write what is due."""
        now = self._clock()
        for index, task in enumerate(tasks):
            state, at = self._shown.get(index, ("", float("-inf")))
            if task.state != state or (now - at >= LINE_EVERY and not task.ended):
                self._shown[index] = (task.state, now)
                self._write(f"{task.label}: {_line(task)}")


class Amount:
    """A line every few seconds about bytes that get done: how many of how many, how fast, how long still."""

    def __init__(self, label: str, doing: str, write: Callable[[str], None] = output.say, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._doing, self._write, self._clock = label, doing, write, clock
        self._began = self._at = clock()

    def update(self, done: int, total: int) -> None:
        """Write what is due."""
        now = self._clock()
        if now - self._at >= LINE_EVERY:
            self._at = now
            rate = done / (now - self._began)
            going = output.going({"bytes_total": total, "bytes_done": done, "rate": rate, "eta_s": (total - done) / rate if rate else None})
            self._write(f"{self._label}: {self._doing} {output.size(done)} of {output.size(total)}, {going}")


class Bars:
    """One bar a job: bytes, rate, time left, state."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.fields[label]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[bytes]}", justify="right"),
            TextColumn("{task.fields[speed]}", justify="right"),
            TextColumn("{task.fields[state]}"),
            console=output.console(stderr=True),
            expand=True,
        )
        self._bars: dict[int, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def update(self, tasks: Sequence[Task]) -> None:
        """Redraw."""
        for index, task in enumerate(tasks):
            shown = _figures(task)
            if index not in self._bars:
                self._bars[index] = self._progress.add_task("", **shown)
            else:
                self._progress.update(self._bars[index], **shown)


def _progress_of(task: Task) -> dict[str, Any] | None:
    progress: dict[str, Any] | None = task.job["progress"] if task.job else None
    return progress if progress and progress["bytes_total"] else None


def _figures(task: Task) -> dict[str, Any]:
    progress = _progress_of(task)
    if task.ended and task.problem is None:
        total = progress["bytes_total"] if progress else 1
        done, bytes_, speed = total, output.size((task.model or {}).get("bytes") or total), output.duration(task.seconds)
    elif progress:
        total, done = progress["bytes_total"], progress["bytes_done"]
        bytes_ = f"{output.size(done)}/{output.size(total)}"
        left = f" {output.left(progress['eta_s'])}" if progress["eta_s"] is not None else ""
        speed = f"{output.rate(progress['rate'])}{left}" if progress["rate"] else ""
    else:
        total, done, bytes_, speed = None, 0, "", ""
    return {"total": total, "completed": done, "label": task.label, "bytes": bytes_, "speed": speed, "state": task.state}


def _line(task: Task) -> str:
    progress = _progress_of(task)
    if task.ended:
        if task.problem is not None:
            return task.state
        return f"{task.state}{' already' if task.hit else ''}, {output.size(task.fetched)} fetched in {output.duration(task.seconds)}"
    if task.away_since is not None:
        return f"{task.state}: {task.away_why}" if task.away_why else task.state
    if progress is None:
        return task.state
    files = f"{progress['files_done']}/{output.count(progress['files_total'], 'file')}"
    return f"{task.state} {output.size(progress['bytes_done'])} of {output.size(progress['bytes_total'])}, {files}, {output.going(progress)}"
