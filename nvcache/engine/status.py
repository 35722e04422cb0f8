"""What the engine tells of itself: frozen snapshots that the API, the events and the CLI show. They decide nothing."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import datetime

from nvcache.core.manifest import Selection
from nvcache.core.plan import Priority
from nvcache.core.ref import Ref
from nvcache.core.states import JobState, ModelState
from nvcache.errors import Code, NvcacheError


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as data: what a problem document, an event and a job carry."""

    code: Code
    message: str
    hint: str
    retryable: bool
    retry_after_s: float | None = None
    facts: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, error: NvcacheError) -> ErrorInfo:
        """The data of an exception."""
        return cls(error.code, str(error), error.hint, error.retryable, error.retry_after_s, dict(error.facts))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fill or a verification is. Bytes and files; `rate` in bytes per second over the last seconds; `eta_s` None when unknown."""

    bytes_total: int = 0
    bytes_done: int = 0  # on the disk: fetched now, by an earlier try, or found by digest
    bytes_fetched: int = 0  # over the network, in this job
    files_total: int = 0
    files_done: int = 0
    rate: float = 0.0
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One piece of long work. `kind` is fill, verify, scrub or repair; `entry` is None until the reference is resolved.

    `cached_before` and `cached_after` are the bytes in the page cache just before and just after each piece was read back, added up.
    """

    id: str
    kind: str
    ref: str
    entry: str | None
    state: JobState
    created_at: datetime
    ended_at: datetime | None = None
    progress: Progress = field(default_factory=Progress)
    error: ErrorInfo | None = None
    seconds: float = 0.0
    repaired_chunks: int = 0
    bad_files: tuple[str, ...] = ()
    cached_before: int | None = None
    cached_after: int | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One entry as seen now. `path` and `hub_cache` are None unless the state is ready; `hub_id` is the name in the HuggingFace view."""

    entry: str
    ref: str
    revision: str
    state: ModelState
    files: int
    bytes: int
    path: str | None = None
    hub_cache: str | None = None
    hub_id: str | None = None
    pinned: bool = False
    leases: int = 0
    in_use: bool = False  # a process of the node has files of it open or mapped, with or without a lease; looked up every half minute
    verified_at: str | None = None
    checked_at: str | None = None
    last_used: datetime | None = None
    warnings: tuple[str, ...] = ()
    unproven: int = 0  # files of which the source publishes no digest: they are what came at first use
    progress: Progress | None = None
    job: str | None = None
    error: ErrorInfo | None = None
    fetched_bytes: int = 0  # by the fill that made it ready, in this daemon's life; 0 for a hit
    seconds: float = 0.0
    note: str | None = None  # e.g. the source was down and the last resolved revision is served


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """A hold on an entry: its bytes are not removed while it lives."""

    lease: str
    entry: str
    holder: str
    path: str
    hub_cache: str | None
    expires: datetime


@dataclass(frozen=True, slots=True)
class EnsureRequest:
    """A wish to have a model ready. `waiting` tells whether somebody waits for it (demand) or it is declared."""

    ref: Ref
    selection: Selection = field(default_factory=Selection)
    alias: str | None = None
    pin: bool = False
    priority: Priority = Priority.DEMAND
    require_digest: bool = False


@dataclass(frozen=True, slots=True)
class DryRun:
    """What making a model ready would do. `seconds` is None when no rate was measured yet; `fits` False says why in `refusal`."""

    entry: str
    ref: str
    revision: str
    files: int
    bytes: int
    bytes_here: int  # already in the store, by digest
    bytes_to_fetch: int
    left_out: tuple[tuple[str, int], ...]
    seconds: float | None
    fits: bool
    would_evict: tuple[str, ...] = ()
    refusal: ErrorInfo | None = None
    paths: tuple[tuple[str, int, bool], ...] = ()  # path, size, already here


@dataclass(frozen=True, slots=True)
class EvictionStatus:
    """What goes, or went, so that `need` bytes are available; `short` is what was missing of them. Bytes; `in_the_way` is held and takes room."""

    need: int
    short: int
    freed: int
    enough: bool
    victims: tuple[dict[str, object], ...]  # entry, frees, last_used (None: never), in_use
    in_the_way: tuple[dict[str, object], ...]  # entry, bytes, held: why, in words


@dataclass(frozen=True, slots=True)
class SpaceStatus:
    """The store's room, in bytes. `limit` is the effective max_bytes; above `high_mark` models are evicted, down to `low_mark`."""

    limit: int
    used: int
    reserved: int
    free: int  # of the file system
    total: int
    quarantined: int = 0
    min_free: int = 0
    high_mark: int = 0
    low_mark: int = 0


FILL_SECONDS = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)  # a small model on loopback to a large one far away


@dataclass(slots=True)
class Counters:
    """Monotonic counts since start; api.metrics renders them. Plain ints on the event loop, no locks."""

    hits: int = 0
    misses: int = 0
    joined: int = 0  # callers that joined a running fill
    fetched_bytes: int = 0
    source_bytes: dict[str, int] = field(default_factory=dict)  # of them, by scheme
    source_errors: dict[tuple[str, str], int] = field(default_factory=dict)  # by scheme and code
    reused_bytes: int = 0
    fills: int = 0
    fill_failures: dict[str, int] = field(default_factory=dict)  # by code
    fill_seconds_sum: float = 0.0
    fill_seconds_up_to: list[int] = field(default_factory=lambda: [0] * (len(FILL_SECONDS) + 1))  # of the fills, by FILL_SECONDS; the last: longer
    verify_failures: int = 0
    scrubs: int = 0
    scrubbed_bytes: int = 0
    scrub_failures: int = 0  # models in which a scrub found wrong bytes
    repaired_chunks: int = 0
    repairs: int = 0
    leases_taken: int = 0
    leases_expired: int = 0
    retries: int = 0
    preemptions: int = 0  # fetches that were stopped for one that somebody waits for
    throttled_seconds: float = 0.0
    worker_restarts: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    mirror_bytes: dict[str, int] = field(default_factory=dict)  # by mirror
    mirror_failures: dict[tuple[str, str], int] = field(default_factory=dict)  # by mirror and code
    stripe_losses: int = 0
    signal_failures: int = 0  # calls to the cluster's API server that failed

    def filled(self, seconds: float) -> None:
        """A fill ended well after so long."""
        self.fills += 1
        self.fill_seconds_sum += seconds
        self.fill_seconds_up_to[bisect_left(FILL_SECONDS, seconds)] += 1

    def came(self, source: str, size: int) -> None:
        """`size` bytes came from a source of that scheme."""
        self.fetched_bytes += size
        self.source_bytes[source] = self.source_bytes.get(source, 0) + size

    def source_failed(self, source: str, code: str) -> None:
        """A source of that scheme did not do what it was asked."""
        self.source_errors[source, code] = self.source_errors.get((source, code), 0) + 1

    def count_signal_failure(self) -> None:
        """One more."""
        self.signal_failures += 1
