"""Digests that a publisher puts beside the weights: `SHA256SUMS`, and the manifest that `nvcache mirror` writes. It reads and writes no file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.records import commit, count, sha256, text
from nvcache.errors import RequestError

SUMS = "SHA256SUMS"
MANIFEST = "nvcache-manifest.json"
LIMIT = 64 * 2**20  # bytes of either file
_UNFINISHED = "unfinished"
_SUM_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")


class UnfinishedError(ValueError):
    """The manifest says that a copy is being made, or was broken off: what lies beside it may be of two commits. `model` is being copied."""

    def __init__(self, model: str) -> None:
        super().__init__("the copy beside it is not finished")
        self.model = model


@dataclass(frozen=True, slots=True)
class Published:
    """What a `nvcache-manifest.json` says: which model (`hf://org/name`) and commit it is a copy of, and each file's size and SHA-256."""

    model: str
    commit: str | None
    files: Mapping[str, tuple[int, str]]

    def to_json(self) -> bytes:
        """As it stands beside the weights. The same copy is always the same bytes."""
        files = [{"path": path, "size": size, "sha256": sha256} for path, (size, sha256) in sorted(self.files.items())]
        return json.dumps({"nvcache_manifest": 1, "model": self.model, "commit": self.commit, "files": files}, indent=1).encode() + b"\n"

    def unfinished_json(self) -> bytes:
        """What stands in its place until all files are there."""
        return json.dumps({"nvcache_manifest": _UNFINISHED, "model": self.model, "commit": self.commit}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Published:
        """Read one. Raises `UnfinishedError`, or ValueError that says what is wrong; it comes from somebody else."""
        try:
            raw = json.loads(data)
            if raw["nvcache_manifest"] == _UNFINISHED:
                raise UnfinishedError(_name(raw["model"]))
            if raw["nvcache_manifest"] != 1:
                raise ValueError(f"its format {raw['nvcache_manifest']!r:.20} is not 1")
            files: dict[str, tuple[int, str]] = {}
            for file in raw["files"]:
                if files.setdefault(text(file["path"]), found := (count(file["size"]), sha256(file["sha256"]))) != found:
                    raise ValueError(f"it names {file['path']!r:.80} twice")
            return cls(_name(raw["model"]), commit(raw.get("commit")), files)
        except (TypeError, KeyError, RecursionError, RequestError) as error:
            raise ValueError(f"it is not of the form that `nvcache mirror` writes ({type(error).__name__}: {error!s:.80})") from None


def _name(value: object) -> str:
    """What may stand in a message as it is."""
    name = text(value)
    if len(name) > 300 or not name.isprintable():
        raise ValueError("its model is no name")
    return name


def parse_sums(data: bytes) -> dict[str, Digest]:
    """The digests in a `SHA256SUMS`, by path (coreutils manual, "cksum output modes"). Raises ValueError naming the line that cannot be read."""
    sums: dict[str, Digest] = {}
    for number, line in enumerate(data.decode("utf-8", "surrogateescape").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        parts = _SUM_LINE.fullmatch(line)
        if parts is None or parts[1]:  # a leading backslash: an escaped name, which is refused as hostile anyway
            raise ValueError(f"line {number} of {SUMS} is not '<64 hex digits>  <path>'")
        path, digest = parts[3].removeprefix("./"), Digest(Algorithm.SHA256, parts[2].lower())
        if sums.setdefault(path, digest) != digest:
            raise ValueError(f"line {number} of {SUMS} names {path!r:.80} again, with another digest")
    return sums
