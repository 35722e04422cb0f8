"""Starts and stops the daemon that is measured, on a store of its own. It measures nothing but how long the start took."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

NVCACHE = [sys.executable, "-m", "nvcache"]


def clean_environment(work: Path, hub: str | None, ca_file: Path | None) -> dict[str, str]:
    """What every measured command is given: nothing of the caller's proxies, tokens, caches or configuration; this Hub and this CA."""
    home = work / "home"
    home.mkdir(parents=True, exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    return env | ({"HF_ENDPOINT": hub} if hub else {}) | ({"SSL_CERT_FILE": str(ca_file)} if ca_file else {})


class Daemon:
    """`nvcache serve` on the fresh directory `store`; a context manager. `env` is what commands need to reach it, `started` the seconds it took."""

    def __init__(self, store: Path, env: dict[str, str], log: Path) -> None:
        self.store = store
        self.socket = store.parent / "nvcache.sock"
        self.env = env | {"NVCACHE_STORE": str(store), "NVCACHE_SOCKET": str(self.socket)}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    @property
    def pid(self) -> int:
        """The daemon's process id; its workers are its descendants."""
        if self._process is None:
            raise RuntimeError("the daemon is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*NVCACHE, "serve"], env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(30) else b""
        if not line:
            self.__exit__(None, None, None)
            raise RuntimeError(f"cannot start nvcache: it said no ready line; its log: {self._log.read_text(errors='replace')[-2000:]}")
        self.started = time.perf_counter() - began
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(15)
        if process.stdout:
            process.stdout.close()


def fresh(directory: Path) -> Path:
    """An empty `directory`, everything on its disk written out, so that no run pays for what another left behind."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    os.sync()
    return directory
