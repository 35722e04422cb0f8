"""Follows jobs of the daemon until they end, in time, through daemon restarts. It shows nothing; a `Watcher` does.

A daemon that restarts resumes its fills under new job ids, so a task whose job vanished asks again: asking is idempotent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nvcache.cli.daemon import Daemon, Json, problem_from, problem_of
from nvcache.client import Problem
from nvcache.errors import Code

QUICK = 0.1  # seconds between looks while something moves
SLOW = 2.0  # and at most, while nothing does
RESTART_PATIENCE = 60.0  # seconds a daemon that answered before may be away when no timeout bounds the wait
AWAY = frozenset({Code.DAEMON_UNREACHABLE, Code.STARTING, Code.STOPPING, Code.NO_STRIPE, Code.TIMEOUT})
ENDED = frozenset({"done", "failed", "cancelled"})
JOB = ("id", "kind", "entry", "state", "progress", "error")  # what is needed of a job, and of a model
MODEL = ("ref", "entry", "revision", "state", "path", "hub_cache", "hub_id", "files", "bytes", "warnings", "unproven", "note", "error")


@dataclass
class Task:
    """One piece of long work. `ask` starts or joins it and answers a model (nothing to do) or `{"job": …}`.

    It has ended when `model` (a model object, or `{}` where only the job matters) or `problem` is set.
    """

    label: str
    ask: Callable[[], Json]
    job: Json | None = None
    model: Json | None = None
    problem: Json | None = None
    hit: bool = False  # it was ready when first asked
    seconds: float = 0.0
    away_since: float | None = None
    away_why: str = ""
    fetched_before: int = 0  # bytes, by jobs that went with a daemon's restart

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.model is not None or self.problem is not None

    @property
    def fetched(self) -> int:
        """Bytes that crossed the network for it, over all jobs it went through."""
        return self.fetched_before + (int(self.job["progress"]["bytes_fetched"]) if self.job else 0)

    def forget_job(self) -> None:
        """The job is gone with the daemon that ran it; the next look asks again."""
        self.fetched_before, self.job = self.fetched, None

    @property
    def state(self) -> str:
        """One word for people: the model's state, the job's, or where the task is stuck."""
        if self.problem is not None:
            return "not finished" if self.problem["code"] == Code.TIMEOUT else "failed"
        if self.model is not None:
            return str(self.model.get("state", "done"))
        if self.away_since is not None:
            return "waiting for the daemon"
        return str(self.job["state"]) if self.job else "asking"


class Watcher(Protocol):
    """Shows tasks to somebody; used as a context manager."""

    def __enter__(self) -> Watcher: ...
    def __exit__(self, *raised: object) -> None: ...
    def update(self, tasks: Sequence[Task]) -> None:
        """Something may have changed."""


class Follower:
    """Drives tasks to their end, or with `wait` off until each has a job.

    `timeout` bounds all of it, in seconds; `wait_daemon` is how long to wait for a daemon that never answered yet.
    """

    def __init__(
        self,
        daemon: Daemon,
        watcher: Watcher,
        *,
        wait: bool = True,
        timeout: float | None = None,
        wait_daemon: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._daemon = daemon
        self._watcher = watcher
        self._wait = wait
        self._timeout = timeout
        self._patience = wait_daemon
        self._later = max(wait_daemon, RESTART_PATIENCE) if timeout is None else timeout  # once it has answered
        self._pause = pause
        self._clock = clock
        self._began = clock()
        daemon.within(self._left)

    def run(self, tasks: Sequence[Task]) -> None:
        """Return when every task has ended; those that have not when the time is over end with `timeout`."""
        interval = QUICK
        with self._watcher:
            while True:
                moved = [self._step(task) for task in tasks if not task.ended]
                left = self._left()
                if left <= 0:
                    self._give_up(tasks)
                self._watcher.update(tasks)
                if all(task.ended or (task.job and not self._wait) for task in tasks):
                    return
                interval = QUICK if any(moved) else min(interval * 1.5, SLOW)
                self._pause(min(interval, left))

    def _left(self) -> float:
        return float("inf") if self._timeout is None else self._began + self._timeout - self._clock()

    def _step(self, task: Task) -> bool:
        """Look once. Returns whether anything changed."""
        before = task.job
        try:
            if task.job is None:
                self._answered(task, task.ask())
            else:
                task.job = self._daemon.whole(self._daemon.get(f"/v1/jobs/{task.job['id']}"), *JOB)
            task.away_since = None
            self._patience = self._later
            if task.job is not None:
                self._look(task, task.job)
        except Problem as problem:
            self._stumbled(task, problem)
        if task.ended:
            task.seconds = self._clock() - self._began
        return task.job != before or task.ended

    def _answered(self, task: Task, answer: Json) -> None:
        if isinstance(answer.get("job"), dict):
            task.job = self._daemon.whole(answer["job"], *JOB)
        else:
            task.model, task.hit = self._daemon.whole(answer, *MODEL), True

    def _look(self, task: Task, job: Json) -> None:
        if job["state"] not in ENDED:
            return
        if job["state"] == "done":
            task.model = self._daemon.whole(self._daemon.get(f"/v1/models/{job['entry']}"), *MODEL) if job["kind"] == "fill" else {}
        elif job["error"] and job["error"]["code"] in (Code.STOPPING, Code.NO_STRIPE):
            task.forget_job()
            task.away_since = self._clock()
        else:
            task.problem = job["error"] or problem_from(Code.CANCELLED, f"cannot finish {task.label}: the job was cancelled")

    def _stumbled(self, task: Task, problem: Problem) -> None:
        if problem.code == Code.UNKNOWN_JOB and task.job is not None:
            task.forget_job()
            return
        if problem.code not in AWAY:
            task.problem = problem_of(problem)
            return
        if problem.code == Code.NO_STRIPE:  # somebody answers: its disks are being looked at, or made anew
            self._patience = self._later
        task.away_why = problem.detail
        if task.away_since is None:
            task.away_since = self._clock()
        if self._clock() - task.away_since >= self._patience:
            task.problem = problem_of(problem)

    def _give_up(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if not task.ended:
                task.seconds = self._clock() - self._began
                stuck = task.state if task.away_since is None or not task.away_why else f"{task.state}: {task.away_why}"
                task.problem = problem_from(Code.TIMEOUT, f"cannot wait longer for {task.label}: {self._timeout:g} s are over and it is {stuck}")
