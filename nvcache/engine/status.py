"""What the engine tells of itself: frozen snapshots that the API, the events and the CLI show. They decide nothing."""

from __future__ import annotations

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
    """One piece of long work. `kind` is fill, verify or repair; `entry` is None until the reference is resolved."""

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
    verified_at: str | None = None
    checked_at: str | None = None
    last_used: datetime | None = None
    warnings: tuple[str, ...] = ()
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
class SpaceStatus:
    """The store's room, in bytes. `limit` is the effective max_bytes."""

    limit: int
    used: int
    reserved: int
    free: int  # of the file system
    total: int
    quarantined: int = 0


@dataclass(slots=True)
class Counters:
    """Monotonic counts since start; api.metrics renders them. Plain ints on the event loop, no locks."""

    hits: int = 0
    misses: int = 0
    joined: int = 0  # callers that joined a running fill
    fetched_bytes: int = 0
    reused_bytes: int = 0
    fills: int = 0
    fill_failures: dict[str, int] = field(default_factory=dict)  # by code
    fill_seconds_sum: float = 0.0
    verify_failures: int = 0
    repaired_chunks: int = 0
    retries: int = 0
    throttled_seconds: float = 0.0
    worker_restarts: int = 0
    dropped_manifests: int = 0
