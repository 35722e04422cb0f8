"""The plan of a copy from the Hub into blobs: what is there already, what is to be sent, what is in the way, and in which blocks. It asks nobody.

A blob is taken for a file of the Hub by its size and the digests in its metadata (`METADATA`): whatever overwrites a blob takes its metadata away,
while the manifest beside it would go on to name what was there before.

Blocks: Microsoft's REST reference, "Put Block": at most 50,000 a blob, ids of the same length, at most 64 bytes. An id says where the block belongs
and which bytes it is, so that a copy that was broken off is taken up at the blocks that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import LeftOut, Selection
from nvcache.core.names import check_names
from nvcache.core.plan import RemoteFile
from nvcache.core.published import MANIFEST, SUMS, Published
from nvcache.core.ref import Ref
from nvcache.core.selection import chooses
from nvcache.errors import Code, IntegrityError, RequestError, SourceError

BLOCK = 16 * 2**20  # bytes
MOST_BLOCKS = 50_000
METADATA = {Algorithm.SHA256: "sha256", Algorithm.GIT_SHA1: "gitsha1"}  # no `_`: some proxies drop headers that have one
RESERVED = (MANIFEST, SUMS)  # read as digests of what lies beside them, so a repository's own are not copied


@dataclass(frozen=True, slots=True)
class Standing:
    """A blob that stands at the destination; `digests` are those in its metadata."""

    size: int
    etag: str
    digests: Mapping[Algorithm, str] = field(default_factory=dict)
    archived: bool = False

    @property
    def sha256(self) -> str | None:
        """The one that a manifest needs."""
        return self.digests.get(Algorithm.SHA256)

    def holds(self, file: RemoteFile) -> bool:
        """Whether it is the file that the Hub lists."""
        digest = file.digest
        known = digest is not None and self.digests.get(digest.algorithm) == digest.hex
        return known and self.size == file.size and self.sha256 is not None


@dataclass(frozen=True, slots=True)
class Beside:
    """The manifest at the destination. `finished`: what it says, if it can be read and says that the copy is whole; else `model` may be known."""

    etag: str | None = None
    finished: Published | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """One file of the plan, and the blob that stands under its name; `proven`: a copy that was finished vouches for it."""

    file: RemoteFile
    standing: Standing | None
    here: bool
    proven: bool

    @property
    def state(self) -> str:
        """One word for people."""
        return "here" if self.here else "send" if self.standing is None else "replace"


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """A copy of `model` (`hf://org/name`) at `commit`. `foreign` are files at the destination that are none of the model's."""

    model: str
    commit: str
    files: tuple[Copy, ...]
    left_out: tuple[LeftOut, ...]
    foreign: tuple[str, ...]
    beside: Beside

    @property
    def to_send(self) -> tuple[Copy, ...]:
        """What is not there yet, in order."""
        return tuple(copy for copy in self.files if not copy.here)

    @property
    def strangers(self) -> tuple[str, ...]:
        """Blobs that no copy of this model put at the destination, which would be written over or lie beside it; in order.

        A copy that was broken off may have left anything, and was let in when it began. Beside a finished one only what would be written over counts,
        if it does not say of itself what every copy says. Without either, all counts except what is to be there anyway.
        """
        if self.beside.model is not None and self.beside.finished is None:
            return ()
        over = [copy for copy in self.to_send if copy.standing is not None]
        if self.beside.finished is not None:
            return tuple(copy.file.path for copy in over if copy.standing is not None and copy.standing.sha256 is None)
        return tuple(sorted([*(copy.file.path for copy in over), *self.foreign]))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(copy.file.size for copy in self.files)

    @property
    def bytes_to_send(self) -> int:
        """Bytes of what is not there yet."""
        return sum(copy.file.size for copy in self.to_send)

    @property
    def whole(self) -> bool:
        """Whether everything is there and the manifest says so: there is nothing to do."""
        if self.to_send or self.beside.finished is None:
            return False
        return self.beside.finished == self.published({copy.file.path: copy.standing.sha256 or "" for copy in self.files if copy.standing})

    def published(self, sha256: Mapping[str, str]) -> Published:
        """The manifest of the finished copy, by each file's SHA-256."""
        return Published(self.model, self.commit, {copy.file.path: (copy.file.size, sha256[copy.file.path]) for copy in self.files})


def plan_mirror(ref: Ref, listing: Iterable[RemoteFile], selection: Selection, standing: Mapping[str, Standing], beside: Beside) -> MirrorPlan:
    """What is to be done to have the files of `ref`, which is pinned, at a destination where `standing` stands, by path.

    Raises `RequestError` (bad-request: no file is selected, or the destination holds another model), `IntegrityError` (hostile-name,
    listing-conflict: names that a reader would refuse, together with what is there), `SourceError` (archived).
    """
    files = {file.path: file for file in listing}
    wanted = chooses(selection, files) - set(RESERVED)
    if not wanted:
        hint = "change --include/--exclude; `nvcache warm REF --dry-run` lists the files"
        raise RequestError(Code.BAD_REQUEST, f"cannot mirror {ref}: of its {len(files)} files none is selected", hint=hint)
    if beside.model not in (None, ref.base):
        hint = "give every model a prefix of its own"
        raise RequestError(Code.BAD_REQUEST, f"cannot mirror {ref}: the destination holds {beside.model}", hint=hint)
    foreign = sorted(standing.keys() - wanted - set(RESERVED))
    _check_names(ref, wanted, foreign)
    copies = tuple(_copy(files[path], standing.get(path), beside) for path in sorted(wanted))
    if asleep := [copy.file.path for copy in copies if copy.here and copy.standing and copy.standing.archived]:
        raise SourceError(Code.ARCHIVED, f"cannot mirror {ref}: at the destination {asleep[0]} is in the archive tier, where nobody can read it")
    left_out = tuple(LeftOut(path, files[path].size) for path in sorted(files.keys() - wanted))
    return MirrorPlan(ref.base, ref.revision or "", copies, left_out, tuple(foreign), beside)


def _check_names(ref: Ref, wanted: Iterable[str], foreign: Iterable[str]) -> None:
    check_names(sorted(wanted))
    try:
        check_names(sorted(chooses(Selection(), {*wanted, *foreign})))
    except IntegrityError as error:
        hint = "choose another prefix, or remove what is in the way"
        raise IntegrityError(error.code, f"cannot mirror {ref} beside what is at the destination: {error}", hint=hint) from None


def _copy(file: RemoteFile, standing: Standing | None, beside: Beside) -> Copy:
    here = standing is not None and standing.holds(file)
    known = beside.finished.files.get(file.path) if beside.finished else None
    return Copy(file, standing, here, here and standing is not None and known == (file.size, standing.sha256))


def block_size(size: int) -> int:
    """Bytes of the blocks of a file of `size` bytes: 16 MiB, more only where these would be too many."""
    return max(BLOCK, -(-size // (MOST_BLOCKS * BLOCK)) * BLOCK)


def block_id(index: int, sha256: str) -> str:
    """The id of a block with these bytes at this place: 48 characters."""
    return f"{index:07d}-{sha256[:40]}"


def metadata_of(sha256: str, published: Digest | None) -> dict[str, str]:
    """What a blob's metadata say of its content: its SHA-256 and, where it is another one, the digest that the Hub publishes."""
    own = {METADATA[Algorithm.SHA256]: sha256}
    return own if published is None or published.algorithm not in METADATA else own | {METADATA[published.algorithm]: published.hex}


def content_type(path: str) -> str:
    """What a blob is said to be: JSON, or just bytes."""
    return "application/json" if path.endswith(".json") else "application/octet-stream"
