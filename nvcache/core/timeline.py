"""What became of a model, event by event: how it is written, what repeats fold into, what goes first, what took longest. It keeps no file.

A line is one JSON object, written once and never changed. Reading is lenient: a line that was torn, or that a later version wrote, is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from nvcache.core.records import count, moment, reading, text
from nvcache.errors import IntegrityError

WORDS = 600  # characters of a text at most: what holds the room of a model that did not fit is named at the end of a long sentence
LIMIT = 64 * 1024  # bytes of one model's lines at most


class Kind(StrEnum):
    """What happened. `PHASES` take their time, and the time of a job is the sum of them; everything else is a moment or tells of a whole job."""

    ASKED = "asked"  # somebody wants it, and it was not ready; `what` says how, `who` says who
    HIT = "hit"  # somebody wants it, and it was; of a job: what it meant last was served, as the source could not be asked
    RESOLVED = "resolved"  # the source said which revision the name means
    LISTED = "listed"  # the source listed the files
    WAITED = "waited"  # for what `what` says
    REUSED = "reused"  # bytes that were here already
    FETCHED = "fetched"  # bytes that came from `source`
    RETRIED = "retried"  # while it was fetched: `source` failed with `code`, and was asked again `count` times; `seconds`: all pauses before it
    PROVEN = "proven"  # bytes that were here and in no model were read before they were believed
    CHECKED = "checked"  # safetensors headers and indexes
    PUBLISHED = "published"  # the views and the manifest
    READ = "read"  # every byte, to see whether it is right
    READY = "ready"  # `seconds` since it was asked for, `bytes` fetched
    FAILED = "failed"  # `count`: as often as that since the failure before it
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # the daemon stopped, or the disks went
    VERIFIED = "verified"  # the end of a verification or a repair
    WITHDRAWN = "withdrawn"  # bytes went bad or files are gone: it is not served
    LEASED = "leased"
    RELEASED = "released"  # `seconds` since it was taken; whoever held it has loaded by then
    EXPIRED = "expired"  # a lease ran out that nobody released
    REMOVED = "removed"
    EVICTED = "evicted"  # for what `what` says
    STARTED = "started"  # the daemon opened the store


PHASES = frozenset({Kind.RESOLVED, Kind.LISTED, Kind.WAITED, Kind.FETCHED, Kind.PROVEN, Kind.CHECKED, Kind.PUBLISHED, Kind.READ})
MINOR = frozenset({Kind.HIT, Kind.LEASED, Kind.RELEASED, Kind.EXPIRED})  # come with every pod, and are the first to go
ENDS = frozenset({Kind.READY, Kind.FAILED, Kind.CANCELLED, Kind.INTERRUPTED, Kind.VERIFIED})


@dataclass(frozen=True, slots=True)
class Event:
    """One line. A phase began `at` (unix seconds) and took `seconds`; anything else happened `at`, and `seconds` looks back from there.

    `source` is where bytes came from (no path, no query), `count` files or times, `who` a person's or a pod's name. What is `going` is not over yet,
    and on no disk.
    """

    at: float
    kind: Kind
    seconds: float | None = None
    bytes: int | None = None
    count: int | None = None
    source: str | None = None
    code: str | None = None
    what: str | None = None
    who: str | None = None
    job: str | None = None
    revision: str | None = None
    going: bool = False

    @property
    def rate(self) -> float | None:
        """Bytes a second, where that means something."""
        return self.bytes / self.seconds if self.bytes and self.seconds else None


def to_dict(event: Event) -> dict[str, Any]:
    """The event as plain data, without what does not apply."""
    fields = ((name, getattr(event, name)) for name in Event.__slots__ if name != "going")
    return {name: value for name, value in fields if value is not None}


def from_dict(raw: object) -> Event:
    """The inverse of `to_dict`. Raises `IntegrityError` (degraded) for anything else."""
    with reading("an event"):
        if not isinstance(raw, dict):
            raise TypeError("it is not an object")
        seconds = raw.get("seconds")
        fields: dict[str, Any] = {name: count(raw[name]) for name in ("bytes", "count") if raw.get(name) is not None}
        fields |= {name: text(raw[name]) for name in ("source", "code", "what", "who", "job", "revision") if raw.get(name) is not None}
        return Event(moment(raw["at"]), Kind(text(raw["kind"])), None if seconds is None else moment(seconds), **fields)


def cut(words: str) -> str:
    """At most `WORDS` characters, and a sign that there were more."""
    return words if len(words) <= WORDS else f"{words[: WORDS - 1]}…"


def to_line(event: Event) -> bytes:
    """The event as it is appended to a file: the line break comes first, so that a line that was torn before it stays the only one that is lost."""
    words = {name: cut(value) if isinstance(value, str) else value for name, value in to_dict(event).items()}
    rounded = {name: round(value, 3) if isinstance(value, float) and math.isfinite(value) else value for name, value in words.items()}
    return b"\n" + json.dumps(rounded, separators=(",", ":")).encode()


def parse(data: bytes) -> list[Event]:
    """Every event in a file that can be read, in the order in which they began."""
    found: list[Event] = []
    for line in data.split(b"\n"):
        try:
            found.append(from_dict(json.loads(line)))
        except (ValueError, RecursionError, IntegrityError):
            continue  # torn, or not of this version
    return sorted(found, key=lambda event: event.at)


def to_bytes(events: Iterable[Event]) -> bytes:
    """A whole file."""
    return b"".join(map(to_line, events))


def fold(events: Sequence[Event]) -> list[Event]:
    """The same story without repeats: jobs that failed as the one before them are one, and so are hits in a row; `count` says how many.

    Of a row of jobs that failed with one code the first stays, to tell since when, and the last. What is folded folds again with what comes after.
    """
    ends = {event.job: event for event in events if event.kind in ENDS and event.job is not None}
    jobs = [job for job in dict.fromkeys(event.job for event in events) if job in ends]
    tries: dict[str | None, int] = {}
    dropped: set[str | None] = set()
    for before, job, after in zip(jobs, jobs[1:], jobs[2:], strict=False):
        if _failed_alike(ends[before], ends[job]) and _failed_alike(ends[job], ends[after]):
            tries[after] = tries.get(job, ends[job].count or 1) + (ends[after].count or 1)
            dropped.add(job)
    found: list[Event] = []
    for event in events:
        if event.job in dropped:
            continue
        now = replace(event, count=tries[event.job]) if event.kind is Kind.FAILED and event.job in tries else event
        if found and now.kind is Kind.HIT is found[-1].kind and now.job == found[-1].job:
            now = replace(now, count=(found.pop().count or 1) + (now.count or 1))
        found.append(now)
    return found


def _failed_alike(one: Event, other: Event) -> bool:
    return one.kind is other.kind is Kind.FAILED and one.code == other.code


def trim(events: Sequence[Event], limit: int) -> list[Event]:
    """What is kept of `events` in `limit` bytes: folded; of what comes with every pod at most a quarter, then the newest of all."""
    folded = fold(events)
    minor = [event for event in folded if event.kind in MINOR]
    kept = {id(event) for event in _newest(minor, limit // 4)}
    return _newest([event for event in folded if event.kind not in MINOR or id(event) in kept], limit)


def _newest(events: Sequence[Event], limit: int) -> list[Event]:
    """As many of the last as fit into `limit` bytes."""
    room, kept = limit, list[Event]()
    for event in reversed(events):
        room -= len(to_line(event))
        if room < 0:
            break
        kept.append(event)
    return kept[::-1]


def of_revision(events: Sequence[Event], revision: str) -> list[Event]:
    """The events of one revision (or its first digits), with those of tries that never found out which revision was meant."""
    meant: dict[str | None, str] = {event.job: event.revision for event in events if event.job is not None and event.revision is not None}
    about = ((event, event.revision or meant.get(event.job)) for event in events)
    return [event for event, its in about if its is None or its.startswith(revision)]


def with_starts(events: Sequence[Event], starts: Iterable[Event]) -> list[Event]:
    """The story with the starts of the daemon that fall into it, the last of those between two events."""
    found: list[Event] = []
    for event in sorted([*events, *starts], key=lambda event: event.at):
        if event.kind is Kind.STARTED:
            if not found:
                continue
            if found[-1].kind is Kind.STARTED:
                found.pop()
        found.append(event)
    return found


def slowest(events: Sequence[Event]) -> list[Event]:
    """Of every job the phase that took longest: a job of one phase has none."""
    phases: dict[str, list[Event]] = {}
    for event in events:
        if event.kind in PHASES and event.job is not None and event.seconds:
            phases.setdefault(event.job, []).append(event)
    return [max(each, key=lambda event: event.seconds or 0.0) for each in phases.values() if len(each) > 1]
