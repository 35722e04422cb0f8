"""A lease: the daemon keeps the model's bytes while it is held. It renews itself in a daemon thread; it locks no file.

A lease outlives restarts of the daemon (it is on the disk) and of the connection; if the holder dies it runs out by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from datetime import datetime
from types import TracebackType
from typing import Any
from urllib.parse import quote

from nvcache.client.transport import Problem, Transport

RETRY_SECONDS = 5.0
log = logging.getLogger(__name__)


class Lease:
    """A context manager that holds `entry` from enter to exit. `path` and `hub_cache` are where to load from, valid while it is held."""

    def __init__(self, transport: Transport, entry: str, holder: str, ttl: float | None) -> None:
        self._transport = transport
        self._place = f"/v1/models/{quote(entry, safe='@')}/leases"
        self._wish: dict[str, Any] = {"holder": holder} | ({} if ttl is None else {"ttl_s": ttl})
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"nvcache-lease {entry}", daemon=True)
        self.entry = entry
        self.id = ""
        self.path = ""
        self.hub_cache: str | None = None
        self.expires = datetime.fromtimestamp(0).astimezone()

    def __enter__(self) -> Lease:
        """Take it. Raises `Problem`: the model is unknown or not ready, or the daemon cannot be reached."""
        self._take()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go. A daemon that cannot be reached lets it run out instead."""
        self._ended.set()
        self._thread.join()  # bounded: it is waiting for the event, or inside one request with its time limits
        try:
            self._transport.request("DELETE", f"{self._place}/{self.id}")
        except Problem as problem:
            log.info("lease %s of %s was not released, it runs out by itself: %s", self.id, self.entry, problem)

    def _keep(self) -> None:
        wait = self._third()
        while not self._ended.wait(wait):
            try:
                self._renew()
                wait = self._third()
            except Problem as problem:
                wait = min(self._third(), RETRY_SECONDS)
                log.warning("cannot renew the lease of %s, trying again in %.1f s: %s", self.entry, wait, problem)

    def _renew(self) -> None:
        try:
            body = {"ttl_s": self._wish["ttl_s"]} if "ttl_s" in self._wish else {}
            self._adopt(self._transport.request("PUT", f"{self._place}/{self.id}", body))
        except Problem as problem:
            if problem.code != "unknown-lease":
                raise
            self._take()  # it ran out while the daemon could not be reached

    def _take(self) -> None:
        self._adopt(self._transport.request("POST", self._place, self._wish))

    def _adopt(self, document: Mapping[str, Any]) -> None:
        self.id = document["lease"]
        self.path = document["path"]
        self.hub_cache = document.get("hub_cache")
        self.expires = datetime.fromisoformat(document["expires"])

    def _third(self) -> float:
        """A third of what the lease has left, by the daemon's clock, which is this machine's."""
        return max(0.1, (self.expires - datetime.now(self.expires.tzinfo)).total_seconds() / 3)
