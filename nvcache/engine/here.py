"""Finds which files of a plan are on the node already, and who vouches for them. It fetches nothing and reads no blob."""

from __future__ import annotations

from dataclasses import dataclass

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import Check, File
from nvcache.core.plan import FillPlan, RemoteFile
from nvcache.core.ref import Ref, Scheme
from nvcache.engine.context import Context
from nvcache.store.ingest import ingest_key, ingest_keys
from nvcache.store.receipts import read_receipt


@dataclass(frozen=True, slots=True)
class Here:
    """What of a plan is already on the node, and what is missing (ingest key → file)."""

    files: dict[str, File]  # path → finished file
    adopt: dict[str, list[RemoteFile]]  # SHA-256 of a blob that is here, but in no manifest that vouches for it → its files
    missing: dict[str, RemoteFile]
    keys: frozenset[str]  # of all files of the plan

    @property
    def needs(self) -> dict[str, int]:
        """Ingest key → bytes to reserve."""
        return {key: file.size for key, file in self.missing.items()}

    @property
    def blobs(self) -> set[str]:
        """The SHA-256 of what is here and counted on."""
        return {file.sha256 for file in self.files.values()} | self.adopt.keys()


class Finder:
    """Looks files up on the shelf, among receipts and among blobs. Its methods but `vouch` block, for a thread."""

    def __init__(self, context: Context) -> None:
        self._do = context
        self._made: set[str] = set()  # ingest keys whose blobs were proven in this daemon's life

    def vouch(self, key: str) -> None:
        """The blob of that ingest key was proven just now."""
        self._made.add(key)

    def here(self, plan: FillPlan) -> Here:
        """Look each file of the plan up: by published digest, by an earlier try's receipt, by blob."""
        found = Here({}, {}, {}, frozenset(ingest_keys(plan.files)))
        for file in plan.files:
            done = self.finished(plan.ref, file)
            if done is not None:
                found.files[file.path] = done
            elif (sha256 := self._lying_here(file)) is not None:
                found.adopt.setdefault(sha256, []).append(file)
            else:
                found.missing.setdefault(ingest_key(file.token, file.size), file)
        return found

    def finished(self, ref: Ref, file: RemoteFile) -> File | None:
        """The file, where an entry or a fill of this daemon's life vouches for its blob."""
        known = self._do.shelf.known(file)
        if known is not None and known.size == file.size and self._do.blobs.has(known.sha256, known.size):
            return as_file(ref, file, known.sha256, known.chunks)
        key = ingest_key(file.token, file.size)
        done = read_receipt(self._do.layout, key) if key in self._made else None
        if done is not None and file.sha256 in (None, done.sha256) and self._do.blobs.has(done.sha256, file.size):
            return as_file(ref, file, done.sha256, done.chunks)
        return None

    def _lying_here(self, file: RemoteFile) -> str | None:
        """The SHA-256 of a blob that should be the file's, but has to be read first: nobody has vouched for it since the daemon started."""
        sha256 = file.sha256
        if sha256 is None and (done := read_receipt(self._do.layout, ingest_key(file.token, file.size))) is not None:
            sha256 = done.sha256
        return sha256 if sha256 is not None and self._do.blobs.has(sha256, file.size) else None


def as_file(ref: Ref, file: RemoteFile, sha256: str, chunks: bytes) -> File:
    """What a manifest says of a file whose content is proven."""
    return File(file.path, file.size, sha256, _check(ref.scheme, file.digest), file.digest, chunks, None if file.identified else file.token)


def _check(scheme: Scheme, digest: Digest | None) -> Check:
    if digest is None:
        return Check.FIRST_USE
    match digest.algorithm:
        case Algorithm.GIT_SHA1:
            return Check.GIT_SHA1
        case Algorithm.MD5:
            return Check.CONTENT_MD5
        case Algorithm.SHA256:
            return Check.LFS_SHA256 if scheme is Scheme.HF else Check.MANIFEST_SHA256
