"""How fast bodies may be read: a bucket of bytes that all readers of one source share. It waits for nothing and reads nothing; a `Line` does both.

Bytes are booked before they are read. Each booking is given the number of the byte at which its turn begins, and bytes are granted as time passes, so
that turns come in the order of booking, to many threads fairly, and a new rate counts at once for those that wait already.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

SPAN_S = 0.25  # how much of an idle while is made up for, and how long reading one piece should take
LEAST = 4096  # bytes: the smallest piece worth a system call, however slow the pace


class Pace:
    """At most so many bytes a second on average; thread-safe. None: as many as come, at no cost. `now` is the clock, in seconds."""

    def __init__(self, bytes_per_second: float | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._rate: float | None = None
        self._booked = 0  # bytes, ever
        self._granted = 0.0  # bytes, ever, up to `_at`
        self._at = now()
        self.set(bytes_per_second)

    def set(self, bytes_per_second: float | None) -> None:
        """Change the rate from now on, also for those that wait. Raises ValueError for what is not more than nothing."""
        if bytes_per_second is not None and not 0 < bytes_per_second < math.inf:
            raise ValueError(f"{bytes_per_second} bytes/s is no pace")
        with self._lock:
            self._grant()
            self._rate = bytes_per_second

    @property
    def rate(self) -> float | None:
        """Bytes a second; None: unlimited. When it is None there is nothing to book."""
        return self._rate

    def book(self, want: int) -> tuple[int, int]:
        """Book a piece of `want` bytes at most: how many they may be, and the turn to ask `wait` about before they are read."""
        with self._lock:
            self._grant()
            size = want if self._rate is None else min(want, max(LEAST, int(self._rate * SPAN_S)))
            turn = self._booked
            self._booked += size
            return size, turn

    def wait(self, turn: int) -> float:
        """Seconds until `turn` comes, at the present rate; 0 now."""
        with self._lock:
            self._grant()
            return 0.0 if self._rate is None else max(0.0, turn - self._granted) / self._rate

    def give_back(self, size: int) -> None:
        """`size` bytes that were booked are not going to be read: everybody who waits comes so much earlier."""
        with self._lock:
            self._granted += size

    def _grant(self) -> None:
        """Bring `_granted` up to now. What nobody wants is granted for `SPAN_S` ahead only, so that no idle hour ends in a flood."""
        now = self._now()
        if self._rate is None:
            self._granted = float(self._booked)
        else:
            self._granted = min(self._granted + (now - self._at) * self._rate, self._booked + self._rate * SPAN_S)
        self._at = now
