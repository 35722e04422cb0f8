"""Condemns blobs whose bytes went bad: they go to quarantine, and none is forgotten by a crash in between. It looks at no bytes and no views."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress

from nvcache.errors import IntegrityError, NvcacheError
from nvcache.store.blobs import Blobs
from nvcache.store.files import disk_errors, durable_write
from nvcache.store.layout import Layout

log = logging.getLogger(__name__)


def condemn(layout: Layout, blobs: Blobs, sha256s: Sequence[str], note: str) -> None:
    """Move the blobs to quarantine; those that are not there are no matter.

    The list is on the disk first. A disk too full to take it must not keep bad blobs in place, so that failure is only said in the log.
    Raises `DiskError`.
    """
    try:
        durable_write(layout.condemned, json.dumps({"sha256": list(sha256s), "note": note}).encode(), 0o600, temp=layout.tmp)
    except NvcacheError as error:
        log.warning("the list of bad blobs cannot be written; they are moved one by one: %s", error)
    _move(layout, blobs, sha256s, note)


def finish_condemning(layout: Layout, blobs: Blobs) -> None:
    """At start: move what an interrupted `condemn` left in place. Raises `DiskError`."""
    with disk_errors("read the list of bad blobs"):
        try:
            raw = layout.condemned.read_bytes()
        except FileNotFoundError:
            return
    with suppress(ValueError, KeyError, TypeError):  # durable_write leaves no torn file; what is unreadable is not ours
        listed = json.loads(raw)
        _move(layout, blobs, [str(sha256) for sha256 in listed["sha256"]], str(listed["note"]))


def _move(layout: Layout, blobs: Blobs, sha256s: Sequence[str], note: str) -> None:
    for sha256 in sha256s:
        with suppress(IntegrityError):  # it is not there
            blobs.quarantine(sha256, note)
    with disk_errors("remove the list of bad blobs"):
        layout.condemned.unlink(missing_ok=True)
