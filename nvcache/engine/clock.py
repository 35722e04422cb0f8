"""The engine's clock: the one room where it reads the time. It schedules nothing."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> datetime:
    """The wall clock, UTC."""
    return datetime.now(UTC)


def unix() -> float:
    """The wall clock in unix seconds, for what is compared across restarts."""
    return time.time()


def monotonic() -> float:
    """Seconds that only go forward, for durations and rates."""
    return time.monotonic()


def stamp() -> str:
    """The wall clock as RFC 3339 in UTC, to the second."""
    return now().isoformat(timespec="seconds").replace("+00:00", "Z")


def from_unix(seconds: float) -> datetime:
    """Unix seconds as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)
