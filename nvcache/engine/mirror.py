"""Copies a model of the Hub into blobs: looks, plans, sends, reads back, vouches. It needs no daemon and no store, and deletes nothing.

Readers of the destination trust its manifest, and at no time may they take a mix for a model. So the order is:

0. where anything lies that no copy of this model put there, nothing is done unless that is asked for;
1. a manifest that says "unfinished" takes the place of the one that is there, before the first blob changes: readers refuse the prefix until the end,
   and say why. It is written over the manifest that was seen, or over none, so that of two runs that begin with different commits one is refused;
2. each file is sent in blocks and committed when all its bytes have the digest that the Hub publishes, over the blob that was seen or over none;
3. the prefix is listed again: every file must be as it was left;
4. what no finished copy vouches for is read back and hashed;
5. the manifest is written, over the "unfinished" one; readers take the copy from now on;
6. the destination is resolved as readers do, and every digest and the commit compared.

Broken off at any point, the next run finds what is done by its metadata and its blocks, and goes on. Where nothing has to be sent or read nothing
is marked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import Selection
from nvcache.core.mirror import Copy, MirrorPlan, block_id, block_size, content_type, metadata_of, plan_mirror
from nvcache.core.plan import RemoteFile
from nvcache.core.published import MANIFEST, Published
from nvcache.core.ref import Ref, Scheme
from nvcache.engine.lanes import Lanes, Progress
from nvcache.errors import Code, IntegrityError, RequestError, SourceError
from nvcache.settings import Settings, azure_access, hub_token, source_transport
from nvcache.sources.azure.listing import Token, some
from nvcache.sources.azure.source import AzureBlob
from nvcache.sources.azure.upload import Way, Writer, Written
from nvcache.sources.base import ReaderFactory, Resolved, Source
from nvcache.sources.huggingface import HuggingFace
from nvcache.sources.open import open_remote
from nvcache.sources.ranges import Pace, Throttle, Watchdog

Watch = Callable[[str, Progress], None]
"""Told now and then what is going on (`sending`, `reading back`), and how far it is."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is to be done, and where: the endpoint of the destination without credentials, and what it is opened with.

    `resumed` are blocks that an earlier run sent, by path. `refusal` is why it is not done, if it is not.
    """

    resolved: Resolved
    plan: MirrorPlan
    endpoint: str
    credential: str
    resumed: Mapping[str, frozenset[str]]
    refusal: RequestError | None = None

    def resumes(self, copy: Copy) -> bool:
        """Whether a part of the file was sent before."""
        return bool(self.resumed.get(copy.file.path))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did. `sent` and `read_back` are bytes, `found` those of blocks that an earlier run had sent; `revision` is what readers pin."""

    revision: str
    files: int = 0
    sent: int = 0
    found: int = 0
    read_back: int = 0


@dataclass(slots=True)
class _Tally:
    """What the lanes did, each file counted under its path by the lane that finishes it."""

    sha256: dict[str, str] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    sent: dict[tuple[str, int], int] = field(default_factory=dict)
    found: dict[tuple[str, int], int] = field(default_factory=dict)


