"""The files in which the story of each model lies, `timelines/<slug>`: lines are appended, and a file that grows too long is cut. It decides nothing.

They outlive what they tell of: that a model was removed, and for what, is asked when it is fetched again. How many are kept of models that are not
here is the caller's business. Nothing is synced: a power cut may cost the last lines. A crash in a write leaves a torn line, which is passed over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from nvcache.core.timeline import LIMIT, Event, parse, to_bytes, to_line, trim
from nvcache.store.files import disk_errors, durable_write, write_all
from nvcache.store.layout import Layout

DAEMON = ".daemon"  # no model's name begins so


class Timelines:
    """The files of one store. One call at a time is the caller's business."""

    def __init__(self, layout: Layout) -> None:
        """Over a store that `Root.open` made."""
        self._layout = layout

    def append(self, slug: str, events: Iterable[Event]) -> None:
        """Add to the story of `slug`; the oldest go when it is longer than `LIMIT` bytes. Raises `SpaceError`, `DiskError`."""
        path = self._layout.timeline(slug)
        with disk_errors(f"note what happened to {slug}"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            try:
                write_all(fd, b"".join(map(to_line, events)))
                long = os.fstat(fd).st_size > LIMIT
            finally:
                os.close(fd)
        if long:
            durable_write(path, to_bytes(trim(self.read(slug), LIMIT // 2)), 0o600, temp=self._layout.tmp)

    def read(self, slug: str) -> list[Event]:
        """The story of `slug` in order; nothing when there is none. Raises `DiskError`."""
        with disk_errors(f"read what happened to {slug}"):
            try:
                fd = os.open(self._layout.timeline(slug), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                return []
            with os.fdopen(fd, "rb") as file:
                return parse(file.read(2 * LIMIT))

    def remove(self, slug: str) -> None:
        """Forget a story. Raises `DiskError`."""
        with disk_errors(f"forget what happened to {slug}"), suppress(FileNotFoundError):
            self._layout.timeline(slug).unlink()

    def names(self) -> list[str]:
        """Every slug that has a story, the one that went on last at the end. Raises `DiskError`."""
        with disk_errors(f"list {self._layout.timelines}"), suppress(FileNotFoundError):
            with os.scandir(self._layout.timelines) as found:
                ages = [(child.stat(follow_symlinks=False), child.name) for child in found if not child.name.startswith(".")]
            return [name for facts, name in sorted(ages, key=lambda each: each[0].st_mtime) if stat.S_ISREG(facts.st_mode)]
        return []
