"""Pauses that origins ask for, kept by one process for all of its readers. It waits for none of them: whoever asks does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LONGEST_PAUSE_S = 3600.0


class Throttle:
    """Pauses by origin, one for all readers of a process: when one is told to slow down, all of them do."""

    def __init__(self, on_pause: Callable[[str, float], None] | None = None) -> None:
        self._on_pause = on_pause
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def pause(self, origin: str, seconds: float) -> None:
        """Ask nothing of `origin` for `seconds` (an hour at most). `on_pause` is not told: this is how other processes' news come in."""
        until = time.monotonic() + min(seconds, LONGEST_PAUSE_S)
        with self._lock:
            self._until[origin] = max(until, self._until.get(origin, 0.0))

    def asked(self, origin: str, seconds: float) -> None:
        """`origin` asked to slow down: pause, and tell `on_pause`."""
        self.pause(origin, seconds)
        if self._on_pause is not None:
            self._on_pause(origin, seconds)

    def left(self, origin: str) -> float:
        """Seconds until `origin` may be asked again."""
        with self._lock:
            return max(0.0, self._until.get(origin, 0.0) - time.monotonic())