class Mirror:
    """One copy to `destination`, an az reference without a revision, with the settings' way to both. A context manager; for one thread."""

    def __init__(self, settings: Settings, destination: Ref, lanes: int) -> None:
        if destination.scheme is not Scheme.AZ or destination.revision is not None:
            hint = "the destination is written az://account/container/prefix, and has no @revision"
            raise RequestError(Code.BAD_REFERENCE, f"cannot mirror to {destination}: it is no place for blobs", hint=hint)
        transport = source_transport(settings)
        self._destination, self._transport = destination, transport
        self._lanes = min(lanes, settings.hf_connections or lanes, settings.az_connections or lanes)
        self._hub = HuggingFace(settings.hf_endpoint, lambda: hub_token(settings), transport)
        self._az = AzureBlob(lambda: azure_access(settings), transport)
        self._throttle, self._watchdog = Throttle(), Watchdog()
        self._paces = {Scheme.HF: Pace(settings.hf_bandwidth or None), Scheme.AZ: Pace(settings.az_bandwidth or None)}
        self._way = Way(destination, lambda: azure_access(settings), transport, self._az.identity, self._throttle)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *raised: object) -> None:
        self._watchdog.close()

    def look(self, ref: Ref, selection: Selection, *, replace: bool = False) -> Look:
        """What there is to do. Changes nothing. With `replace` what no copy of this model put there is no reason to refuse."""
        if ref.scheme is not Scheme.HF:
            raise RequestError(Code.BAD_REFERENCE, f"cannot mirror {ref}: it is no model of the Hub", hint="write it as [hf://]org/name[@revision]")
        resolved = self._hub.resolve(ref)
        listing = self._hub.list(resolved)
        with self._writer() as writer:
            standing, beside = writer.standing()
            plan = plan_mirror(resolved.ref, listing, selection, standing, beside)
            for copy in plan.to_send:
                self._hub.refuse(resolved, copy.file)
            broken_off = beside.model is not None and beside.finished is None
            large = [copy.file.path for copy in plan.to_send if copy.file.size > block_size(copy.file.size)] if broken_off else []
            staged = {path: writer.staged(path) for path in large}
            refusal = None if replace else self._refusal(plan)
            return Look(resolved, plan, writer.place.url("").rstrip("/"), str(writer.credential), staged, refusal)

    def run(self, look: Look, *, quick: bool, watch: Watch) -> Outcome:
        """Do it. `quick` reads nothing back. Raises the refusal, or what went wrong first; what is there then is taken up by the next run."""
        if look.refusal is not None:
            raise look.refusal
        plan, tally = look.plan, _Tally()
        for copy in plan.files:
            if copy.here and copy.standing is not None and copy.standing.sha256 is not None:
                tally.sha256[copy.file.path], tally.etags[copy.file.path] = copy.standing.sha256, copy.standing.etag
        if plan.whole:
            return Outcome(self._vouch(plan, tally.sha256))
        with self._writer() as writer:
            marked = plan.beside.etag
            to_prove = [] if quick else [copy.file.path for copy in plan.files if not copy.proven]
            if plan.to_send or to_prove:
                marked = writer.put(MANIFEST, Published(plan.model, plan.commit, {}).unfinished_json(), marked)
                self._send(look, tally, watch)
            there = self._as_left(writer, plan, tally)
            unproven = [there[path] for path in to_prove]
            self._read_back(unproven, watch)
            writer.put(MANIFEST, plan.published(tally.sha256).to_json(), marked)
        return Outcome(
            self._vouch(plan, tally.sha256),
            files=len(plan.to_send),
            sent=sum(tally.sent.values()),
            found=sum(tally.found.values()),
            read_back=sum(file.size for file in unproven),
        )

    def _refusal(self, plan: MirrorPlan) -> RequestError | None:
        if not plan.strangers:
            return None
        what = f"{len(plan.strangers):,} files" if len(plan.strangers) > 1 else "a file"
        why = f"it holds {what} that no mirror of it put there: {some(plan.strangers, 2)}"
        hint = "choose an empty prefix, or --replace to write over and beside them"
        return RequestError(Code.BAD_REQUEST, f"cannot mirror {plan.model} to {self._destination}: {why}", hint=hint)

    def _writer(self) -> Writer:
        return Writer(self._way)

    def _send(self, look: Look, tally: _Tally, watch: Watch) -> None:
        errands = [
            _Sending(copy, look.resumed.get(copy.file.path, frozenset()), tally, partial(self._open, self._hub, look.resolved, copy.file))
            for copy in look.plan.to_send
        ]
        Lanes(errands, self._lanes, self._writer, self._way.stopped).run(lambda progress: watch("sending", progress))

    def _read_back(self, files: Iterable[RemoteFile], watch: Watch) -> None:
        at = Resolved(self._destination, None, "")
        errands = [_ReadingBack(file, partial(self._open, self._az, at, file)) for file in files]
        Lanes(errands, self._lanes, self._writer, self._way.stopped).run(lambda progress: watch("reading back", progress))

    def _open(self, source: Source, resolved: Resolved, file: RemoteFile) -> ReaderFactory:
        remote = source.locate(resolved, file)
        return open_remote(remote, self._transport, self._throttle, self._watchdog, self._paces[resolved.ref.scheme])

    def _as_left(self, writer: Writer, plan: MirrorPlan, tally: _Tally) -> dict[str, RemoteFile]:
        """The files at the destination. Raises `SourceError` (source-changed) unless each is there as it was found or written."""
        found = writer.files()
        for copy in plan.files:
            path, there = copy.file.path, found.get(copy.file.path)
            if there is None or (Token.of(there).etag, there.size, there.sha256) != (tally.etags[path], copy.file.size, tally.sha256[path]):
                why = "was removed" if there is None else "is not as it was left"
                hint = "see who else writes there; then run the command again, which looks at everything anew"
                raise SourceError(Code.SOURCE_CHANGED, f"cannot finish the copy at {self._destination}: {path} {why} meanwhile", hint=hint)
        return found

    def _vouch(self, plan: MirrorPlan, sha256: Mapping[str, str]) -> str:
        """Look at the destination as readers do; returns the revision that they pin. Raises `IntegrityError` if it is not the Hub's model."""
        resolved = self._az.resolve(self._destination)
        found = {file.path: file for file in self._az.list(resolved)}
        for copy in plan.files:
            there = found.get(copy.file.path)
            if there is None or there.size != copy.file.size or there.sha256 != sha256[copy.file.path]:
                raise IntegrityError(
                    Code.LISTING_CONFLICT, f"cannot vouch for {self._destination}: readers do not find {copy.file.path} as it was sent"
                )
        if resolved.commit != plan.commit and not plan.foreign:
            raise IntegrityError(Code.LISTING_CONFLICT, f"cannot vouch for {self._destination}: readers do not find the commit {plan.commit}")
        return resolved.ref.revision or ""


