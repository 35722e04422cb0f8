"""Faults a test server can be told to make, by path, at run time. It decides which request is hit; `hub` and `azure_proxy` carry them out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any


class Kind(StrEnum):
    """What goes wrong. The fields of `Fault` that matter are named in brackets."""

    # instead of the answer
    STATUS = "status"  # any error [status, headers, body, skew_s]
    THROTTLE = "throttle"  # 429 [seconds, style]
    BUSY = "busy"  # 503 [seconds, style]
    PORTAL = "portal"  # a captive portal's HTML with status 200
    POINTER = "pointer"  # the git-lfs pointer with status 200
    GZIP = "gzip"  # Content-Encoding: gzip, however it was asked
    MULTIPART = "multipart"  # 206 multipart/byteranges
    UNSATISFIABLE = "unsatisfiable"  # 416
    REDIRECT_LOOP = "redirect-loop"  # 302 to itself
    DOWNGRADE = "downgrade"  # 302 to http://
    # the answer, with wrong headers
    WRONG_START = "wrong-start"  # Content-Range and body start one byte late, same length
    WRONG_TOTAL = "wrong-total"  # Content-Range total is one too many
    IGNORE_RANGE = "ignore-range"  # 200 with the whole body
    CHUNKED = "chunked"  # as olah: Range ignored, chunked, no Content-Length, ETag unquoted
    CHANGED = "changed"  # another ETag and other bytes of the same length
    WRONG_MD5 = "wrong-md5"  # Content-MD5 of something else
    # the answer, with a body that goes wrong
    TRUNCATE = "truncate"  # closed after [after]
    RESET = "reset"  # TCP reset after [after]
    FLIP = "flip"  # the byte at [after] of this body is inverted
    STALL = "stall"  # silent after [after], until released or closed (at most [seconds])
    TRICKLE = "trickle"  # [after] bytes every [seconds]
    EXPIRE = "expire"  # closed after [after]; the signed URL is refused from then on with [status]
    CALL = "call"  # [hook] is called after [after], then it goes on


@dataclass
class Fault:
    """One rule. `origin` is "bytes" (whichever answer carries file content), "hub", "cdn", "service" or "*"; `times` None means for ever."""

    glob: str
    kind: Kind
    times: int | None = 1
    origin: str = "bytes"
    method: str = "GET"
    after: int = 0
    seconds: float = 30.0
    status: int = 403
    style: str = "retry-after"  # or "date", "ratelimit", "none"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False  # and Range is ignored
    hook: Callable[[], object] | None = None
    skew_s: float = 0  # how far the Date of a STATUS is ahead
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event, repr=False)


class Faults:
    """The rules of one server, first match first; thread-safe, changeable while it serves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Fault] = []
        self._made: list[Fault] = []

    def add(self, glob: str, kind: Kind | str, *, times: int | None = 1, **options: Any) -> Fault:
        """Add a rule; `glob` is matched against the request path and the repository path. Returns it, to read `hits` or set `released`."""
        fault = Fault(glob, Kind(kind), times, **options)
        with self._lock:
            self._rules.append(fault)
            self._made.append(fault)
        return fault

    def clear(self) -> None:
        """Drop all rules and release what is stalled."""
        with self._lock:
            self._rules.clear()
        self.release()

    def release(self) -> None:
        """Let every stalled answer go on."""
        with self._lock:
            made = tuple(self._made)
        for fault in made:
            fault.released.set()

    def take(self, origins: tuple[str, ...], method: str, *paths: str) -> Fault | None:
        """The rule that hits this request, counted."""
        with self._lock:
            for fault in self._rules:
                if fault.origin in origins and fault.method in (method, "*") and any(fnmatchcase(path, fault.glob) for path in paths):
                    fault.hits += 1
                    if fault.times is not None and fault.hits >= fault.times:
                        self._rules.remove(fault)
                    return fault
        return None
