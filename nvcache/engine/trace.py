"""Where the time of one job goes: its phases, and the fetching of many files as a few of them. It keeps nothing; whoever follows the job is told.

While files are fetched side by side a moment belongs to the fetch as long as one file is under way, else to what they wait for. So the phases of a
job do not overlap, but for two sources at once, and their sum is about its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nvcache.core.states import JobState
from nvcache.core.timeline import Event, Kind
from nvcache.engine import clock
from nvcache.errors import Code, NvcacheError

SHORT = 0.05  # seconds of waiting that nobody need hear of
QUICK = 1.0  # seconds in which a job that found the model ready is told as a hit
JOINERS = 5  # of those who ask for what is under way already, named
AWAY = frozenset({Code.STOPPING, Code.NO_STRIPE})
Tell = Callable[[Event], None]
Facts = dict[str, Any]  # of an event, by field


class Trace:
    """One job's events, told to `tell` when they are over. Without it nobody hears.

    With `hit` the first ones are held back until there is more than a name to resolve: `hit(who)` is told instead of a job that finds all ready.
    `file` is told of every file that is fetched or proven, `what` being its path, besides what `tell` hears of all of them.
    """

    def __init__(self, tell: Tell | None = None, hit: Callable[[str | None], None] | None = None, file: Tell | None = None) -> None:
        self._listener = tell
        self._hit = hit
        self._file = file
        self._held: list[Event] = []
        self._phases: list[tuple[Kind, float, float, Facts]] = []  # under way: kind, since (unix, monotonic), facts
        self._fetching: Fetching | None = None
        self._joiners = 0

    def happened(self, kind: Kind, **facts: Any) -> None:
        """Tell of a moment."""
        self._tell(Event(clock.unix(), kind, **facts))

    def _tell(self, event: Event) -> None:
        if self._listener is None:
            return
        self._held.append(event)
        if self._hit is None or event.kind not in (Kind.ASKED, Kind.RESOLVED):
            self._hit = None
            held, self._held = self._held, []
            for each in held:
                self._listener(each)

    def joined(self, who: str | None) -> None:
        """Somebody else wants the same; the first few are told."""
        self._joiners += 1
        if self._joiners <= JOINERS:
            self.happened(Kind.ASKED, what="joined it" if self._joiners < JOINERS else "joined it, and others do not count any more", who=who)

    @contextmanager
    def phase(self, kind: Kind, *, least: float = 0.0, **facts: Any) -> Iterator[Facts]:
        """Tell of what goes on inside once it is over, also when it fails, unless it took less than `least` seconds.

        The facts are yielded, to be added to.
        """
        under_way = (kind, clock.unix(), clock.monotonic(), facts)
        self._phases.append(under_way)
        try:
            yield facts
        finally:
            self._phases.remove(under_way)
            event = _phase(*under_way)
            if (event.seconds or 0.0) >= least:
                self._tell(event)

    @contextmanager
    def fetching(self) -> Iterator[Fetching]:
        """Tell of the files that are fetched inside when all have ended, by where they came from."""
        fetching = self._fetching = Fetching(self._file)
        try:
            yield fetching
        finally:
            self._fetching = None
            for event in fetching.events():
                self._tell(event)

    def going(self) -> list[Event]:
        """What is under way, as of now, and what was held back."""
        return self._held + [_phase(*each, going=True) for each in self._phases] + (self._fetching.events(going=True) if self._fetching else [])

    def ended(self, state: JobState, error: NvcacheError | None, *, good: Kind, cancelled: bool, seconds: float, **facts: Any) -> None:
        """The job is over; `good` is what it is when it ended well, `facts` go with any end."""
        if self._hit is not None and state is JobState.DONE and seconds < QUICK:
            self._hit(self._held[0].who if self._held else None)
            self._held.clear()
            return
        kind = good
        if state is JobState.FAILED:
            kind = Kind.INTERRUPTED if error is not None and error.code in AWAY else Kind.FAILED
        elif state is JobState.CANCELLED:
            kind = Kind.CANCELLED if cancelled else Kind.INTERRUPTED
        if error is not None:
            facts |= {"code": str(error.code), "what": str(error)}
        self.happened(kind, seconds=seconds, **facts)


def _phase(kind: Kind, unix: float, monotonic: float, facts: Facts, *, going: bool = False) -> Event:
    return Event(unix, kind, clock.monotonic() - monotonic, going=going, **facts)


@dataclass(slots=True)
class _Part:
    """Time and bytes of one kind. `since` is None while it does not count."""

    kind: Kind
    facts: Facts
    began: float = 0.0  # unix seconds of the first time, 0 for never
    since: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    count: int = 0

    def on(self, now: float, counts: bool) -> None:
        """From `now` on time counts, or does not."""
        if self.since is not None:
            self.seconds += now - self.since
        self.since = now if counts else None
        self.began = self.began or (clock.unix() if counts else 0.0)

    def event(self, now: float, going: bool) -> Event:
        """What came of it."""
        seconds = self.seconds + (now - self.since if self.since is not None else 0.0)
        return Event(self.began or clock.unix(), self.kind, seconds, self.bytes or None, self.count or None, going=going, **self.facts)


class Fetching:
    """The files of one fill under way. Times are monotonic seconds. `tell` hears of each file when it is over."""

    def __init__(self, tell: Tell | None = None) -> None:
        self._listener = tell
        self._lanes = _Part(Kind.WAITED, {"what": "free lanes: other fetches had them"})
        self._shared = _Part(Kind.WAITED, {"what": "another fill that fetches the same file"})
        self._sources: dict[str | None, _Part] = {}  # None: what is proven, not fetched
        self._running: dict[str | None, int] = {}
        self._waiting = self._blocked = 0
        self._retried: dict[tuple[str | None, str], _Part] = {}
        self._reused = _Part(Kind.REUSED, {"what": "they were in the store already"})

    def reused(self, size: int, files: int = 1) -> None:
        """Files that were here."""
        self._reused.began = self._reused.began or clock.unix()
        self._reused.bytes += size
        self._reused.count += files

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Another job makes the same file."""
        self._blocked += 1
        self._count()
        try:
            yield
        finally:
            self._blocked -= 1
            self._count()

    @contextmanager
    def file(self, source: str | None, path: str) -> Iterator[FileTrace]:
        """One try of a file that comes from `source`, or is here and has to be proven (None); it waits until it `runs`."""
        trace = FileTrace(self, source)
        code: Code | None = None
        self._waiting += 1
        self._count()
        try:
            yield trace
        except NvcacheError as error:
            code = error.code
            raise
        finally:
            trace.runs(False)
            self._waiting -= 1
            self._count()
            if self._listener is not None and (event := trace.event(path, code)) is not None:
                self._listener(event)

    def runs(self, source: str | None, running: bool) -> None:
        """A file got lanes, or waits (again)."""
        self._part(source)
        self._running[source] = self._running.get(source, 0) + (1 if running else -1)
        self._waiting += -1 if running else 1
        self._count()

    def came(self, source: str | None, size: int, *, whole: bool = False) -> None:
        """Bytes of a file; `whole` when that was all of it."""
        part = self._part(source)
        part.bytes += size
        part.count += whole

    def trouble(self, source: str | None, code: str, pause: float, why: str) -> None:
        """A request failed and is made again after `pause` seconds."""
        part = self._retried.setdefault((source, code), _Part(Kind.RETRIED, {"source": source, "code": code}, clock.unix()))
        part.count += 1
        part.seconds += pause
        part.facts["what"] = why

    def events(self, *, going: bool = False) -> list[Event]:
        """All of it, as of now."""
        now = clock.monotonic()
        waits = [part.event(now, going) for part in (self._lanes, self._shared)]
        parts = [part.event(now, going) for part in (*self._sources.values(), *self._retried.values())]
        reused = [Event(self._reused.began, Kind.REUSED, None, self._reused.bytes, self._reused.count, **self._reused.facts)]
        return [*(reused if self._reused.count else []), *(event for event in waits if (event.seconds or 0.0) >= SHORT), *parts]

    def _part(self, source: str | None) -> _Part:
        if source not in self._sources:
            self._sources[source] = _Part(Kind.FETCHED, {"source": source}) if source else _Part(Kind.PROVEN, {"what": "read before it was believed"})
        return self._sources[source]

    def _count(self) -> None:
        """Let this moment count for the right part."""
        now = clock.monotonic()
        for source, part in self._sources.items():
            part.on(now, self._running.get(source, 0) > 0)
        idle = not any(self._running.values())
        self._lanes.on(now, idle and self._waiting > 0)
        self._shared.on(now, idle and self._waiting == 0 and self._blocked > 0)


