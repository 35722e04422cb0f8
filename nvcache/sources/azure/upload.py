"""Writes blobs below a prefix by Azure's SDK: blocks are staged one by one, then committed under conditions. It hashes no file and plans nothing.

A block is sent with its MD5, which the service compares with what arrives. A blob is committed only over the one that was seen, or over none: what
somebody else wrote meanwhile is told and kept. Requests are tried again as the service asks, within the transport's deadline.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from azure.core import MatchConditions
from azure.storage.blob import BlobBlock, BlobClient, ContentSettings

from nvcache.core.digest import Algorithm
from nvcache.core.mirror import METADATA, Beside, Standing
from nvcache.core.plan import RemoteFile
from nvcache.core.published import LIMIT, MANIFEST, Published, UnfinishedError
from nvcache.core.ref import Ref
from nvcache.core.retry import backoff
from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.client import Container, blob_of, container_client
from nvcache.sources.azure.identity import Identity
from nvcache.sources.azure.listing import Blob, Listing, metadata_sha256, remote_files
from nvcache.sources.azure.place import Place
from nvcache.sources.azure_answers import Kind
from nvcache.sources.http import Target, Transport
from nvcache.sources.ranges import Throttle

log = logging.getLogger(__name__)
FRESH_S = 120.0  # how long a client is used: its token is good for some minutes more when it is made
TRIES = 3  # of what a fresh credential, or sending again, may mend
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """What a blob is to be: its size, the MD5 of its content, its metadata (with `sha256`) and its content type."""

    size: int
    md5: bytes = field(repr=False)
    metadata: dict[str, str]
    kind: str


@dataclass(frozen=True, slots=True)
class Way:
    """How to reach the destination: shared by all writers of a run. `stopped` ends every wait and every sending."""

    ref: Ref
    access: Callable[[], Access]
    transport: Transport
    identity: Identity
    throttle: Throttle
    stopped: threading.Event = field(default_factory=threading.Event)


class Writer:
    """A context manager, for one thread. Every call raises `SourceError`, or `Interrupted` once the way is `stopped`."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._made_at = 0.0
        self._origin = ""
        self._client: Container | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._renew()

    @property
    def place(self) -> Place:
        """Where it writes."""
        return self._container().place

    @property
    def credential(self) -> Kind:
        """What it is authorised by."""
        return self._container().kind

    def standing(self) -> tuple[dict[str, Standing], Beside]:
        """What is below the prefix, by path, and the manifest there. It fails soon: at the first look a mistyped name is likelier than an outage."""
        listing = self._listing()
        return {path: _standing(blob) for path, blob in listing.files.items()}, self._beside(listing.manifest)

    def files(self) -> dict[str, RemoteFile]:
        """What is below the prefix as a source has it, by path, with the SHA-256 of its metadata; the manifest is passed over."""
        doing = f"list {self._way.ref}"
        return {file.path: file for file in remote_files(self.place, self._again(doing, self._listing), None, {}, doing)}

    def staged(self, path: str) -> frozenset[str]:
        """The ids of the blocks that were sent for a blob and not committed."""
        try:
            _, blocks = self._ask(f"look at {path}", path, lambda client: client.get_block_list("uncommitted"))
        except SourceError as error:
            if error.code is not Code.FILE_NOT_FOUND:
                raise
            return frozenset()
        return frozenset(block.id for block in blocks)

    def stage(self, path: str, block: str, view: memoryview) -> None:
        """Send one block."""
        md5 = bytearray(hashlib.md5(view, usedforsecurity=False).digest())

        def call(client: BlobClient) -> None:
            with _Body(view, self._way) as body:
                client.stage_block(block, body, length=len(view), transactional_content_md5=md5)  # type: ignore[arg-type]  # it has what is used of IO

        self._ask(f"send {path}", path, call)

    def commit(self, path: str, blocks: Sequence[str], written: Written, seen: str | None) -> str:
        """Make the blocks the blob, over the one with the ETag `seen`, or where there is none; returns its ETag.

        Raises `SourceError` (source-changed) if another blob is there now. One with the same SHA-256 is as good: the answer to an earlier try may
        have been lost, or another copy of the same model was quicker.
        """
        settings = ContentSettings(content_type=written.kind, content_md5=bytearray(written.md5))
        held = _condition(seen)

        def call(client: BlobClient) -> str:
            answer = client.commit_block_list([BlobBlock(block) for block in blocks], settings, written.metadata, **held)
            return str(answer["etag"]).strip('"')

        try:
            return self._ask(f"write {path}", path, call)
        except SourceError as error:
            if error.code is not Code.SOURCE_CHANGED:
                raise
            there = self._look(path)
            if there is not None and there.size == written.size and there.sha256 == written.metadata[METADATA[Algorithm.SHA256]]:
                return there.etag
            hint = "see who else writes there; then run the command again, which looks at everything anew"
            raise SourceError(Code.SOURCE_CHANGED, str(error), hint=hint) from error

    def put(self, path: str, content: bytes, seen: str | None) -> str:
        """Write a small blob in one block, on the same conditions."""
        sha256 = hashlib.sha256(content).hexdigest()
        md5 = hashlib.md5(content, usedforsecurity=False).digest()
        self.stage(path, sha256[:48], memoryview(content))
        metadata = {METADATA[Algorithm.SHA256]: sha256}
        return self.commit(path, [sha256[:48]], Written(len(content), md5, metadata, "application/json"), seen)

    def disown(self, path: str, seen: str) -> None:
        """Take a blob's metadata away: nobody is to take it for what they say."""
        self._ask(f"mark {path}", path, lambda client: client.set_blob_metadata({}, **_condition(seen)))

    def _listing(self) -> Listing:
        doing, container = f"list {self._way.ref}", self._container()
        return Listing.of(container.blobs(doing, container.place.prefix, "metadata"), container.place.prefix, doing)

    def _look(self, path: str) -> Standing | None:
        try:
            return self._ask(f"look at {path}", path, lambda client: _standing(blob_of(client.get_blob_properties())))
        except SourceError as error:
            if error.code is not Code.FILE_NOT_FOUND:
                raise
            return None

    def _beside(self, blob: Blob | None) -> Beside:
        if blob is None:
            return Beside()
        if blob.size > LIMIT:
            return Beside(blob.etag)
        try:
            found = Published.from_json(self._container().read(f"read {MANIFEST} of {self._way.ref}", blob))
        except UnfinishedError as error:
            return Beside(blob.etag, model=error.model)
        except ValueError as error:
            log.warning("%s at %s says nothing that can be read: %s", MANIFEST, self._way.ref, error)
            return Beside(blob.etag)
        return Beside(blob.etag, found, found.model)

    def _ask(self, doing: str, path: str, call: Callable[[BlobClient], T]) -> T:
        def once() -> T:
            container = self._container()
            client = container.client.get_blob_client(container.place.prefix + path)
            return container.ask(f"{doing} at {self._way.ref}", lambda: call(client), tries=1)

        return self._again(doing, once)

    def _again(self, doing: str, once: Callable[[], T]) -> T:
        """What `once` returns, tried again as the service asks until the transport's deadline is over."""
        until, failures = time.monotonic() + self._way.transport.deadline, 0
        while True:
            self._hold_back(doing, until)
            try:
                return once()
            except SourceError as error:
                failures += 1
                wait = max(backoff(failures, random.random()), error.retry_after_s or 0.0)  # noqa: S311 - jitter
                if not _may_pass(error, failures) or time.monotonic() + wait >= until:
                    raise
                log.info("trying again in %.1f s: %s", wait, error)
                if error.retry_after_s is not None:
                    self._way.throttle.asked(self._origin, error.retry_after_s)
                self._renew()  # also of a connection that hangs
                self._wait(doing, wait)

    def _hold_back(self, doing: str, until: float) -> None:
        """Wait while the service wants nothing asked."""
        left = self._way.throttle.left(self._origin)
        if left and time.monotonic() + left < until:
            self._wait(doing, left)
        if self._way.stopped.is_set():
            raise _cancelled(doing)

    def _wait(self, doing: str, seconds: float) -> None:
        if self._way.stopped.wait(seconds):
            raise _cancelled(doing)

    def _container(self) -> Container:
        if self._client is not None and time.monotonic() > self._made_at + FRESH_S:
            self._renew()
        if self._client is None:
            way = self._way
            self._client = container_client(way.ref, way.access(), way.transport, way.identity, write=True)
            self._made_at, self._origin = time.monotonic(), Target.parse(self._client.place.endpoint).origin
        return self._client

    def _renew(self) -> None:
        if self._client is not None:
            self._client.client.close()
            self._client = None


