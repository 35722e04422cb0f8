"""One life of an inference server: started by a shell command, followed by what it says, asked once, stopped. It knows no model and no cache."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from bench.measure import MeasureError

STOP_SECONDS = 30


class Serving:
    """A context manager over `command`; at its end every process of it is gone. `elapsed` counts seconds from the start."""

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self._command, self._env = command, dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._said: list[str] = []
        self._began = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # it has children, and they are stopped with it
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process = self._running()
        os.killpg(process.pid, signal.SIGINT)  # a group, and not yet waited for: the number is still ours
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def says(self, *signs: str, seconds: float) -> float:
        """Wait for a line that has one of `signs` in it; returns when it came. Raises `MeasureError` when the server ends or the time is over."""
        until = time.perf_counter() + seconds
        while (line := self._line(until)) is not None:
            if any(sign in line for sign in signs):
                return time.perf_counter() - self._began
        end = "\n".join(self._said[-25:])
        raise MeasureError(f"cannot serve: {' or '.join(signs)!r} did not come within {seconds:.0f} s; the server said\n{end}")

    def listens(self, port: int, *, seconds: float) -> float:
        """Wait until somebody accepts at the loopback's `port`, which a server may do only after it said so; returns when. Raises `MeasureError`."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return time.perf_counter() - self._began
            with suppress(subprocess.TimeoutExpired):
                raise MeasureError(f"cannot serve: the server ended with exit code {self._running().wait(0.1)}")
        raise MeasureError(f"cannot serve: nobody listens on port {port} after {seconds:.0f} s")

    def _line(self, until: float) -> str | None:
        """The next line, or None at the end or when the time is over. Progress bars return the carriage instead of ending a line."""
        stdout = self._running().stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, until - time.perf_counter())):
                    return None
                if not (more := os.read(stdout.fileno(), 65536)):
                    return None
                self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        self._said.append(line.decode(errors="replace"))
        return self._said[-1]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process


def complete(url: str, model: str) -> dict[str, Any]:
    """What the server makes of a short prompt, greedily: token ids and their log probabilities (OpenAI's /v1/completions; token ids are vLLM's)."""
    body = {"model": model, "prompt": "hello there", "max_tokens": 8, "temperature": 0, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        choice = json.load(answer)["choices"][0]
    return {"tokens": choice["token_ids"], "logprobs": [round(each, 4) for each in choice["logprobs"]["token_logprobs"]]}
