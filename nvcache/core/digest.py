"""Digests: parse, compare, print. It computes none from files; workers and the scrubber do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from nvcache.errors import Code, RequestError


class Algorithm(StrEnum):
    """What a source publishes of a file."""

    SHA256 = "sha256"
    GIT_SHA1 = "git-sha1"  # git's blob id: sha1 of `blob <size>\0` + content
    MD5 = "md5"


HEX_LENGTH = {Algorithm.SHA256: 64, Algorithm.GIT_SHA1: 40, Algorithm.MD5: 32}
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """One digest: an algorithm and its value in lower-case hex.

    Raises `RequestError` (bad-request) when the value has not the algorithm's length or is not hex.
    """

    algorithm: Algorithm
    hex: str

    def __post_init__(self) -> None:
        if len(self.hex) != HEX_LENGTH[self.algorithm] or not _HEX.fullmatch(self.hex):
            raise RequestError(
                Code.BAD_REQUEST, f"cannot read {self.algorithm} digest {self.hex[:80]!r}: not {HEX_LENGTH[self.algorithm]} hex digits"
            )

    @classmethod
    def parse(cls, text: str) -> Digest:
        """`sha256:<hex>` → Digest; upper-case hex is accepted and folded."""
        algorithm, colon, value = text.partition(":")
        if not colon or algorithm not in Algorithm.__members__.values():
            raise RequestError(Code.BAD_REQUEST, f"cannot read digest {text[:80]!r}: not <algorithm>:<hex>")
        return cls(Algorithm(algorithm), value.lower())

    @property
    def short(self) -> str:
        """The first twelve digits, for people."""
        return self.hex[:12]

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def git_blob_header(size: int) -> bytes:
    """What git hashes before a blob's content (git-hash-object's documented object format)."""
    return b"blob %d\0" % size
