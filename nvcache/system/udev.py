"""Notices that a block device came or went: the kernel's own events, and the listing in sysfs besides. It does not say which; look again.

udevd's events do not reach the network namespace of a pod, the kernel's do; where neither can be had, the listing is enough.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pyudev import Monitor

POLL = 1.0  # seconds between two looks at the listing
_EVENTS = frozenset({"add", "remove"})

log = logging.getLogger(__name__)


class Hotplug:
    """A watch on block devices, for one thread; `wake` may come from any. Use it as a context manager."""

    def __init__(self, sys: Path = Path("/sys")) -> None:
        self._block = sys / "class/block"
        self._selector = selectors.DefaultSelector()
        self._awake, self._waker = socket.socketpair()
        self._awake.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._awake, selectors.EVENT_READ)
        self._monitor = _monitor()
        if self._monitor is not None:
            self._selector.register(self._monitor.fileno(), selectors.EVENT_READ)
        self._seen = self._listing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._selector.close()
        self._awake.close()
        self._waker.close()
        self._monitor = None

    def wait(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds; whether a device came or went since the last call. `wake` ends the wait."""
        until = monotonic() + timeout
        while True:
            ready = {key.fileobj for key, _ in self._selector.select(max(0.0, min(POLL, until - monotonic())))}
            told = self._events() if ready - {self._awake} else False
            before, self._seen = self._seen, self._listing()
            if told or self._seen != before:
                return True
            if self._awake in ready:
                with suppress(BlockingIOError):
                    self._awake.recv(4096)
                return False
            if monotonic() >= until:
                return False

    def wake(self) -> None:
        """End the wait that goes on, or the next one."""
        with suppress(OSError):  # closed, or woken so often already that its buffer is full
            self._waker.send(b"\0")

    def _events(self) -> bool:
        """Take every event that is there; whether one of them tells of a device."""
        told = False
        while self._monitor is not None:
            try:
                device = self._monitor.poll(timeout=0)
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more came than the buffer holds: look, and go on
                    log.warning("the kernel's device events are lost, the listing is polled: %s", error)
                    self._selector.unregister(self._monitor.fileno())
                    self._monitor = None
                return True
            if device is None:
                break
            told |= device.action in _EVENTS
        return told

    def _listing(self) -> dict[str, int]:
        """Block devices by name, with their sysfs inode: another one of the same name has another."""
        found = {}
        with suppress(OSError):
            for name in os.listdir(self._block):  # noqa: PTH208 - names are what is wanted
                with suppress(OSError):
                    found[name] = os.stat(self._block / name).st_ino  # noqa: PTH116 - the one number of it
        return found


def _monitor() -> Monitor | None:
    try:
        import pyudev

        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        monitor.filter_by("block")
        monitor.start()
    except (ImportError, OSError) as error:
        log.info("no device events, the listing is polled: %s", error)
        return None
    return monitor
