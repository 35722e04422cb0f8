"""Azure Blob Storage as a source: pins what is below a prefix and says where its bytes are. It fetches no weights and writes nothing.

There is no commit: the listing (names, sizes, ETags, versions) is taken once and its SHA-256 is the revision; every range is asked for under the ETag
that was listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from nvcache.core.digest import Digest
from nvcache.core.plan import RemoteFile
from nvcache.core.published import LIMIT, MANIFEST, SUMS, Published, UnfinishedError, parse_sums
from nvcache.core.ref import Ref, is_moment
from nvcache.errors import Code, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.grant import grant_for
from nvcache.sources.azure.identity import Identity
from nvcache.sources.azure.listing import Blob, Listing, Token, as_of, commit_of, remote_files, some
from nvcache.sources.azure.place import VERSION, Anonymous, Bearer, Grant, Key, Place, Sas, place_of
from nvcache.sources.base import HttpRemote, Resolved
from nvcache.sources.http import Target, Transport

if TYPE_CHECKING:
    from nvcache.sources.azure.client import Container

EARLIER, LATER = timedelta(minutes=15), timedelta(hours=6)  # around now, the life of a SAS that is made from the key: clocks differ
NAMED = 5  # names that a message lists


class AzureBlob:
    """A `Source` for az://account/container/prefix. `access` is called anew for each call; its secrets go to the accounts they are for only.

    Calls may raise `ConfigError` (bad-config) for a secret that cannot be one.
    """

    def __init__(self, access: Callable[[], Access], transport: Transport) -> None:
        self._access = access
        self._transport = transport
        self.identity = Identity(transport)  # one for the process, so that its tokens are kept

    def resolve(self, ref: Ref) -> Resolved:
        """The revision of what is below the prefix: now, or at the time that `ref` names; `name` is that time.

        Raises `SourceError`: revision-not-found if `ref` is pinned to another listing; repository-not-found if there is nothing.
        """
        doing = f"resolve {ref}"
        name = ref.revision if ref.revision is not None and is_moment(ref.revision) else None
        with self._container(ref) as container:
            listing = _listed(container, name, doing)
            published = _manifest(container, listing, doing)
        if ref.revision not in (None, name, listing.revision):
            raise SourceError(
                Code.REVISION_NOT_FOUND,
                f"cannot {doing}: the blobs have changed, they are at revision {listing.revision} now",
                hint="ask again without a revision; where versions or snapshots are kept, a time (@2026-01-31T12:00:00Z) brings back what was there",
            )
        return Resolved(ref.at(listing.revision), name, container.place.endpoint, commit_of(listing, published))

    def list(self, resolved: Resolved) -> tuple[RemoteFile, ...]:
        """The files, by path, with their digests. Raises `SourceError` (source-changed) if they are not those of the revision any more."""
        doing = f"list {resolved.ref}"
        name = resolved.name if resolved.name is not None and is_moment(resolved.name) else None
        with self._container(resolved.ref) as container:
            listing = _listed(container, name, doing)
            if listing.revision != resolved.ref.revision:
                raise SourceError(Code.SOURCE_CHANGED, f"cannot {doing}: the blobs have changed since it was resolved")
            published = _manifest(container, listing, doing)
            return remote_files(container.place, listing, published, _sums(container, listing, doing), doing)

    def refuse(self, resolved: Resolved, file: RemoteFile) -> None:
        """Raises `SourceError` (archived) for a blob in the archive tier: no bytes of it can be had before it is brought back."""
        token = Token.of(file)
        if token.archived:
            hint = "wait: it takes hours" if token.returning else None
            why = "it is on its way out of the archive tier" if token.returning else "it is in the archive tier"
            raise SourceError(Code.ARCHIVED, f"cannot fetch {file.path} of {resolved.ref}: {why}", hint=hint, retryable=token.returning)

    def locate(self, resolved: Resolved, file: RemoteFile) -> HttpRemote:
        """The blob's URL with what opens it; nothing is asked, except a token where the one that is kept runs out."""
        self.refuse(resolved, file)
        token, access = Token.of(file), self._access()
        place = place_of(resolved.ref, access)
        sas, headers = _opens(grant_for(place, access, self.identity), place, file, token)
        query = "&".join(part for part in (token.version, sas) if part)
        return HttpRemote(
            url=f"{place.url(file.path)}{'?' if query else ''}{query}",
            size=file.size,
            headers=(("x-ms-version", VERSION), *headers),
            validator=f'"{token.etag}"',
            match=True,
            range_md5=file.digest is None,
            origin=Target.parse(place.endpoint).origin,
            name=file.path,
        )

    def _container(self, ref: Ref) -> Container:
        from nvcache.sources.azure.client import container_client  # the SDK costs 40 MiB and 0.3 s: loaded by those who ask

        return container_client(ref, self._access(), self._transport, self.identity)


