"""The stage of `bench.cold_start`: a model with nvcache, on the OS disk and at its source, the source's end, and kills. It measures nothing."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.daemon import Daemon, clean_environment, fresh
from bench.fill import SLOWEST
from bench.loaders import load
from bench.measure import MeasureError, run, tree
from bench.pod import Pod
from bench.rows import OURS
from bench.stages import hub

END_SECONDS = 15.0  # that a killed process is given


@dataclass(frozen=True)
class Scene:
    """What every row starts from: the model in `origin`, which a Hub may serve, in `store`, below `view`, and in `copy`, on the OS disk.

    `reference` names the model by its commit, as a pod must that is to start without its source: a branch would be asked of the source first.
    `source` is the URL under which the daemon knows the Hub, which has been stopped.
    """

    work: Path
    origin: Path
    copy: Path
    store: Path
    view: Path
    reference: str
    source: str
    checksum: str  # of the tensors in `origin`
    patience: float  # seconds that any step is given
    watched: bool = False  # whether memory is sampled

    def daemon(self) -> Daemon:
        """A daemon over the store, for a `with`."""
        return Daemon(self.store, clean_environment(self.work, self.source, None), self.work / "daemon.log")

    def pod(self, directory: Path | None = None) -> Pod:
        """A pod, for a `with`, that is given `directory`, or else asks the daemon for the model."""
        log = self.work / "pod.log"
        if directory:
            return Pod("safetensors", str(directory), clean_environment(self.work, None, None), log)
        return Pod("nvcache", self.reference, self.daemon().env, log)


@contextmanager
def staged(directory: Path, work: Path, disk: Path, os_disk: Path) -> Iterator[Scene]:
    """Copy `directory` to `os_disk`, warm a daemon on `disk` from a Hub that serves it, stop both. What lies on the disks is removed in the end."""
    place, copy = fresh(disk / "cold-start"), fresh(os_disk / "cold-start-copy")
    try:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        checksum = load("read", directory)[0].checksum
        with hub(directory, work, False) as stage:
            assert stage.hub is not None
            task = stage.task(place)
            patience = 60 + task.size / SLOWEST
            with Daemon(place / "store", clean_environment(work, stage.hub, None), work / "daemon.log") as daemon:
                filled = run(OURS.command(task), env=daemon.env, log=work / "row.log", timeout=patience)
        view = OURS.found(task, filled.output)
        yield Scene(work, directory, copy, daemon.store, view, f"{stage.reference}@{stage.commit}", stage.hub, checksum, patience)
    finally:
        shutil.rmtree(place)
        shutil.rmtree(copy)


def kill(*roots: int) -> None:
    """SIGKILL to `roots`; returns when they and all their descendants have ended. Raises `MeasureError` when one has not."""
    with ExitStack() as stack:
        handles = {}
        for pid in tree(roots):
            with suppress(ProcessLookupError):  # it has just ended
                handles[pid] = os.pidfd_open(pid)
                stack.callback(os.close, handles[pid])
        for pid in roots:
            os.kill(pid, signal.SIGKILL)
        for pid, handle in handles.items():
            if not select.select([handle], [], [], END_SECONDS)[0]:
                raise MeasureError(f"cannot go on: process {pid} has not ended {END_SECONDS:.0f} s after the kill")


def refused(url: str) -> None:
    """Make sure that nothing listens at `url`. Raises `MeasureError` when something does."""
    parts = urlsplit(url)
    with suppress(ConnectionRefusedError), socket.create_connection((parts.hostname, parts.port), timeout=5):
        raise MeasureError(f"cannot use the run: the source must be away, and {url} takes connections")
