"""The manifest of an entry: which files it has, their sizes, digests and chunk digests, and how each was proven. It reads and writes no file.

A manifest is immutable JSON, written last: an entry is ready iff its manifest and all its blobs are there (docs/design.md).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from nvcache.core.digest import Digest
from nvcache.core.names import check_names
from nvcache.core.records import commit, count, flag, reading, record, sha256, text, texts
from nvcache.core.ref import EntryId, Ref, parse_pinned

FORMAT = 1
CHUNK = 16 * 2**20  # bytes a chunk digest covers, and one range request asks for
DIGEST_BYTES = 8  # XXH3-64, little endian


class Check(StrEnum):
    """What a file's bytes were compared with before they were served."""

    LFS_SHA256 = "lfs-sha256"
    GIT_SHA1 = "git-sha1"
    CONTENT_MD5 = "content-md5"
    MANIFEST_SHA256 = "manifest-sha256"
    FIRST_USE = "first-use"  # the source publishes nothing


@dataclass(frozen=True, slots=True)
class Selection:
    """The include/exclude patterns of a request; both empty is the default file set (`core.selection`)."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, tuple[str, ...]]:
        """As it stands in manifests and plans."""
        return {"include": self.include, "exclude": self.exclude}

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Selection:
        """The inverse of `to_dict`. Raises TypeError, KeyError."""
        return cls(texts(raw["include"]), texts(raw["exclude"]))


@dataclass(frozen=True, slots=True)
class File:
    """One verified file: path inside the repository, size in bytes, SHA-256 in hex, and one XXH3-64 per `CHUNK` bytes, packed."""

    path: str
    size: int
    sha256: str
    check: Check
    source: Digest | None = None  # what the source published, where it did
    chunks: bytes = b""
    token: str | None = None  # the source's name for exactly these bytes, where no digest of theirs is one (`core.plan.RemoteFile`)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], chunk_size: int) -> File:
        """One file of a manifest whose chunks have `chunk_size` bytes. Raises TypeError, ValueError, KeyError."""
        file = cls(
            path=text(raw["path"]),
            size=count(raw["size"]),
            sha256=sha256(raw["sha256"]),
            check=Check(raw["check"]),
            source=None if raw["source"] is None else Digest.parse(text(raw["source"])),
            chunks=base64.b64decode(text(raw["chunks"]), validate=True),
            token=None if raw.get("token") is None else text(raw["token"]),
        )
        if len(file.chunks) != chunk_count(file.size, chunk_size) * DIGEST_BYTES:
            raise ValueError(f"{file.path!r} has not one digest for each chunk")
        return file

    def chunk_digest(self, index: int) -> int:
        """The XXH3-64 of chunk `index`."""
        return int.from_bytes(self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES], "little")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file of the repository that the selection does not take."""

    path: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """Everything the store knows of one ready entry. `asked` and `ref` are canonical references, `endpoint` has no credentials."""

    ref: Ref  # with the resolved revision
    asked: str
    endpoint: str
    files: tuple[File, ...]
    verified_at: str  # RFC 3339, UTC
    version: str
    selection: Selection = field(default_factory=Selection)
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()
    parsed: bool = True
    chunk_size: int = CHUNK
    commit: str | None = None  # the Hub's, where a mirror of a Hub model says so: the entry's name in a HuggingFace view

    @cached_property
    def id(self) -> EntryId:
        """The entry this manifest makes ready."""
        return EntryId(self.ref.slug, self.ref.revision or "")

    @cached_property
    def by_path(self) -> dict[str, File]:
        """Files by their path."""
        return {file.path: file for file in self.files}

    @cached_property
    def blobs(self) -> dict[str, int]:
        """SHA-256 → size of every distinct blob."""
        return {file.sha256: file.size for file in self.files}

    @cached_property
    def unproven(self) -> int:
        """How many files were accepted without a digest of their source."""
        return sum(file.check is Check.FIRST_USE for file in self.files)

    @property
    def size(self) -> int:
        """The sum of the files' sizes in bytes; equal files count each time, as a pod sees them."""
        return sum(file.size for file in self.files)

    def to_json(self) -> bytes:
        """The manifest as it stands on disk."""
        return json.dumps(
            {
                "format": FORMAT,
                "ref": str(self.ref),
                "commit": self.commit,
                "asked": self.asked,
                "endpoint": self.endpoint,
                "selection": self.selection.to_dict(),
                "parsed": self.parsed,
                "chunk_size": self.chunk_size,
                "total_size": self.size,
                "verified_at": self.verified_at,
                "nvcache": self.version,
                "warnings": self.warnings,
                "left_out": [[f.path, f.size] for f in self.left_out],
                "files": [
                    {
                        "path": f.path,
                        "size": f.size,
                        "sha256": f.sha256,
                        "check": f.check,
                        "source": str(f.source) if f.source else None,
                        "chunks": base64.b64encode(f.chunks).decode(),
                        **({"token": f.token} if f.token else {}),
                    }
                    for f in self.files
                ],
            },
            indent=1,
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest back. Raises `IntegrityError` (degraded) when it is torn, of another format or holds an unsafe name or digest."""
        with reading("manifest"):
            raw = record(data, FORMAT)
            chunk_size = count(raw["chunk_size"])
            manifest = cls(
                ref=parse_pinned(raw["ref"]),
                asked=text(raw["asked"]),
                endpoint=text(raw["endpoint"]),
                selection=Selection.from_dict(raw["selection"]),
                parsed=flag(raw["parsed"]),
                chunk_size=chunk_size,
                verified_at=text(raw["verified_at"]),
                version=text(raw["nvcache"]),
                commit=commit(raw.get("commit")),  # older manifests have none
                warnings=texts(raw["warnings"]),
                left_out=tuple(LeftOut(text(path), count(size)) for path, size in raw["left_out"]),
                files=tuple(File.from_dict(file, chunk_size) for file in raw["files"]),
            )
            check_names(file.path for file in manifest.files)
        return manifest


def chunk_count(size: int, chunk: int = CHUNK) -> int:
    """How many chunks a file of `size` bytes has; an empty file has none. Raises ValueError unless `chunk` is at least 1."""
    if chunk < 1:
        raise ValueError(f"{chunk} is no chunk size")
    return -(-size // chunk)
