"""What the node has, in memory: manifests, states, leases, and which entry a name means. It reads and writes no disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field

from nvcache.core.digest import Algorithm
from nvcache.core.manifest import File, Manifest
from nvcache.core.plan import RemoteFile
from nvcache.core.ref import EntryId, Ref, Scheme, SlugName, shortened
from nvcache.errors import Code, NvcacheError, RequestError
from nvcache.store.catalog import EntryState, Lease
from nvcache.store.views import Views

DEFAULT_NAME = "main"  # what a reference without a revision means; also the ref a Hub view needs to be found without one


@dataclass
class Entry:
    """One entry the store has a manifest of. `broken` says why it is withdrawn; None means ready."""

    manifest: Manifest
    state: EntryState
    broken: NvcacheError | None = None
    suspect: bool = False  # bytes of it went bad: it is read whole before it is shown again
    doubts: int = 0  # how often somebody was seen to have written to its files
    answered: int = 0  # how many of these came before a reading that found all bytes right
    removing: bool = False
    changing: bool = False  # its views or its state are being written: a look at them now proves nothing, and nobody removes it
    last_used: float | None = None
    use_noted: float = float("-inf")  # monotonic time at which that was written down last
    in_use: bool = False  # a process had files of it open or mapped when that was looked up last
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)  # SHA-256 → inode and mtime, as the last cheap check found them
    checked: tuple[float, bool] = field(default=(float("-inf"), True))  # monotonic time of the last cheap check, and what it found

    @property
    def id(self) -> EntryId:
        """The entry's name."""
        return self.manifest.id

    @property
    def hub_id(self) -> str | None:
        """The name in the HuggingFace view, if it has one."""
        return hub_id(self.manifest.ref, self.state.alias)


class LeaseBook(MutableMapping[str, Lease]):
    """Leases by id, and those of one entry at no cost for those of others: pods take as many as they like, and all models are looked at often."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._of: dict[EntryId, dict[str, Lease]] = {}

    def of(self, entry: EntryId) -> Collection[Lease]:
        """The leases on an entry, oldest first."""
        return self._of.get(entry, {}).values()

    def __getitem__(self, lease_id: str) -> Lease:
        return self._leases[lease_id]

    def __setitem__(self, lease_id: str, lease: Lease) -> None:
        before = self._leases.get(lease_id)
        if before is not None and before.entry != lease.entry:
            del self[lease_id]
        self._leases[lease_id] = self._of.setdefault(lease.entry, {})[lease_id] = lease

    def __delitem__(self, lease_id: str) -> None:
        entry = self._leases.pop(lease_id).entry
        del self._of[entry][lease_id]
        if not self._of[entry]:
            del self._of[entry]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leases)

    def __len__(self) -> int:
        return len(self._leases)


class Shelf:
    """Entries by id, with the look-ups the engine needs."""

    def __init__(self) -> None:
        self.entries: dict[EntryId, Entry] = {}
        self.leases = LeaseBook()
        self._resolved: dict[tuple[str, str], EntryId] = {}  # (slug, moving name) → the entry it was last resolved to
        self._by_digest: dict[str, File] = {}  # "algorithm:hex" as published, "sha256:hex" or "token:…" → a file with its chunk digests

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
        for lease in list(self.leases.of(entry_id)):
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
        """The entry a name means: the exact revision, the moving name's last meaning, the last resolved revision, the one that begins so, or the one
        that is shown under that name.

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
        shown = self.shown_as(name) if isinstance(name, Ref) else None
        return latest or self._by_first_digits(name) or (shown.id if shown else None)

    def standing(self) -> dict[str, Entry]:
        """Each name in the HuggingFace view → the entry that `find` has for it without a revision, ready or not, in one pass over all."""
        found = {entry.hub_id: entry for entry in sorted(self.entries.values(), key=lambda entry: entry.state.resolved_at) if entry.hub_id}
        for (_, name), entry_id in self._resolved.items():
            entry = self.entries.get(entry_id)
            if entry is not None and name == DEFAULT_NAME and entry.manifest.ref.scheme is Scheme.HF:
                found[entry.manifest.ref.location] = entry
        return found

    def known_as(self, entry: Entry) -> list[Ref]:
        """Every reference that means this entry just now: with its revision, without, by a moving name, and as the HuggingFace view shows it."""
        ref, hub = entry.manifest.ref, Ref(Scheme.HF, entry.hub_id) if entry.hub_id else None
        moving = [ref.at(None if name == DEFAULT_NAME else name) for name in entry.state.names]
        asked = [ref, ref.at(None), *moving, *((hub, hub.at(entry.manifest.commit)) if hub else ())]
        found = []
        for each in dict.fromkeys(asked):
            with suppress(RequestError):  # a name given up since, that begins several commits
                found += [each] if self.find(each) == entry.id else []
        return found

    def shown_as(self, ref: Ref) -> Entry | None:
        """The entry of another source that the HuggingFace view shows as this Hub model: at its commit, else the newest."""
        if ref.scheme is not Scheme.HF:
            return None
        found = [entry for entry in self.entries.values() if entry.hub_id == ref.location and entry.id.slug != ref.slug]
        if ref.revision not in (None, DEFAULT_NAME):
            found = [entry for entry in found if entry.manifest.commit == ref.revision]
        return max(found, key=lambda entry: entry.state.resolved_at, default=None)

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
        """A stored file with the content `file` has, by the digest that is published, else by the source's name for these bytes, or None.

        An MD5 is believed of the source that published it, never across sources: two contents with one MD5 can be made at will (RFC 6151).
        """
        return self._by_digest.get(str(file.digest) if file.identified else f"token:{file.token}")

    def sharing(self, blobs: Iterable[str]) -> list[Entry]:
        """Every entry that has one of these blobs."""
        wanted = set(blobs)
        return [entry for entry in self.entries.values() if wanted & entry.manifest.blobs.keys()]

    def holders(self, entry_id: EntryId, now: float) -> list[Lease]:
        """The leases on an entry that have not run out at `now` (unix seconds)."""
        return [lease for lease in self.leases.of(entry_id) if lease.expires > now]

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

    def shows_commit(self, commit: str, entry_id: EntryId) -> bool:
        """Whether another entry of the slug has that commit in the HuggingFace view, or would have it there under an alias."""
        others = (other for other in self.entries.values() if other.id.slug == entry_id.slug and other.id != entry_id)
        return any(Views.hub_commit(other.manifest) == commit for other in others)

    def refuse_taken(self, ref: Ref, hub_name: str | None) -> None:
        """Raises `RequestError` (alias-conflict) when another source's entry shows itself under `hub_name`."""
        for entry in self.entries.values():
            if hub_name is not None and entry.hub_id == hub_name and entry.id.slug != ref.slug:
                there = entry.manifest.ref
                hint = f"ask for {there.base}, or remove it first: nvcache rm {entry.id}"
                raise RequestError(Code.ALIAS_CONFLICT, f"cannot show {ref} as {hub_name}: {there.base} has that name on this node", hint=hint)

    def _index(self, files: Iterable[File]) -> None:
        for file in files:
            self._by_digest[f"sha256:{file.sha256}"] = file
            if file.token is not None:
                self._by_digest[f"token:{file.token}"] = file
            if file.source is not None and file.source.algorithm is Algorithm.GIT_SHA1:
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
