"""The plan of a fill: what an entry needs, pinned, written before the first byte and resumed at start. It decides nothing about space or order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import LeftOut, Selection
from nvcache.core.names import check_names
from nvcache.core.records import commit, count, flag, moment, reading, record, text, texts
from nvcache.core.ref import EntryId, Ref, parse_pinned

FORMAT = 1


class Priority(IntEnum):
    """Who waits: a pod before what is declared before what is merely mended before what is only read to see whether it is still right."""

    DEMAND = 0
    DECLARED = 1
    REPAIR = 2
    SCRUB = 3


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the source lists it.

    `token` names exactly these bytes at the source (Hub: the LFS SHA-256 or the git blob id; directory: place, inode and times; blobs: place, version
    and ETag), never the commit, so that two revisions share one ingest. `digest` is what the source publishes of the content, or None.
    """

    path: str
    size: int
    token: str
    digest: Digest | None = None
    xet: str | None = None  # Xet hash, where the source stores the file so

    @property
    def identified(self) -> bool:
        """Whether the digest names the content wherever it is; an MD5 does not."""
        return self.digest is not None and self.digest.algorithm is not Algorithm.MD5

    @property
    def sha256(self) -> str | None:
        """The content's SHA-256 where the source publishes it: enough to find the blob without fetching."""
        return self.digest.hex if self.digest and self.digest.algorithm is Algorithm.SHA256 else None

    def to_list(self) -> list[object]:
        """As it stands in a plan."""
        return [self.path, self.size, self.token, str(self.digest) if self.digest else None, self.xet]

    @classmethod
    def from_list(cls, raw: Sequence[object]) -> RemoteFile:
        """The inverse of `to_list`. Raises TypeError, ValueError."""
        path, size, token, digest, xet = raw
        return cls(
            path=text(path),
            size=count(size),
            token=text(token),
            digest=None if digest is None else Digest.parse(text(digest)),
            xet=None if xet is None else text(xet),
        )


@dataclass(frozen=True, slots=True)
class FillPlan:
    """What is to be fetched for one entry. `ref` carries the pinned revision, `names` the moving names (branches) that were resolved to it."""

    ref: Ref
    asked: str
    endpoint: str
    files: tuple[RemoteFile, ...]
    selection: Selection = field(default_factory=Selection)
    left_out: tuple[LeftOut, ...] = ()
    names: tuple[str, ...] = ()
    alias: str | None = None
    commit: str | None = None  # of the Hub, where a mirror says which one it is a copy of
    pin: bool = False
    priority: Priority = Priority.DEMAND
    resolved_at: float = 0.0  # unix seconds: which of two fills may take a moving name

    @property
    def id(self) -> EntryId:
        """The entry being made."""
        return EntryId(self.ref.slug, self.ref.revision or "")

    @property
    def size(self) -> int:
        """The sum of the files' sizes in bytes."""
        return sum(file.size for file in self.files)

    def with_priority(self, priority: Priority) -> FillPlan:
        """The same plan, more or less urgent."""
        return replace(self, priority=priority)

    def to_json(self) -> bytes:
        """The plan as it stands on disk."""
        return json.dumps(
            {
                "format": FORMAT,
                "ref": str(self.ref),
                "asked": self.asked,
                "endpoint": self.endpoint,
                "selection": self.selection.to_dict(),
                "left_out": [[f.path, f.size] for f in self.left_out],
                "names": self.names,
                "alias": self.alias,
                "commit": self.commit,
                "pin": self.pin,
                "priority": int(self.priority),
                "resolved_at": self.resolved_at,
                "files": [f.to_list() for f in self.files],
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> FillPlan:
        """Read a plan back. Raises `IntegrityError` (degraded) when it is torn or unsafe."""
        with reading("fill plan"):
            raw = record(data, FORMAT)
            plan = cls(
                ref=parse_pinned(raw["ref"]),
                asked=text(raw["asked"]),
                endpoint=text(raw["endpoint"]),
                selection=Selection.from_dict(raw["selection"]),
                left_out=tuple(LeftOut(text(path), count(size)) for path, size in raw["left_out"]),
                names=texts(raw["names"]),
                alias=None if raw["alias"] is None else text(raw["alias"]),
                commit=commit(raw.get("commit")),  # older plans have none
                pin=flag(raw["pin"]),
                priority=Priority(raw["priority"]),
                resolved_at=moment(raw["resolved_at"]),
                files=tuple(RemoteFile.from_list(file) for file in raw["files"]),
            )
            check_names(file.path for file in plan.files)
        return plan
