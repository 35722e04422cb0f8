"""What the node has, in memory: manifests, states, leases, and which entry a name means. It reads and writes no disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nvcache.core.digest import Algorithm
from nvcache.core.manifest import File, Manifest
from nvcache.core.plan import RemoteFile
from nvcache.core.ref import EntryId, Ref, Scheme, SlugName, shortened
from nvcache.errors import Code, NvcacheError, RequestError
from nvcache.store.catalog import EntryState, Lease

DEFAULT_NAME = "main"  # what a reference without a revision means; also the ref a Hub view needs to be found without one


@dataclass
class Entry:
    """One entry the store has a manifest of. `broken` says why it is withdrawn; None means ready."""

    manifest: Manifest
    state: EntryState
    broken: NvcacheError | None = None
    suspect: bool = False  # bytes of it went bad: it is read whole before it is shown again
    removing: bool = False
    changing: bool = False  # its views are being published anew: a look at them now proves nothing
    last_used: float | None = None
    checked: tuple[float, bool] = field(default=(float("-inf"), True))  # monotonic time of the last cheap check, and what it found

    @property
    def id(self) -> EntryId:
        """The entry's name."""
        return self.manifest.id

    @property
    def hub_id(self) -> str | None:
        """The name in the HuggingFace view, if it has one."""
        return hub_id(self.manifest.ref, self.state.alias)


class Shelf:
    """Entries by id, with the look-ups the engine needs."""

    def __init__(self) -> None:
        self.entries: dict[EntryId, Entry] = {}
        self.leases: dict[str, Lease] = {}
        self._resolved: dict[tuple[str, str], EntryId] = {}  # (slug, moving name) → the entry it was last resolved to
        self._by_digest: dict[str, File] = {}  # "algorithm:hex" as published, and "sha256:hex" → a file with its chunk digests

    def put(self, entry: Entry) -> None:
        """Add or replace an entry."""
        self.entries[entry.id] = entry
        for name in entry.state.names:
            holder = self.entries.get(self._resolved.get((entry.id.slug, name), entry.id), entry)
            if holder.state.resolved_at <= entry.state.resolved_at:
                self._resolved[entry.id.slug, name] = entry.id
        self._index(entry.manifest.files)

    def drop(self, entry_id: EntryId) -> None:
        """Forget an entry and its leases."""
        self.entries.pop(entry_id, None)
        for lease in [lease for lease in self.leases.values() if lease.entry == entry_id]:
            del self.leases[lease.id]
        self._resolved = {key: value for key, value in self._resolved.items() if value != entry_id}
        self._by_digest = {}
        for entry in self.entries.values():
            self._index(entry.manifest.files)

    def resolved(self, slug: str, name: str, entry_id: EntryId) -> None:
        """Note that `name` means `entry_id` now."""
        self._resolved[(slug, name)] = entry_id

    def revisions(self, slug: str) -> list[EntryId]:
        """Every entry of a slug, the last resolved one first."""
        found = [entry for entry in self.entries.values() if entry.id.slug == slug]
        return [entry.id for entry in sorted(found, key=lambda entry: entry.state.resolved_at, reverse=True)]

    def find(self, name: Ref | SlugName) -> EntryId | None:
        """The entry a name means: the exact revision, the moving name's last meaning, the last resolved revision, or the one that begins so.

        Raises `RequestError` (ambiguous-revision) when several begin so.
        """
        slug, revision = name.slug, name.revision
        if revision is not None and EntryId(slug, revision) in self.entries:
            return EntryId(slug, revision)
        if isinstance(name, Ref) and not name.pinned:
            moving = revision or DEFAULT_NAME
            known = self._resolved.get((slug, moving))
            if known in self.entries:
                return known
        latest = next(iter(self.revisions(slug)), None) if revision is None else None
        return latest or self._by_first_digits(name)

    def _by_first_digits(self, name: Ref | SlugName) -> EntryId | None:
        short = shortened(name)
        if short is None:
            return None
        found = [entry_id for entry_id in self.revisions(short[0]) if entry_id.revision.startswith(short[1])]
        if len(found) > 1:
            raise _ambiguous(name, found)
        return found[0] if found else None

    def only(self, name: Ref | SlugName) -> EntryId:
        """Like `find`, for what destroys: raises `RequestError` unknown-model, or ambiguous-revision when a bare slug has several."""
        if isinstance(name, SlugName) and name.revision is None and len(found := self.revisions(name.slug)) > 1:
            raise _ambiguous(name, found)
        entry_id = self.find(name)
        if entry_id is None:
            raise unknown(name)
        return entry_id

    def known(self, file: RemoteFile) -> File | None:
        """A stored file with the content `file` has, by what its source publishes; None when unknown or unpublished."""
        return self._by_digest.get(str(file.digest)) if file.digest else None

    def sharing(self, blobs: Iterable[str]) -> list[Entry]:
        """Every entry that has one of these blobs."""
        wanted = set(blobs)
        return [entry for entry in self.entries.values() if wanted & entry.manifest.blobs.keys()]

    def holders(self, entry_id: EntryId, now: float) -> list[Lease]:
        """The leases on an entry that have not run out at `now` (unix seconds)."""
        return [lease for lease in self.leases.values() if lease.entry == entry_id and lease.expires > now]

    def shown(self) -> set[str]:
        """The SHA-256 of every blob of every entry, ready or not."""
        return {sha256 for entry in self.entries.values() for sha256 in entry.manifest.blobs}

    def broken(self) -> set[str]:
        """The SHA-256 of every blob of entries that are withdrawn."""
        return {sha256 for entry in self.entries.values() if entry.broken is not None for sha256 in entry.manifest.blobs}

    def newer(self, slug: str, name: str, moment: float, entry_id: EntryId) -> bool:
        """Whether another entry was resolved from the moving `name` later than at `moment` (unix seconds)."""
        return any(
            other.id.slug == slug and other.id != entry_id and name in other.state.names and other.state.resolved_at > moment
            for other in self.entries.values()
        )

    def alias_taken(self, hub_name: str, slug: str) -> bool:
        """Whether another source's entry shows itself under `hub_name`."""
        return any(entry.hub_id == hub_name and entry.id.slug != slug for entry in self.entries.values())

    def _index(self, files: Iterable[File]) -> None:
        for file in files:
            self._by_digest[f"sha256:{file.sha256}"] = file
            if file.source is not None and file.source.algorithm is not Algorithm.SHA256:
                self._by_digest[str(file.source)] = file


def hub_id(ref: Ref, alias: str | None) -> str | None:
    """The name an entry has in the HuggingFace view: the repository's own, else the alias."""
    return ref.location if ref.scheme is Scheme.HF else alias


def _ambiguous(name: Ref | SlugName, found: list[EntryId]) -> RequestError:
    why = f"{len(found)} are here{f' that begin with {short[1]}' if (short := shortened(name)) else ''}"
    facts: dict[str, object] = {"entries": [str(entry_id) for entry_id in found]}
    return RequestError(Code.AMBIGUOUS_REVISION, f"cannot tell which revision of {name.slug} is meant: {why}", facts=facts)


def unknown(name: Ref | SlugName) -> RequestError:
    """The error for a model the node does not have."""
    return RequestError(Code.UNKNOWN_MODEL, f"cannot find model {name}: this node does not have it")