class _Sending:
    """One file from the Hub to the destination. See `lanes.Errand`."""

    def __init__(self, copy: Copy, staged: frozenset[str], tally: _Tally, readers: Callable[[], ReaderFactory]) -> None:
        self.path, self.size, self.block = copy.file.path, copy.file.size, block_size(copy.file.size)
        self._copy, self._staged, self._tally, self.readers = copy, staged, tally, readers
        published = copy.file.digest
        self.algorithms = frozenset({Algorithm.SHA256, Algorithm.MD5} | ({published.algorithm} if published else set()))
        self._ids: dict[int, str] = {}

    def take(self, tool: Writer, index: int, view: memoryview) -> None:
        """Send a block, unless an earlier run did."""
        if not len(view):
            return
        block = self._ids[index] = block_id(index, hashlib.sha256(view).hexdigest())
        if block in self._staged:
            self._tally.found[self.path, index] = len(view)
        else:
            tool.stage(self.path, block, view)
            self._tally.sent[self.path, index] = len(view)

    def finish(self, tool: Writer, digests: dict[Algorithm, Digest]) -> None:
        """Prove it and make the blocks a blob. Raises `IntegrityError` (digest-mismatch): nothing of it is kept."""
        published = self._copy.file.digest
        if published is not None and digests[published.algorithm] != published:
            what = f"{digests[published.algorithm].algorithm} {digests[published.algorithm].short}… in place of {published.short}…"
            raise IntegrityError(Code.DIGEST_MISMATCH, f"cannot copy {self.path}: the Hub sent bytes that are not those it publishes: {what}")
        sha256 = digests[Algorithm.SHA256].hex
        written = Written(self.size, bytes.fromhex(digests[Algorithm.MD5].hex), metadata_of(sha256, published), content_type(self.path))
        seen = self._copy.standing.etag if self._copy.standing else None
        blocks = [self._ids[index] for index in sorted(self._ids)]
        self._tally.etags[self.path] = tool.commit(self.path, blocks, written, seen)
        self._tally.sha256[self.path] = sha256


class _ReadingBack:
    """One blob, read and hashed. See `lanes.Errand`."""

    algorithms = frozenset({Algorithm.SHA256})

    def __init__(self, file: RemoteFile, readers: Callable[[], ReaderFactory]) -> None:
        self.path, self.size, self.block = file.path, file.size, block_size(file.size)
        self._file, self.readers = file, readers

    def take(self, tool: Writer, index: int, view: memoryview) -> None:
        """It is enough that it was hashed."""

    def finish(self, tool: Writer, digests: dict[Algorithm, Digest]) -> None:
        """Raises `IntegrityError` (digest-mismatch), after what the blob said of itself was taken away, so that the next run sends it anew."""
        if digests[Algorithm.SHA256].hex != self._file.sha256:
            tool.disown(self.path, Token.of(self._file).etag)
            hint = "run the command again: it is sent anew"
            raise IntegrityError(Code.DIGEST_MISMATCH, f"cannot vouch for {self.path}: what is read back is not what was sent", hint=hint)