class _Body:
    """A block as something to read from: the time limit of a connection then counts for each piece, and not for the block as a whole."""

    def __init__(self, view: memoryview, way: Way) -> None:
        self._view, self._way, self._at = view, way, 0
        self._until = time.monotonic() + way.transport.deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._view = memoryview(b"")  # errors keep it; the buffer is used again

    def __len__(self) -> int:
        return len(self._view)

    def read(self, count: int = -1) -> bytes:
        if self._way.stopped.is_set():
            raise _cancelled("send a block")
        if time.monotonic() > self._until:
            raise SourceError(Code.SOURCE_STALLED, f"cannot send a block: it takes longer than {self._way.transport.deadline:g} s")
        piece = bytes(self._view[self._at : len(self._view) if count < 0 else self._at + count])
        self._at += len(piece)
        return piece


def _may_pass(error: SourceError, failures: int) -> bool:
    """Whether the same request may do after its `failures`-th failure."""
    if error.code in (Code.BAD_TOKEN, Code.DIGEST_MISMATCH):
        return failures < TRIES
    return error.retryable and error.code is not Code.SOURCE_CHANGED


def _condition(seen: str | None) -> dict[str, Any]:
    if seen is None:
        return {"match_condition": MatchConditions.IfMissing}
    return {"etag": f'"{seen}"', "match_condition": MatchConditions.IfNotModified}


def _standing(blob: Blob) -> Standing:
    digests: dict[Algorithm, str] = {}
    if (sha256 := metadata_sha256(blob)) is not None:
        digests[Algorithm.SHA256] = sha256.hex
    for name, value in blob.metadata.items():
        if name.lower() == METADATA[Algorithm.GIT_SHA1] and re.fullmatch(r"[0-9a-f]{40}", value):
            digests[Algorithm.GIT_SHA1] = value
    return Standing(blob.size, blob.etag, digests, bool(blob.archived))


def _cancelled(doing: str) -> Interrupted:
    return Interrupted(Code.CANCELLED, f"cannot {doing}: cancelled")
