"""What the readers of one remote share: where its bytes are now, what names them, and whose turn it is. It does no I/O of its own.

A route starts UNKNOWN: one reader at a time may ask the original URL, so that a redirect is resolved, and a server that ignores Range discovered,
once and not once a reader. An answer of 206 makes it RANGED: all readers go at once. A 200 with the whole file makes it STREAM: the one body is
passed from reader to reader in the order of their offsets, so that the file is fetched about once however many readers there are. When a stream
ends or breaks, the route is UNKNOWN again and ranges get another chance.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from enum import Enum, auto

from nvcache.errors import Code
from nvcache.sources.answers import Asked, strong
from nvcache.sources.base import HttpRemote
from nvcache.sources.http import Target
from nvcache.sources.line import Line

GRACE_S = 0.5  # how long a stream waits for the reader of its next byte before the nearest one further on reads through to its own
STRIKES = 3  # whole files in place of ranges, in a row, before a server that has honoured ranges is believed not to any more
FRUITLESS = 2  # URLs in a row that are refused without an answer in between: the second one was fresh


class Turn(Enum):
    """What a reader that entered may do."""

    RANGE = auto()  # ask for its range, along with everybody else
    OPEN = auto()  # ask for its range; nobody else does until `opened`, `stream` or `leave`
    STREAM = auto()  # read on from the stream; nobody else does until `leave`


@dataclass(slots=True)
class Stream:
    """A body of the whole file: its connection, the position of its next byte, and its first bytes for diagnosis."""

    line: Line
    position: int = 0
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Place:
    """Where to ask: a URL, and the round of resolving it comes from."""

    target: Target
    round: int
    redirected: bool


class Route:
    """Thread-safe. Readers call `enter` … `leave` around each attempt, and report what they learn in between."""

    def __init__(self, remote: HttpRemote) -> None:
        self.origin = Target.parse(remote.url)
        self.stream: Stream | None = None
        self._changed = threading.Condition()
        self._ranged = self._honoured = False  # ranges work now; they have worked before
        self._holder: Line | None = None
        self._idle_since = 0.0
        self._waiting: dict[int, int] = {}
        self._place = Place(self.origin, 0, redirected=False)
        self._strikes = self._fruitless = 0
        self._readers = 0
        self._identity: str | None = None
        self._match = remote.match
        etag = strong(remote.validator)
        if etag and remote.match:
            etag = '"' + etag.strip('"') + '"'  # Azure's listings name it without the quotes that its headers have
        self._etags = {self.origin.origin: etag} if etag else {}

    def enter(self, line: Line, offset: int, until: float, aborted: threading.Event) -> tuple[Turn, Place] | None:
        """Wait for a turn to read from `offset`; None when aborted, or when until `until` (monotonic) nobody else got a byte either."""
        with self._changed:
            self._waiting[id(line)] = offset
            try:
                while not aborted.is_set():
                    now = time.monotonic()
                    if self._ranged and self.stream is None:
                        return Turn.RANGE, self._place
                    wait = 1.0 if self._holder else self._wait(offset, now)
                    if wait <= 0:
                        self._holder = line
                        return self._turn(offset), self._place
                    alive = self._holder.beat if self._holder else 0.0
                    if now >= until and now >= alive + line.stall_timeout:
                        return None
                    self._changed.wait(wait)
                return None
            finally:
                del self._waiting[id(line)]

    def leave(self, line: Line) -> None:
        """End the turn of `line`, if it still has it, and let the others look again."""
        with self._changed:
            if self._holder is line:
                self._holder = None
            self._idle_since = time.monotonic()
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait look again whether they are aborted."""
        with self._changed:
            self._changed.notify_all()

    def joined(self) -> None:
        """One more reader."""
        with self._changed:
            self._readers += 1

    def parted(self) -> None:
        """One reader fewer; the last one closes the stream."""
        with self._changed:
            self._readers -= 1
            if self._readers == 0:
                self.end_stream()

    def condition(self, target: Target) -> str | None:
        """The ETag to send to `target` as If-Range or If-Match: only one it gave itself, in the form the header has (RFC 9110 §13.1.1, §13.1.5)."""
        with self._changed:
            etag = self._etags.get(target.origin, "")
        return etag if etag.startswith('"') else None

    def confirm(self, asked: Asked, target: Target, etag: str | None, identity: str | None) -> None:
        """Check what a 200 or 206 from `target` says of its content against what was seen before; `identity` is the Hub's X-Linked-Etag, if any.

        Raises `SourceError` (source-changed). ETags are compared within an origin: two CDN hosts may name the same content differently. Where a
        version was asked for by If-Match, the answer has to be of that one wherever it comes from, and say so (else source-protocol).
        """
        with self._changed:
            if identity and self._identity and identity != self._identity:
                raise asked.error(Code.SOURCE_CHANGED, "the Hub now names other content for it")
            etag = strong(etag)
            if self._match and etag is None:
                raise asked.error(Code.SOURCE_PROTOCOL, "it does not say which version of the file it sends")
            origin = self.origin.origin if self._match else target.origin
            if etag and self._etags.setdefault(origin, etag).strip('"') != etag.strip('"'):
                raise asked.error(Code.SOURCE_CHANGED, "its ETag is not the one that the first bytes came with")
            self._identity = identity or self._identity
            self._fruitless = 0

    def opened(self, line: Line, target: Target) -> None:
        """Ranges are honoured at `target`: everybody go."""
        with self._changed:
            self._strikes = 0
            self._honoured = True
            if self._holder is line:
                self._ranged = True
                self._place = Place(target, self._place.round, redirected=target != self.origin)
                self.leave(line)

    def to_stream(self, line: Line) -> bool:
        """The whole file came in place of a range. True: `line` carries the stream from now on. False: it looks like a slip, ask again."""
        with self._changed:
            self._strikes += 1
            if self.stream is not None or (self._honoured and self._strikes < STRIKES):
                return False
            self._ranged = False
            self.stream = Stream(line)
            self.leave(line)
            return True

    def end_stream(self) -> None:
        """The stream is over or broken."""
        with self._changed:
            if self.stream is not None:
                self.stream.line.drop()
            self.stream = None

    def expired(self, place: Place) -> bool:
        """The URL of `place` is refused. True: a new one will be asked for (once for all readers). False: new ones are refused as well."""
        with self._changed:
            if place.round == self._place.round:
                self._fruitless += 1
                self.forget(place)
            return self._fruitless < FRUITLESS

    def forget(self, place: Place) -> None:
        """Resolve anew at the next turn."""
        with self._changed:
            if place.round == self._place.round:
                self._place = Place(self.origin, place.round + 1, redirected=False)
                self._ranged = False

    def _wait(self, offset: int, now: float) -> float:
        """Seconds until the reader at `offset` may take the free turn, as things stand; 0 now."""
        position = self.stream.position if self.stream else 0
        ahead = [other for other in self._waiting.values() if other >= position]
        if offset != min(ahead or self._waiting.values()):
            return 1.0
        if self.stream is None or offset == position or len(self._waiting) == self._readers:
            return 0.0
        return self._idle_since + GRACE_S - now

    def _turn(self, offset: int) -> Turn:
        if self.stream is not None and offset < self.stream.position:
            self.end_stream()  # only a new body brings those bytes again
        return Turn.OPEN if self.stream is None else Turn.STREAM
