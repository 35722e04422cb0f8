"""The ranged reader that network sources share: it fills memory with bytes of a URL, whatever the network does. It lists, signs and hashes nothing.

Redirects are followed by hand (credentials stay with their origin), expired URLs are resolved anew, broken bodies are taken up at the next byte,
errors that may pass are tried again as the server asks, stalls are cut, and every wait ends. What it cannot know is whether the bytes are right: the
caller proves them by digest.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message

from nvcache.core.retry import Verdict, asked_to_wait, backoff, classify
from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources import answers
from nvcache.sources.answers import HEAD, Asked, WrongSizeError
from nvcache.sources.base import HttpRemote, Reader, ReaderFactory
from nvcache.sources.http import Target, Transport
from nvcache.sources.line import PIECE, Cut, Line, Watchdog
from nvcache.sources.route import Place, Route, Turn

__all__ = ["HttpReader", "Throttle", "Transport", "Watchdog", "http_readers"]

_log = logging.getLogger(__name__)

MAX_REDIRECTS = 10
PROTOCOL_TRIES = 3  # answers that break the protocol, in a row
REOPEN_AFTER = 3  # failures in a row after which the URL is resolved anew: another CDN host may do better
LONGEST_PAUSE_S = 3600.0
_TRIED_AGAIN = frozenset({Code.SOURCE_UNREACHABLE, Code.SOURCE_STALLED, Code.SOURCE_FAILED, Code.SOURCE_BUSY, Code.SOURCE_PROTOCOL})


class Throttle:
    """Pauses by origin, one for all readers of a process: when one is told to slow down, all of them do."""

    def __init__(self, on_pause: Callable[[str, float], None] | None = None) -> None:
        self._on_pause = on_pause
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def pause(self, origin: str, seconds: float) -> None:
        """Ask nothing of `origin` for `seconds` (an hour at most). `on_pause` is not told: this is how other processes' news come in."""
        until = time.monotonic() + min(seconds, LONGEST_PAUSE_S)
        with self._lock:
            self._until[origin] = max(until, self._until.get(origin, 0.0))

    def asked(self, origin: str, seconds: float) -> None:
        """`origin` asked to slow down: pause, and tell `on_pause`."""
        self.pause(origin, seconds)
        if self._on_pause is not None:
            self._on_pause(origin, seconds)

    def left(self, origin: str) -> float:
        """Seconds until `origin` may be asked again."""
        with self._lock:
            return max(0.0, self._until.get(origin, 0.0) - time.monotonic())


def http_readers(remote: HttpRemote, transport: Transport, throttle: Throttle, watchdog: Watchdog) -> ReaderFactory:
    """Readers of `remote` that share what was learnt of it. Nothing is asked before the first read. Raises ValueError for a URL that is none."""
    route = Route(remote)

    def make() -> Reader:
        return HttpReader(remote, route, transport, throttle, watchdog)

    return make


@dataclass(slots=True)
class _Job:
    """One `read` under way. `mark` is the furthest byte of the file reached, `since` when (monotonic): the deadline counts from there."""

    start: int
    view: memoryview
    filled: int = 0
    mark: int = -1
    since: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> int:
        return self.start + self.filled

    @property
    def stop(self) -> int:
        return self.start + len(self.view)

    def reached(self, position: int) -> None:
        if position > self.mark:
            self.mark, self.since = position, time.monotonic()


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Message
    target: Target
    asked: Asked
    identity: str | None


