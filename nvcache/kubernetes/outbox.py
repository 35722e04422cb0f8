"""Events that wait to be sent: each news once an hour, and no more in a row than a person can read. It sends nothing.

An event's name is made of what it says, so that a daemon that is started again and again tells a thing once: the API server has that name already,
for the hour that it keeps events by default.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable

from nvcache.core.signals import News

AGAIN = 3600.0  # seconds after which the same news is news again
WAITING = 32  # news of a line that wait at most; the oldest go first
REMEMBERED = 1000  # news that are known as told at most: pods can make any number of models fail
BURST = 10  # events in a row
EVERY = 30.0  # seconds until one more is allowed


class Outbox:
    """What is to be sent. `now` is monotonic seconds."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._lines: tuple[deque[News], deque[News]] = (deque(maxlen=WAITING), deque(maxlen=WAITING))  # of the node, before those that pods can cause
        self._told: dict[str, float] = {}
        self._allowed, self._since = float(BURST), float("-inf")
        self._later = float("-inf")

    def put(self, news: Iterable[News], now: float) -> None:
        """Add what was not told within the hour."""
        self._told = {key: told for key, told in self._told.items() if now - told < AGAIN}
        for each in news:
            if each.key not in self._told:
                self._told[each.key] = now
                self._lines[each.by_pods].append(each)
        for key in list(self._told)[:-REMEMBERED]:
            del self._told[key]

    def next(self, now: float) -> News | None:
        """The one to send now, if any may be. It stays until `sent`."""
        self._allowed, self._since = min(BURST, self._allowed + (now - self._since) / EVERY), now
        return next((line[0] for line in self._lines if line), None) if self._allowed >= 1 and now >= self._later else None

    def sent(self) -> None:
        """That one is told, or cannot be."""
        next(line for line in self._lines if line).popleft()
        self._allowed -= 1

    def hold(self, until: float) -> None:
        """Send nothing until then: the server asked for it, or fails."""
        self._later = until

    def name(self, news: News) -> str:
        """The event's name: a DNS subdomain of at most 253 characters."""
        digest = hashlib.sha256(f"{news.reason} {news.key}".encode()).hexdigest()[:16]
        return f"{self._node[:230].rstrip('.-')}.{digest}"