def _listed(container: Container, moment: str | None, doing: str) -> Listing:
    """What is below the prefix, or was at a moment."""
    prefix = container.place.prefix
    if moment is None:
        listing = Listing.of(container.blobs(doing, prefix, "metadata"), prefix, doing)
    else:
        listing = Listing.of(as_of(container.blobs(doing, prefix, "metadata", "versions", "snapshots"), moment, doing), prefix, doing)
    if not listing.files:
        raise SourceError(Code.REPOSITORY_NOT_FOUND, f"cannot {doing}: {_why_nothing(container, doing)}", hint="check the container and the prefix")
    return listing


def _why_nothing(container: Container, doing: str) -> str:
    """What is there instead of what was asked for: soft-deleted blobs, or other names next to it."""
    prefix = container.place.prefix
    where = f"there is nothing below {prefix!r}" if prefix else "the container is empty"
    with suppress(SourceError):  # who may list may not be allowed to see what is deleted
        deleted = sum(blob.deleted for blob in container.blobs(doing, prefix, "deleted"))
        if deleted:
            return f"{where} but {deleted:,} deleted blobs, which can be brought back: az storage blob undelete …"
    for folder in dict.fromkeys((_parent(prefix), "")):
        names = container.names(doing, folder, NAMED + 1) if prefix else ()
        if names:
            return f"{where}; {repr(folder) if folder else 'the container'} holds {some(names, NAMED)}"
    return where


def _parent(prefix: str) -> str:
    head, slash, _ = prefix.removesuffix("/").rpartition("/")
    return head + slash


def _manifest(container: Container, listing: Listing, doing: str) -> Published | None:
    if listing.manifest is None:
        return None
    try:
        return Published.from_json(_small(container, listing.manifest, doing))
    except UnfinishedError as error:
        hint = "wait for `nvcache mirror` to end, or run it again if it was broken off"
        raise SourceError(Code.SOURCE_BUSY, f"cannot {doing}: {error.model} is being copied there, or was broken off", hint=hint) from None
    except ValueError as error:
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: cannot read {MANIFEST}: {error}", retryable=False) from None


def _sums(container: Container, listing: Listing, doing: str) -> Mapping[str, Digest]:
    if listing.sums is None:
        return {}
    try:
        return parse_sums(_small(container, listing.sums, doing))
    except ValueError as error:
        hint = f"write it with: sha256sum FILE… > {SUMS}"
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {error}", hint=hint, retryable=False) from None


def _small(container: Container, blob: Blob, doing: str) -> bytes:
    if blob.size > LIMIT:
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {blob.name} is longer than {LIMIT >> 20} MiB", retryable=False)
    return container.read(doing, blob)


def _opens(grant: Grant, place: Place, file: RemoteFile, token: Token) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What a request for a blob's bytes needs, in its query and in its headers. A key stays here: it signs a SAS for reading that one blob."""
    match grant:
        case Key():
            from azure.storage.blob import BlobSasPermissions, generate_blob_sas

            kind, _, moment = token.version.partition("=")
            now = datetime.now(UTC)
            return generate_blob_sas(
                grant.account,
                place.container,
                place.prefix + file.path,
                snapshot=moment if kind == "snapshot" else None,
                version_id=moment if kind == "versionid" else None,
                account_key=grant.secret,
                permission=BlobSasPermissions(read=True),
                start=now - EARLIER,
                expiry=now + LATER,
            ), ()
        case Sas():
            return grant.text, ()
        case Bearer():
            return "", (("Authorization", f"Bearer {grant.token}"),)
        case Anonymous():
            return "", ()