class HttpReader:
    """A `Reader` of one remote over HTTP."""

    def __init__(self, remote: HttpRemote, route: Route, transport: Transport, throttle: Throttle, watchdog: Watchdog) -> None:
        self._remote, self._route, self._transport, self._throttle, self._watchdog = remote, route, transport, throttle, watchdog
        self._aborted = threading.Event()
        self._closed = False
        self._line = self._using = Line(remote.name, transport, watchdog)
        self._scratch = memoryview(b"")
        self._place: Place | None = None
        self._received = 0
        route.joined()

    @property
    def received(self) -> int:
        """See `Reader`."""
        return self._received + self._using.filling

    def read(self, offset: int, into: memoryview) -> None:
        """See `Reader`. A retryable `SourceError` means that the deadline passed (or three answers in a row broke the protocol), and why.

        The digest decides over content; `IntegrityError` (size-mismatch, pointer-file) is raised where the answer itself tells that the file is not
        the one that was listed, a 416 included, and `SourceError` (source-changed) where its ETag says that it was another one a moment ago.
        """
        job = _Job(offset, into)
        if job.stop > self._remote.size:
            raise ValueError(f"bytes {offset}-{job.stop} are not inside {self._remote.size}")
        failures = 0
        while job.filled < len(into):
            before = job.mark
            try:
                self._attempt(job)
            except SourceError as error:
                failures = 0 if job.mark >= before + PIECE else failures + 1
                self._recover(job, error, failures)

    def abort(self) -> None:
        """See `Reader`."""
        self._aborted.set()
        self._using.cut(Cut.ABORTED)
        self._route.wake()

    def close(self) -> None:
        """See `Reader`."""
        if not self._closed:
            self._closed = True
            self._line.drop()
            self._route.parted()

    def _attempt(self, job: _Job) -> None:
        """One request, or one turn at the shared stream. Some, all or none of the bytes come; the reason for a failure is raised."""
        line, now = self._line, time.monotonic()
        entered = self._route.enter(line, job.position, job.since + self._transport.deadline, self._aborted)
        self._check_aborted()
        if entered is None:
            raise self._error(Code.SOURCE_STALLED, f"nothing came for {self._transport.deadline:g} s")
        turn, self._place = entered
        try:
            if turn is Turn.STREAM:
                job.since += time.monotonic() - now  # while others read, this one was not stuck
                self._read_stream(job)
            else:
                self._read_range(job, self._place)
        finally:
            self._route.leave(line)

    def _read_range(self, job: _Job, place: Place) -> None:
        answer = self._ask(job, place)
        if answer.status not in (200, 206):
            return self._refusal(answer, place, job)
        etag = answer.headers.get("ETag")
        try:
            length = answers.body_length(answer.status, answer.headers, answer.asked)
        except WrongSizeError as wrong:
            self._route.confirm(answer.asked, answer.target, etag, answer.identity)
            head = self._body_head() if answer.status == 200 or job.position == 0 else b""
            raise answers.wrong_size(answer.asked, wrong.size, head) from None
        self._route.confirm(answer.asked, answer.target, etag, answer.identity)
        if length is None:
            if not self._route.to_stream(self._line):
                self._line.drop()
                raise self._error(Code.SOURCE_PROTOCOL, "the whole file came in place of a range")
            self._line = self._using = Line(self._remote.name, self._transport, self._watchdog)
            return None
        self._route.opened(self._line, answer.target)
        got = self._line.fill(job.view[job.filled : job.filled + length])
        self._line.filling = 0
        self._received += got
        job.filled += got
        job.reached(job.position)
        if got < length:
            raise self._broken(self._line)
        return None

    def _read_stream(self, job: _Job) -> None:
        """Read through to the position, then the bytes, from the body that all readers share."""
        stream = self._route.stream
        assert stream is not None  # noqa: S101 - the turn says so
        goes_on = False
        self._using = stream.line
        try:
            self._check_aborted()
            while stream.position < job.position:
                if not self._scratch:
                    self._scratch = memoryview(bytearray(PIECE))
                self._take(job, self._scratch[: job.position - stream.position])
            self._take(job, job.view[job.filled :], counted=True)
            goes_on = stream.position < self._remote.size
        finally:
            self._using = self._line
            if not goes_on:
                self._route.end_stream()

    def _take(self, job: _Job, view: memoryview, *, counted: bool = False) -> None:
        """Fill `view` from the stream or raise why not. A body that says itself that it is over too early is another file."""
        stream = self._route.stream
        assert stream is not None  # noqa: S101 - the turn says so
        got = stream.line.fill(view)
        if stream.position < HEAD:
            stream.head = (stream.head + bytes(view[: min(got, HEAD)]))[:HEAD]
        stream.position += got
        stream.line.filling = 0
        self._received += got if counted else 0
        job.filled += got if counted else 0
        job.reached(stream.position)
        if got < len(view):
            if stream.line.ended:
                raise answers.wrong_size(self._asked(self._route.origin, job), stream.position, stream.head)
            raise self._broken(stream.line)

    def _broken(self, line: Line) -> SourceError | Interrupted:
        """Why a body was short. A stream may have been cut by the abort of the reader that had it before: that is not ours."""
        error = line.why()
        if isinstance(error, Interrupted) and not self._aborted.is_set():
            return self._error(Code.SOURCE_UNREACHABLE, "the connection was closed before the end")
        return error

    def _ask(self, job: _Job, place: Place) -> _Answer:
        """Send the range request and follow redirects. The remote's headers go to its own origin only."""
        target, identity = place.target, None
        for _ in range(MAX_REDIRECTS + 1):
            self._pace(target, job)
            response = self._line.ask(target, self._headers(target, job))
            identity = response.headers.get("X-Linked-Etag") or identity
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return _Answer(response.status, response.headers, target, self._asked(target, job), identity)
            target = self._follow(target, location)
            self._line.drain()
        self._line.drop()
        raise self._error(Code.SOURCE_PROTOCOL, f"more than {MAX_REDIRECTS} redirects")

    def _headers(self, target: Target, job: _Job) -> dict[str, str]:
        headers = {"Range": f"bytes={job.position}-{job.stop - 1}"}
        condition = self._route.condition(target)
        if condition:
            headers["If-Range"] = condition
        return headers | (dict(self._remote.headers) if target.origin == self._route.origin.origin else {})

    def _follow(self, target: Target, location: str) -> Target:
        try:
            there = target.join(location)
        except ValueError:
            self._line.drop()
            raise self._error(Code.SOURCE_PROTOCOL, "a redirect to something that is no http(s) URL") from None
        if target.scheme == "https" and there.scheme == "http":
            self._line.drop()
            raise SourceError(
                Code.SOURCE_PROTOCOL, f"cannot fetch {self._remote.name} from {target.origin}: it redirects to plain http", retryable=False
            )
        return there

    def _refusal(self, answer: _Answer, place: Place, job: _Job) -> None:
        """Every status that brings no bytes: raise what it means, or return when a fresh URL is to be asked at once."""
        status = answer.status
        self._line.drain()
        if status == 416:
            raise answers.unsatisfiable(answer.headers, answer.asked)
        redirected = answer.target != self._route.origin
        verdict = classify(status, redirected=redirected)
        if verdict is Verdict.RELOCATE:
            if self._route.expired(place):
                return
            raise answer.asked.error(Code.SOURCE_FORBIDDEN, f"its signed URLs are refused ({status})", retryable=False)
        if verdict is Verdict.PERMANENT:
            authorised = not redirected and any(name.lower() == "authorization" for name, _ in self._remote.headers)
            raise answers.permanent(status, answer.headers, answer.asked, authorised=authorised)
        wait = asked_to_wait(dict(answer.headers.items()), time.time())
        if wait is not None and status in (429, 503):
            self._throttle.asked(answer.target.origin, wait)
        code = Code.SOURCE_BUSY if verdict is Verdict.THROTTLE or wait is not None else Code.SOURCE_FAILED
        error = answer.asked.error(code, f"it answers {status}")
        error.retry_after_s = wait
        raise error

    def _recover(self, job: _Job, error: SourceError, failures: int) -> None:
        """Wait before the next try, or raise `error` when there is none."""
        if error.code not in _TRIED_AGAIN or not error.retryable:
            raise error
        if error.code is Code.SOURCE_PROTOCOL and failures >= PROTOCOL_TRIES:
            raise error
        if failures == 0:
            return  # it got somewhere: take it up at the next byte at once
        left = job.since + self._transport.deadline - time.monotonic()
        wait = backoff(failures, random.random())  # noqa: S311 - jitter
        if max(wait, error.retry_after_s or 0.0) >= left:
            raise error
        if failures % REOPEN_AFTER == 0 and self._place is not None:
            self._route.forget(self._place)
        _log.info("trying again in %.1f s: %s", wait, error)
        self._aborted.wait(wait)
        self._check_aborted()

    def _pace(self, target: Target, job: _Job) -> None:
        """Wait while the origin wants nothing asked; a little longer at random, so that not everybody comes back in the same instant."""
        wait = self._throttle.left(target.origin) * (1 + 0.1 * random.random())  # noqa: S311 - jitter
        if wait > job.since + self._transport.deadline - time.monotonic():
            error = self._asked(target, job).error(Code.SOURCE_BUSY, f"it wants nothing asked for another {wait:.0f} s")
            error.retry_after_s = wait
            raise error
        if wait > 0:
            self._aborted.wait(wait)
        self._check_aborted()

    def _body_head(self) -> bytes:
        head = bytearray(HEAD)
        return bytes(head[: self._line.fill(memoryview(head))])

    def _asked(self, target: Target, job: _Job) -> Asked:
        return Asked(self._remote.name, target.origin, job.position, job.stop, self._remote.size)

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise Interrupted(Code.CANCELLED, f"cannot fetch {self._remote.name}: cancelled")

    def _error(self, code: Code, why: str) -> SourceError:
        return SourceError(code, f"cannot fetch {self._remote.name} from {self._route.origin.origin}: {why}")
