"""A real daemon: `nvcache serve` in a process of its own, with a clean environment, and the command line that asks it. It fakes nothing."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

READY_SECONDS = 60
STOP_SECONDS = 15  # the daemon promises 10


class DaemonProcess:
    """One daemon over `place` (store, socket, log, home; keep it short: a socket path has 107 bytes).

    `flags` go to `serve`, `settings` become `NVCACHE_*` variables. A context manager: ready inside; stopped, with exit code 0, after. `start` and
    `stop` may be repeated.
    """

    def __init__(self, place: Path, endpoint: str, *flags: str, **settings: object) -> None:
        self.flags = flags
        self.place, self.store, self.socket, self.log = place, place / "store", place / "nvcache.sock", place / "daemon.log"
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(place),
            "NVCACHE_STORE": str(self.store),
            "NVCACHE_SOCKET": str(self.socket),
            "HF_ENDPOINT": endpoint,
            **{f"NVCACHE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_line = ""

    def __enter__(self) -> DaemonProcess:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        code = self.stop()
        if error is None and code != 0:
            raise AssertionError(f"the daemon stopped with exit code {code}:\n{self.last_words()}")

    def start(self) -> None:
        """Start it and wait for the line that it prints when it is ready. Raises AssertionError with its log if it does not come."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nvcache", "serve", *self.flags],
                env=self.environment,
                cwd=self.place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the caller, who stops it in order
            )
        out = self.process.stdout
        assert out is not None
        if select.select([out], [], [], READY_SECONDS)[0]:
            self.ready_line = out.readline().decode().strip()
        if not self.ready_line:
            self.stop()
            raise AssertionError(f"the daemon did not become ready:\n{self.last_words()}")

    def stop(self) -> int:
        """SIGTERM, wait, SIGKILL if need be. Returns the exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._forget()

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._forget()

    def cli(self, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `nvcache ARGUMENTS…` against it, without a terminal."""
        return subprocess.run(
            [sys.executable, "-m", "nvcache", *arguments],
            env={**self.environment, **environment},
            cwd=self.place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def wait_for_log(self, text: str, seconds: float = 30) -> None:
        """Return when `text` stands in the log. Raises AssertionError when it does not come."""
        until = time.monotonic() + seconds
        while text not in self.last_words(None):
            assert time.monotonic() < until, f"{text!r} did not come:\n{self.last_words()}"
            select.select([], [], [], 0.02)

    def last_words(self, count: int | None = 4000) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text if count is None else text[-count:]

    def _forget(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self.process, self.ready_line = None, ""
