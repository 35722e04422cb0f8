"""The ranged reader that network sources share: it fills memory with bytes of a URL, whatever the network does. It lists, signs and hashes nothing.

Redirects are followed by hand (credentials stay with their origin), expired URLs are resolved anew, broken bodies are taken up at the next byte,
errors that may pass are tried again as the server asks, stalls are cut, and every wait ends. What it cannot know is whether the bytes are right: the
caller proves them by digest. Where a source has none, Azure's MD5 of each range at least shows that they came as they were sent.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message

from nvcache.core.retry import Verdict, backoff, classify
from nvcache.errors import Code, IntegrityError, Interrupted, SourceError
from nvcache.sources import answers
from nvcache.sources.answers import HEAD, Asked, WrongSizeError
from nvcache.sources.base import HttpRemote, Reader, ReaderFactory
from nvcache.sources.http import Target, Transport
from nvcache.sources.line import PIECE, Cut, Line, Watchdog
from nvcache.sources.pace import Pace
from nvcache.sources.refusal import refusal
from nvcache.sources.route import Place, Route, Turn
from nvcache.sources.throttle import Throttle

__all__ = ["HttpReader", "Pace", "Throttle", "Told", "Transport", "Watchdog", "http_readers"]

_log = logging.getLogger(__name__)

MAX_REDIRECTS = 10
PROTOCOL_TRIES = 3  # answers that break the protocol or do not have their own MD5, in a row
MD5_RANGE = 4 * 2**20  # longest range that Azure gives an MD5 of ("Get Blob", x-ms-range-get-content-md5)
REOPEN_AFTER = 3  # failures in a row after which the URL is resolved anew: another CDN host may do better
Told = Callable[[SourceError | IntegrityError, float], None]  # what failed, and in how many seconds it is tried again; any thread may call it
_BROKEN_ANSWERS = frozenset({Code.SOURCE_PROTOCOL, Code.DIGEST_MISMATCH})
_TRIED_AGAIN = _BROKEN_ANSWERS | {Code.SOURCE_UNREACHABLE, Code.SOURCE_STALLED, Code.SOURCE_FAILED, Code.SOURCE_BUSY}


def http_readers(
    remote: HttpRemote, transport: Transport, throttle: Throttle, watchdog: Watchdog, pace: Pace | None = None, told: Told | None = None
) -> ReaderFactory:
    """Readers of `remote` that share what was learnt of it. Nothing is asked before the first read. `told` hears of what is tried again.

    Raises ValueError for a URL that is none.
    """
    route = Route(remote)
    pace = pace or Pace()

    def make() -> Reader:
        return HttpReader(remote, route, transport, throttle, watchdog, pace, told)

    return make


@dataclass(slots=True)
class _Job:
    """One `read` under way, by ranges of `step` bytes at most.

    `mark` is the furthest byte of the file reached, `since` when (monotonic): the deadline counts from there.
    """

    start: int
    view: memoryview
    step: int
    filled: int = 0
    mark: int = -1
    since: float = field(default_factory=time.monotonic)

    @property
    def position(self) -> int:
        return self.start + self.filled

    @property
    def stop(self) -> int:
        """Where the next range ends."""
        return self.start + min(len(self.view), self.filled + self.step)

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

    def __init__(
        self, remote: HttpRemote, route: Route, transport: Transport, throttle: Throttle, watchdog: Watchdog, pace: Pace, told: Told | None = None
    ) -> None:
        self._remote, self._route, self._transport, self._throttle, self._watchdog, self._pace = remote, route, transport, throttle, watchdog, pace
        self._told = told
        self._aborted = threading.Event()
        self._closed = False
        self._line = self._using = self._new_line()
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
        `IntegrityError` (digest-mismatch): of a `range_md5` remote, three answers in a row did not have the MD5 that they named.
        """
        if offset + len(into) > self._remote.size:
            raise ValueError(f"bytes {offset}-{offset + len(into)} are not inside {self._remote.size}")
        job = _Job(offset, into, MD5_RANGE if self._remote.range_md5 else len(into))
        failures = 0
        while job.filled < len(into):
            before = job.mark
            try:
                self._attempt(job)
            except (SourceError, IntegrityError) as error:
                failures = 0 if job.mark >= before + PIECE else failures + 1
                self._recover(job, error, failures)
            else:
                failures = 0

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
            self._line = self._using = self._new_line()
            return None
        self._route.opened(self._line, answer.target)
        if length < job.stop - job.position and not self._transport.insists:
            self._line.drop()
            raise self._error(Code.SOURCE_PROTOCOL, f"{length} bytes came of {job.stop - job.position}")
        with job.view[job.filled : job.filled + length] as body:  # given back also where an error goes through: its traceback keeps this frame
            got = self._line.fill(body)
            self._line.filling = 0
            if self._remote.range_md5:
                self._check_md5(answer, body, got)
        self._received += got
        job.filled += got
        job.reached(job.position)
        if got < length:
            raise self._broken(self._line)
        return None

    def _check_md5(self, answer: _Answer, body: memoryview, got: int) -> None:
        """Raise if the body is not the one whose MD5 its answer names. One that came in part cannot be checked, and counts for nothing."""
        named = answer.headers.get("Content-MD5")
        if named is None:
            return  # a stand-in for Azure that knows no MD5; whoever asked for it records that nothing proves the bytes
        if got < len(body):
            raise self._broken(self._line)
        md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode("ascii")
        if md5 != named.strip():
            self._line.drop()  # what spoilt it may sit on this connection's path
            asked = answer.asked
            what = f"{asked.what}: bytes {asked.start}-{asked.stop - 1} came with an MD5 that is not theirs"
            raise IntegrityError(Code.DIGEST_MISMATCH, what, retryable=True)

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
            with job.view[job.filled :] as rest:  # given back, as in `_read_range`
                self._take(job, rest, counted=True)
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
            self._hold_back(target, job)
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
            headers["If-Match" if self._remote.match else "If-Range"] = condition
        if self._remote.range_md5:
            headers["x-ms-range-get-content-md5"] = "true"
        return headers | (dict(self._remote.headers) if target.origin == self._route.origin.origin else {})

    def _follow(self, target: Target, location: str) -> Target:
        try:
            there = target.join(location)
        except ValueError:
            self._line.drop()
            raise self._error(Code.SOURCE_PROTOCOL, "a redirect to something that is no http(s) URL") from None
        if self._remote.stay and there.origin != self._route.origin.origin:
            self._line.drop()
            raise SourceError(Code.SOURCE_PROTOCOL, f"cannot fetch {self._remote.name} from {target.origin}: it redirects elsewhere", retryable=False)
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
        error = refusal(status, answer.headers, answer.asked, self._remote, verdict, redirected=redirected)
        if error.retry_after_s is not None and status in (429, 503):
            self._throttle.asked(answer.target.origin, error.retry_after_s)
        raise error

    def _recover(self, job: _Job, error: SourceError | IntegrityError, failures: int) -> None:
        """Wait before the next try, or raise `error` when there is none."""
        if error.code not in _TRIED_AGAIN or not error.retryable or not self._transport.insists:
            raise error
        if error.code in _BROKEN_ANSWERS and failures >= PROTOCOL_TRIES:
            raise error
        if failures == 0:
            self._tell(error, 0.0)
            return  # it got somewhere: take it up at the next byte at once
        left = job.since + self._transport.deadline - time.monotonic()
        wait = backoff(failures, random.random())  # noqa: S311 - jitter
        if max(wait, error.retry_after_s or 0.0) >= left:
            raise error
        if failures % REOPEN_AFTER == 0 and self._place is not None:
            self._route.forget(self._place)
        _log.info("trying again in %.1f s: %s", wait, error)
        self._tell(error, max(wait, error.retry_after_s or 0.0))
        self._aborted.wait(wait)
        self._check_aborted()

    def _tell(self, error: SourceError | IntegrityError, pause: float) -> None:
        if self._told is not None:
            self._told(error, pause)

    def _hold_back(self, target: Target, job: _Job) -> None:
        """Wait while the origin wants nothing asked; a little longer at random, so that not everybody comes back in the same instant."""
        wait = self._throttle.left(target.origin) * (1 + 0.1 * random.random())  # noqa: S311 - jitter
        if wait > 0 and wait > job.since + self._transport.deadline - time.monotonic():
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

    def _new_line(self) -> Line:
        return Line(self._remote.name, self._transport, self._watchdog, self._pace)

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise Interrupted(Code.CANCELLED, f"cannot fetch {self._remote.name}: cancelled")

    def _error(self, code: Code, why: str) -> SourceError:
        return SourceError(code, f"cannot fetch {self._remote.name} from {self._route.origin.origin}: {why}")
