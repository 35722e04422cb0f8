"""A pod as `bench.cold_start` starts one: it learns where its model is, imports what loads it, loads it and holds it. It measures nothing.

``python -m bench.pod nvcache REF`` asks the daemon for the model and holds it by a lease; ``python -m bench.pod safetensors DIR`` is given it. Either
says where the model is, then loads it as ``bench.loaders`` does.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import loaders
from bench.measure import MeasureError
from nvcache import client

DAEMON_SECONDS = 30.0  # a daemon that starts along with the pod is waited for


@dataclass(frozen=True)
class Loaded:
    """What a pod did, and when (`time.monotonic`): it knew where its model is, had imported its loader, had every tensor and their checksum."""

    knew: float
    imported: float
    done: float
    checksum: str


class Pod:
    """The process; a context manager that ends it by SIGKILL. `env` is its whole environment; what it complains of goes to the file `log`."""

    def __init__(self, loader: str, what: str, env: Mapping[str, str], log: Path) -> None:
        self._argv = [sys.executable, "-m", "bench.pod", loader, what]
        self._env = dict(env)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    def loaded(self, seconds: float) -> Loaded:
        """Wait until it holds every tensor. Raises `MeasureError` when it ended or said nothing for `seconds`."""
        knew, _ = self._said(seconds)
        done, report = self._said(seconds)
        return Loaded(knew, done - report["seconds"], done, report["checksum"])

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            # unbuffered: `_said` waits for the pipe, so no line may have been taken out of it together with the one before
            self._process = subprocess.Popen(self._argv, env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process = self._running()
        self._process = None
        process.kill()
        process.wait(15)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def _said(self, seconds: float) -> tuple[float, dict[str, Any]]:
        """When the next line came, and what it says."""
        stdout = self._running().stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            line = stdout.readline() if selector.select(seconds) else b""
        if not line:
            raise MeasureError(f"cannot load {self._argv[-1]}: no word from the pod; its log: {self._log.read_text(errors='replace')[-2000:]}")
        return time.monotonic(), json.loads(line)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the pod is not running")
        return self._process


@contextmanager
def held(ref: str) -> Iterator[str]:
    """The directory of a model that the daemon has, while a lease keeps it there. Raises `client.Problem`."""
    client.ensure(ref, timeout=DAEMON_SECONDS, wait_daemon=DAEMON_SECONDS)
    with client.lease(ref) as lease:
        yield lease.path


def main(loader: str, what: str) -> None:
    """The pod's life, until its standard input ends."""
    if loader == "nvcache":
        with held(what) as path:
            load(loader, path)
    else:
        load(loader, what)


def load(loader: str, path: str) -> None:
    """Say where the model is, load it, say so, and hold it."""
    print(json.dumps({"path": path}), flush=True)
    report, tensors = loaders.load(loader, Path(path))  # which imports torch: a pod can ask before it has that
    print(json.dumps(asdict(report)), flush=True)
    sys.stdin.read()
    del tensors


if __name__ == "__main__":
    main(*sys.argv[1:])