class FileTrace:
    """One file's part in a `Fetching`; what `Workers.run` tells of its task."""

    def __init__(self, fetching: Fetching, source: str | None) -> None:
        self._fetching, self._source = fetching, source
        self._runs = False
        self._began: tuple[float, float] | None = None  # when it first had its lanes: unix, monotonic
        self._bytes = 0

    def runs(self, running: bool) -> None:
        """It has its lanes, or has to wait for them (again)."""
        if running is not self._runs:
            self._runs = running
            self._began = self._began or (clock.unix(), clock.monotonic())
            self._fetching.runs(self._source, running)

    def came(self, size: int, *, whole: bool = False) -> None:
        """Bytes that came."""
        self._bytes += size
        self._fetching.came(self._source, size, whole=whole)

    def trouble(self, code: str, pause: float, why: str) -> None:
        """A request failed and is made again after `pause` seconds."""
        self._fetching.trouble(self._source, code, pause, why)

    def event(self, path: str, code: Code | None) -> Event | None:
        """What became of it; None if it never had lanes."""
        if self._began is None:
            return None
        unix, since = self._began
        kind = Kind.FETCHED if self._source else Kind.PROVEN
        seconds, failure = clock.monotonic() - since, None if code is None else str(code)
        return Event(unix, kind, seconds, self._bytes or None, source=self._source, code=failure, what=path)
