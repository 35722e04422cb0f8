"""What a range request asks for, by its headers alone (RFC 9110 §13 and §14). It reads no file and writes no answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"[^"]*"')


@dataclass(frozen=True, slots=True)
class Span:
    """What to answer: a status, and for 200 and 206 the bytes that go with it."""

    status: int
    start: int = 0
    length: int = 0

    def content_range(self, size: int) -> str | None:
        """The Content-Range header of a 206 or 416."""
        if self.status == 206:
            return f"bytes {self.start}-{self.start + self.length - 1}/{size}"
        return f"bytes */{size}" if self.status == 416 else None


def asked(headers: Mapping[str, str], etag: str, size: int) -> Span:
    """What a GET with these headers (names in lower case) asks of `size` bytes that have the strong `etag` for ever.

    A range of another unit, one that cannot be read, and several at once are passed over, as a server may: the whole is answered.
    """
    whole = Span(200, 0, size)
    if (match := headers.get("if-match")) is not None and match.strip() != "*" and etag not in _TAG.findall(match):
        return Span(412)
    if (none := headers.get("if-none-match")) is not None and (none.strip() == "*" or etag in {tag.removeprefix("W/") for tag in _TAG.findall(none)}):
        return Span(304)
    found = _RANGE.fullmatch(headers.get("range", "").strip())
    if found is None or headers.get("if-range", etag).strip() != etag or not (found[1] or found[2]):
        return whole
    if not found[1]:  # the last so many
        length = min(int(found[2]), size)
        return Span(206, size - length, length) if length else Span(416)
    start, stop = int(found[1]), int(found[2]) + 1 if found[2] else size
    if stop <= start and found[2]:
        return whole  # RFC 9110 §14.1.1: last before first is invalid, and what is invalid is passed over
    return Span(206, start, min(stop, size) - start) if start < size else Span(416)
