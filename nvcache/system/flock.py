"""Takes an exclusive lock (flock) on an open file, at once or within a time. It opens nothing, and knows not what the lock is for."""

from __future__ import annotations

import fcntl
import threading
from time import monotonic


def take_lock(fd: int, *, until: float = 0.0) -> bool:
    """Whether the lock is this descriptor's now; one that is taken is tried for again until then (by the monotonic clock). Raises OSError."""
    never = threading.Event()
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= until:
                return False
            never.wait(0.05)
        else:
            return True
