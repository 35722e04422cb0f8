"""What the daemon and its worker processes say to each other: tasks one way, events the other, one JSON object a line. It sends nothing.

A control pipe is a socket pair that only the two processes hold; tasks carry secrets (signed URLs, tokens) and must never be logged.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from nvcache.errors import (
    Code,
    ConfigError,
    DiskError,
    IntegrityError,
    Interrupted,
    NvcacheError,
    RequestError,
    SourceError,
    SpaceError,
)

_CLASSES: dict[str, type[NvcacheError]] = {
    cls.__name__: cls for cls in (RequestError, ConfigError, DiskError, SourceError, IntegrityError, SpaceError, Interrupted)
}


@dataclass(frozen=True, slots=True)
class FetchTask:
    """Make one blob: fetch what the ingest lacks, prove it, commit it. `sha256` is what it must have, in hex; `also` is another digest (`md5:…`).

    `source` is whose limits count (the scheme of the reference); `remote` is what that source located, known when the task is sent at the latest.
    `lent`: the remote is a mirror, which is asked with little patience, and whose chunks are doubted first.
    """

    key: str
    size: int
    name: str
    lanes: int
    source: str
    remote: dict[str, Any] = field(default_factory=dict, repr=False)
    sha256: str | None = None
    also: str | None = None
    lent: bool = False


@dataclass(frozen=True, slots=True)
class AdoptTask:
    """Hash a blob that is here but in no manifest: its chunk digests are wanted, and proof that it is what its name says."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class CheckTask:
    """Compare chunks of a blob, from chunk `first` on, with their digests (base64, packed XXH3-64), around the page cache."""

    path: str
    size: int
    chunks: str
    chunk_size: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class SeedTask:
    """Prepare a repair: a new ingest with the chunks of a quarantined blob that are still right."""

    key: str
    source: str
    size: int
    chunks: str
    chunk_size: int


@dataclass(frozen=True, slots=True)
class WeightsTask:
    """Parse the safetensors headers and indexes of an entry. `files` is path → (blob path, size)."""

    files: dict[str, tuple[str, int]]


Task = FetchTask | AdoptTask | CheckTask | SeedTask | WeightsTask
_TASKS: dict[str, type[FetchTask] | type[AdoptTask] | type[CheckTask] | type[SeedTask] | type[WeightsTask]] = {
    cls.__name__: cls for cls in (FetchTask, AdoptTask, CheckTask, SeedTask, WeightsTask)
}


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def task_to_dict(task: Task) -> dict[str, Any]:
    """A task as plain data."""
    return {"task": type(task).__name__, "args": asdict(task)}


def task_from_dict(raw: dict[str, Any]) -> Task:
    """The inverse of `task_to_dict`."""
    args = raw["args"]
    if raw["task"] == "WeightsTask":
        args = {"files": {path: (blob, size) for path, (blob, size) in args["files"].items()}}
    return _TASKS[raw["task"]](**args)


def error_to_dict(error: NvcacheError) -> dict[str, Any]:
    """An error as plain data; its text holds no secret by the rules of `errors`."""
    return {
        "class": type(error).__name__,
        "code": error.code,
        "message": str(error),
        "hint": error.hint,
        "retryable": error.retryable,
        "retry_after_s": error.retry_after_s,
        "facts": error.facts,
    }


def error_from_dict(raw: dict[str, Any]) -> NvcacheError:
    """The inverse of `error_to_dict`."""
    return _CLASSES.get(raw["class"], NvcacheError)(
        Code(raw["code"]),
        raw["message"],
        hint=raw["hint"],
        retryable=raw["retryable"],
        retry_after_s=raw["retry_after_s"],
        facts=raw["facts"],
    )
