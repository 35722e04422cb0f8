"""The plan of a fill: what an entry needs, pinned, written before the first byte and resumed at start. It decides nothing about space or order."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import LeftOut, Selection
from nvcache.core.names import check_names
from nvcache.core.ref import EntryId, Ref, parse_ref
from nvcache.errors import Code, IntegrityError

FORMAT = 1


class Priority(IntEnum):
    """Who waits: a pod before what is declared before what is merely mended."""

    DEMAND = 0
    DECLARED = 1
    REPAIR = 2


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the source lists it.

    `token` names exactly these bytes at the source (Hub: the LFS SHA-256 or the git blob id; directory: mtime and inode), never the commit,
    so that two revisions share one ingest. `digest` is what the source publishes of the content, or None.
    """

    path: str
    size: int
    token: str
    digest: Digest | None = None
    xet: str | None = None  # Xet hash, where the source stores the file so

    @property
    def sha256(self) -> str | None:
        """The content's SHA-256 where the source publishes it: enough to find the blob without fetching."""
        return self.digest.hex if self.digest and self.digest.algorithm is Algorithm.SHA256 else None


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
    pin: bool = False
    priority: Priority = Priority.DEMAND

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
                "selection": {"include": self.selection.include, "exclude": self.selection.exclude},
                "left_out": [[f.path, f.size] for f in self.left_out],
                "names": self.names,
                "alias": self.alias,
                "pin": self.pin,
                "priority": int(self.priority),
                "files": [[f.path, f.size, f.token, str(f.digest) if f.digest else None, f.xet] for f in self.files],
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> FillPlan:
        """Read a plan back. Raises `IntegrityError` (degraded) when it is torn or unsafe."""
        try:
            raw: dict[str, Any] = json.loads(data)
            if raw["format"] != FORMAT:
                raise IntegrityError(Code.DEGRADED, f"cannot read fill plan: its format is {raw['format']!r}, this version knows {FORMAT}")
            plan = cls(
                ref=parse_ref(raw["ref"]),
                asked=raw["asked"],
                endpoint=raw["endpoint"],
                selection=Selection(tuple(raw["selection"]["include"]), tuple(raw["selection"]["exclude"])),
                left_out=tuple(LeftOut(path, size) for path, size in raw["left_out"]),
                names=tuple(raw["names"]),
                alias=raw["alias"],
                pin=raw["pin"],
                priority=Priority(raw["priority"]),
                files=tuple(RemoteFile(p, s, t, Digest.parse(d) if d else None, x) for p, s, t, d, x in raw["files"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(Code.DEGRADED, f"cannot read fill plan: {error}") from error
        check_names(file.path for file in plan.files)
        return plan
