"""The states of a model and of a job, and the moves between them that are allowed. It holds no state itself."""

from __future__ import annotations

from enum import StrEnum


class ModelState(StrEnum):
    """What a caller may be told of a model; only `READY` has a path."""

    ABSENT = "absent"
    QUEUED = "queued"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    READY = "ready"
    DEGRADED = "degraded"
    FAILED = "failed"
    EVICTING = "evicting"
    UNKNOWN = "unknown"  # the disk does not answer


class JobState(StrEnum):
    """A job's life: it ends in one of the last three and never leaves it."""

    QUEUED = "queued"
    RESOLVING = "resolving"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


_ENDS = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})
JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RESOLVING, JobState.FETCHING, JobState.VERIFYING}) | _ENDS,
    JobState.RESOLVING: frozenset({JobState.QUEUED, JobState.FETCHING, JobState.VERIFYING}) | _ENDS,
    JobState.FETCHING: frozenset({JobState.VERIFYING, JobState.QUEUED, JobState.RESOLVING}) | _ENDS,  # resolving: the source changed
    JobState.VERIFYING: frozenset({JobState.FETCHING}) | _ENDS,
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

MODEL_STATE_OF_JOB: dict[JobState, ModelState] = {
    JobState.QUEUED: ModelState.QUEUED,
    JobState.RESOLVING: ModelState.QUEUED,
    JobState.FETCHING: ModelState.FETCHING,
    JobState.VERIFYING: ModelState.VERIFYING,
    JobState.DONE: ModelState.READY,
    JobState.FAILED: ModelState.FAILED,
    JobState.CANCELLED: ModelState.ABSENT,
}
