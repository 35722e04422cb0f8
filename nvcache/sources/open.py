"""Readers for whatever a source located: one place that knows the kinds of remotes. It reads nothing and asks no source."""

from __future__ import annotations

from nvcache.sources.base import FileRemote, HttpRemote, ReaderFactory, Remote
from nvcache.sources.directory import file_readers
from nvcache.sources.http import Transport
from nvcache.sources.pace import Pace
from nvcache.sources.ranges import Throttle, Told, Watchdog, http_readers
from nvcache.sources.xet import xet_readers


def open_remote(
    remote: Remote, transport: Transport, throttle: Throttle, watchdog: Watchdog, pace: Pace | None = None, told: Told | None = None
) -> ReaderFactory:
    """What makes readers of `remote`, those over HTTP no faster than `pace`; hf_xet and local files know no pace. No connection is made yet.

    `told` hears of every request over HTTP that failed and is made again.

    Raises `SourceError` (needs-xet) if hf_xet is needed and not installed.
    """
    match remote:
        case HttpRemote():
            return http_readers(remote, transport, throttle, watchdog, pace, told)
        case FileRemote():
            return file_readers(remote)
        case _:
            return xet_readers(remote, transport)
