"""A lease: the daemon keeps the model's bytes while it is held. It renews itself in a daemon thread; it locks no file.

A lease outlives restarts of the daemon (it is on the disk) and of the connection; if the holder dies it runs out by itself.
"""

from __future__ import annotations

import logging
import os
import socket
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
    """A context manager that holds `entry` from enter to exit. `path` and `hub_cache` are where to load from, valid while it is held.

    `entry` is an entry, or a slug: then that model's last revision. With `adopt` it is the live lease that the same user took under the same
    `holder`, if there is one; this is how a pod's containers hand a lease on. Whoever had it before can no longer touch it. With a slug and `adopt`
    it is one that is there already, of whatever revision, or `Problem` (unknown-lease).
    """

    def __init__(self, transport: Transport, entry: str, holder: str, ttl: float | None, *, adopt: bool = False) -> None:
        self._transport = transport
        self._wish: dict[str, Any] = {"holder": holder} | ({} if ttl is None else {"ttl_s": ttl}) | ({"adopt": True} if adopt else {})
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"nvcache-lease {entry}", daemon=True)
        self._handed_over = False
        self.entry = entry
        self.holder = holder
        self.id = ""
        self.path = ""
        self.hub_cache: str | None = None
        self.expires = datetime.fromtimestamp(0).astimezone()

    def __enter__(self) -> Lease:
        """Take it. Raises `Problem`: the model is unknown or not ready, or the daemon cannot be reached."""
        self.take()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let go. A daemon that cannot be reached lets it run out instead."""
        self._stop()
        self.path = ""  # from now on it may be removed; not before the renewals end, for one on its way says it again
        if self._handed_over:
            return
        try:
            self.release()
        except Problem as problem:
            log.info("lease %s of %s was not released, it runs out by itself: %s", self.id, self.entry, problem)

    def hand_over(self) -> None:
        """Renew it a last time and leave it at exit, for who adopts it within its time. Raises nothing: where that fails it has less time left."""
        self._handed_over = True
        self._stop()
        try:
            self.renew()
        except Problem as problem:
            log.warning("cannot renew the lease of %s a last time, it ends at %s: %s", self.entry, self.expires, problem)

    def take(self) -> None:
        """Take it, or adopt it. Raises `Problem`; so do `renew` and `release`, for who renews by himself instead of entering."""
        self._adopt(self._transport.request("POST", self._place(), self._wish))

    def renew(self) -> None:
        """Hold it for longer; take one anew if it ran out while the daemon could not be reached, or somebody adopted it, who has his own now."""
        try:
            body = {"ttl_s": self._wish["ttl_s"]} if "ttl_s" in self._wish else {}
            self._adopt(self._transport.request("PUT", f"{self._place()}/{self.id}", body))
        except Problem as problem:
            if problem.code != "unknown-lease":
                raise
            self._wish.pop("adopt", None)
            self.take()

    def release(self) -> None:
        """End it."""
        self._transport.request("DELETE", f"{self._place()}/{self.id}")

    @property
    def renew_in(self) -> float:
        """Seconds until it should be renewed: a third of what it has left, by the daemon's clock, which is this machine's."""
        return max(0.1, (self.expires - datetime.now(self.expires.tzinfo)).total_seconds() / 3)

    def _keep(self) -> None:
        wait = self.renew_in
        while not self._ended.wait(wait):
            try:
                self.renew()
                wait = self.renew_in
            except Problem as problem:
                wait = min(self.renew_in, RETRY_SECONDS)
                log.warning("cannot renew the lease of %s, trying again in %.1f s: %s", self.entry, wait, problem)

    def _stop(self) -> None:
        self._ended.set()
        self._thread.join()  # bounded: it is waiting for the event, or inside one request with its time limits

    def _place(self) -> str:
        return f"/v1/models/{quote(self.entry, safe='@')}/leases"

    def _adopt(self, document: Mapping[str, Any]) -> None:
        try:
            self.id, self.entry, self.path = (str(document[name]) for name in ("lease", "entry", "path"))
            self.expires = datetime.fromisoformat(document["expires"])
        except (KeyError, TypeError, ValueError) as error:
            why = f"cannot hold {self.entry}: what answers at {self._transport.url} gives no lease as nvcache does"
            raise Problem("daemon-unreachable", why, hint="look what listens there", retryable=True) from error
        self.hub_cache = document.get("hub_cache")


def default_holder() -> str:
    """Who holds a lease unless it is said: `NVCACHE_HOLDER`, else the pod by the downward API (`POD_NAMESPACE`, `POD_NAME`), else host:pid."""
    if named := os.environ.get("NVCACHE_HOLDER"):
        return named
    if pod := os.environ.get("POD_NAME"):
        return f"{namespace}/{pod}" if (namespace := os.environ.get("POD_NAMESPACE")) else pod
    return f"{socket.gethostname()}:{os.getpid()}"
