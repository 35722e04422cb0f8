"""Runs the daemon and tells the cluster of it, also why it cannot begin. What the daemon does is `api.serve`'s business."""

from __future__ import annotations

import asyncio
import signal
from functools import partial

from nvcache.api import serve
from nvcache.errors import Code, ConfigError, NvcacheError
from nvcache.settings import Given, Settings

PLACE = frozenset({Code.DISKS_REFUSED, Code.STORE_FOREIGN, Code.STORE_FORMAT, Code.STORE_READONLY, Code.STORE_UNFIT})
"""Refusals that are about the node's disks. Others, such as a second daemon on the node, must not speak for the one that serves."""


def run(settings: Settings, given: Given | None = None) -> int:
    """`api.serve.run` with the node's signals beside it. Raises `ConfigError` (bad-config) without the client library, and what that raises."""
    try:
        from nvcache.kubernetes import signals
    except ModuleNotFoundError as error:
        why = f"cannot use setting kubernetes: the Python package {error.name} is not installed"
        raise ConfigError(Code.BAD_CONFIG, why, hint="install the extra: pip install 'nvcache[kubernetes]'") from error
    try:
        return serve.run(settings, given, partial(signals.follow, settings))
    except NvcacheError as error:
        if error.code in PLACE:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # nothing is open any more that would have to be closed in order
            asyncio.run(signals.tell_refusal(settings, error))
        raise
