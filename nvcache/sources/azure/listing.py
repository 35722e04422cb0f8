"""From blobs to the files of a model: what counts, as of when, at which revision, with which digests. Pure: it asks nobody.

A file's token is `az|<place>|<version>|<ETag>`: the first half of the SHA-256 of the blob's URL, "" or `versionid=…` or `snapshot=…` as a query has
it, and the ETag without quotes. A blob that cannot be read before it is brought back from the archive has another first word.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.plan import RemoteFile
from nvcache.core.published import MANIFEST, SUMS, Published
from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources.azure.place import Place

MAX_FILES = 100_000
_ETAG = re.compile(r"[\x21\x23-\x7e]+")  # RFC 9110 §8.8.3, without the quotes and what is not ASCII
_WORDS = {"": "az", "archive": "az-archive"}  # any other archive status: on its way back
_REHYDRATING = "az-rehydrating"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blob:
    """One blob, version or snapshot as it is listed. Times as Azure writes ids: RFC 3339 in UTC with seven decimals."""

    name: str
    size: int
    etag: str
    modified: str
    version: str | None = None
    snapshot: str | None = None
    archived: str = ""  # "archive", or Azure's archive status while it is brought back
    metadata: Mapping[str, str] = field(default_factory=dict)
    md5: bytes = b""
    deleted: bool = False

    @property
    def since(self) -> str:
        """When it came to be what it is. Azure names versions and snapshots by that time."""
        return self.snapshot or self.version or self.modified

    @property
    def query(self) -> str:
        """What a URL needs to mean this version or snapshot."""
        if self.snapshot:
            return f"snapshot={self.snapshot}"
        return f"versionid={self.version}" if self.version else ""

    @property
    def folder(self) -> bool:
        """Whether it only stands for a folder, as accounts with a hierarchical namespace and some tools make them."""
        return any(key.lower() == "hdi_isfolder" for key in self.metadata) or (self.size == 0 and self.name.endswith("/"))


@dataclass(frozen=True, slots=True)
class Token:
    """A file's token taken apart."""

    word: str
    version: str
    etag: str

    @classmethod
    def of(cls, file: RemoteFile) -> Token:
        """Raises ValueError for a token of another kind of source."""
        word, _, version, etag = file.token.split("|", 3)
        return cls(word, version, etag)

    @property
    def archived(self) -> bool:
        """Whether it was in the archive when it was listed."""
        return self.word != _WORDS[""]

    @property
    def returning(self) -> bool:
        """Whether it was being brought back then."""
        return self.word == _REHYDRATING


def stamp(moment: datetime) -> str:
    """A time as Azure writes ids."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f0Z")


def padded(text: str) -> str:
    """A time of a reference with all seven decimals, so that text order is time order."""
    whole, _, part = text.removesuffix("Z").partition(".")
    return f"{whole}.{part:0<7}Z"


def as_of(blobs: Iterable[Blob], text: str, doing: str) -> list[Blob]:
    """Of each name what was current at `text`: version, snapshot or the blob itself. With seven decimals it is an id, which one of them must have.

    Azure does not tell when a blob was deleted: one whose versions were kept is found at every time after it was written.
    Raises `SourceError` (revision-not-found).
    """
    moment, states = padded(text), dict[str, list[Blob]]()
    for blob in blobs:
        states.setdefault(blob.name, []).append(blob)
    chosen = [found for found in (_current_at(moment, known) for known in states.values()) if found is not None]
    moments = sorted(blob.since for known in states.values() for blob in known)
    if not chosen:
        why = f"the oldest blob there is of {moments[0]}" if moments else "there are no blobs"
        raise SourceError(Code.REVISION_NOT_FOUND, f"cannot {doing}: {why}", hint="name a later time, or leave it out")
    if text == moment and not any(blob.since == moment and blob.query for blob in chosen):
        why = f"no version or snapshot has that id; the newest blob before it is of {max(since for since in moments if since <= moment)}"
        raise SourceError(Code.REVISION_NOT_FOUND, f"cannot {doing}: {why}", hint="list them: az storage blob list --include vs --prefix …")
    return chosen


def _current_at(moment: str, known: list[Blob]) -> Blob | None:
    """Of the states of one blob the one that was current. What is now is known to the second only, but it is newer than any snapshot unlike it."""
    kept = max((blob for blob in known if blob.query and blob.since <= moment), key=lambda blob: blob.since, default=None)
    for now in (blob for blob in known if not blob.query):
        after = max((blob.since for blob in known if blob.query and blob.etag != now.etag), default="")
        if now.modified <= moment and after < moment and (kept is None or kept.etag != now.etag):
            return now
    return kept


@dataclass(frozen=True, slots=True)
class Listing:
    """The blobs below a prefix: those of the model by path, and those that describe it. `revision` covers both."""

    files: Mapping[str, Blob]
    manifest: Blob | None
    sums: Blob | None
    revision: str

    @classmethod
    def of(cls, blobs: Iterable[Blob], prefix: str, doing: str) -> Listing:
        """Raises `IntegrityError` (listing-conflict), `SourceError` (source-protocol: too many files, or no ETag)."""
        found: dict[str, Blob] = {}
        for blob in blobs:
            path = blob.name.removeprefix(prefix)
            if not path or blob.folder or blob.deleted:
                continue
            if found.setdefault(path, blob) != blob:
                raise IntegrityError(Code.LISTING_CONFLICT, f"cannot {doing}: {path!r} is listed twice, with different content")
            if not _ETAG.fullmatch(blob.etag):
                raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {path!r} is listed without an ETag that can be sent", retryable=False)
            if len(found) > MAX_FILES:
                raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: it has more than {MAX_FILES:,} files", retryable=False)
        ordered = {path: found[path] for path in sorted(found)}
        digest = hashlib.sha256()
        for path, blob in ordered.items():
            digest.update(f"{path}\0{blob.size}\0{blob.query}|{blob.etag}\0".encode("utf-8", "surrogateescape"))
        manifest, sums = ordered.pop(MANIFEST, None), ordered.pop(SUMS, None)
        return cls(ordered, manifest, sums, digest.hexdigest())


def commit_of(listing: Listing, published: Published | None) -> str | None:
    """The Hub's commit that the files are an exact copy of, if the manifest says so of each."""
    if published is None or published.files.keys() - {MANIFEST, SUMS} != listing.files.keys():
        return None
    return published.commit


def remote_files(place: Place, listing: Listing, published: Published | None, sums: Mapping[str, Digest], doing: str) -> tuple[RemoteFile, ...]:
    """The files with the best digest that is published of each.

    Raises `SourceError` (file-not-found) when the manifest or SHA256SUMS names a file that is not there, `IntegrityError` (listing-conflict) when
    the manifest knows another size.
    """
    known = published.files if published else {}
    for beside, named in ((MANIFEST, known.keys()), (SUMS, sums.keys())):
        missing = sorted(named - listing.files.keys() - {MANIFEST, SUMS})
        if missing:
            hint = f"upload it, or correct {beside}"
            raise SourceError(Code.FILE_NOT_FOUND, f"cannot {doing}: {beside} names {missing[0]!r:.200}, which is not there", hint=hint)
    for path, blob in listing.files.items():
        if path in known and known[path][0] != blob.size:
            why = f"{path!r} has {blob.size:,} bytes, and {known[path][0]:,} by {MANIFEST}"
            raise IntegrityError(Code.LISTING_CONFLICT, f"cannot {doing}: {why}")
    return tuple(_file(place, path, blob, known, sums) for path, blob in listing.files.items())


def _file(place: Place, path: str, blob: Blob, known: Mapping[str, tuple[int, str]], sums: Mapping[str, Digest]) -> RemoteFile:
    where = hashlib.sha256(place.url(path).encode()).hexdigest()[:32]
    token = f"{_WORDS.get(blob.archived, _REHYDRATING)}|{where}|{blob.query}|{blob.etag}"
    digest = Digest(Algorithm.SHA256, known[path][1]) if path in known else sums.get(path)
    return RemoteFile(path, blob.size, token, digest or metadata_sha256(blob) or content_md5(blob))


def metadata_sha256(blob: Blob) -> Digest | None:
    """What the blob's metadata says under `sha256` (names of metadata have no case): 64 hex digits or base64; anything else is passed over."""
    values = [value.strip() for key, value in blob.metadata.items() if key.lower() == "sha256"]
    digests = {_sha256(value) for value in values}
    if len(digests) > 1 or None in digests:
        _log.warning("the metadata of %s say sha256=%.80r, which is no SHA-256: passed over", blob.name, " ".join(values))
        return None
    return Digest(Algorithm.SHA256, digests.pop() or "") if digests else None


def content_md5(blob: Blob) -> Digest | None:
    """The blob's Content-MD5. Azure sets it for what came in one request only; for others the uploader may have."""
    return Digest(Algorithm.MD5, blob.md5.hex()) if len(blob.md5) == 16 else None


def _sha256(value: str) -> str | None:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value.lower()
    try:
        raw = base64.b64decode(value, validate=True)
    except ValueError:
        return None
    return raw.hex() if len(raw) == 32 else None


def some(names: Sequence[str], most: int) -> str:
    """The first names, for a message."""
    shown = ", ".join(repr(name[:60]) for name in names[:most])
    return f"{shown} and more" if len(names) > most else shown
