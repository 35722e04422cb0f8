"""One container by Azure's SDK: pages of its listing and small blobs, each request bounded in time and bytes. It reads no weights.

The SDK's retries are switched off: they ignore Retry-After, take 429 for final, and wait longer than a caller may be kept.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from azure.core import MatchConditions
from azure.core.credentials import AccessToken, AzureSasCredential
from azure.core.exceptions import AzureError
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobProperties, ContainerClient

from nvcache.core.ref import Ref
from nvcache.core.retry import backoff
from nvcache.errors import Code, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.bounded import ANSWER_S, SILENCE_S, session
from nvcache.sources.azure.failures import Attempt, described
from nvcache.sources.azure.grant import grant_for
from nvcache.sources.azure.identity import Identity
from nvcache.sources.azure.listing import Blob, stamp
from nvcache.sources.azure.place import VERSION, Anonymous, Bearer, Grant, Key, Place, Sas, place_of
from nvcache.sources.azure_answers import Kind
from nvcache.sources.http import Target, Transport, UnreadableCaError, proxy_for, tls_context

PATIENCE_S = 8.0  # waiting between tries that one call does itself; longer asks are the caller's to wait out
TRIES = 3
CALL_S = 120.0
BODY_S = 300.0  # for a request that sends a block of a blob

T = TypeVar("T")


def container_client(ref: Ref, access: Access, transport: Transport, identity: Identity, *, write: bool = False) -> Container:
    """The container of `ref` with the credential meant for it; `write`: for requests that carry blocks of blobs, which take longer.

    Raises what `grant_for` raises, and `SourceError` (source-unreachable, source-tls) for a proxy or CA that cannot be used.
    """
    place = place_of(ref, access)
    return Container(place, grant_for(place, access, identity), transport, answer_s=BODY_S if write else ANSWER_S)


class Container:
    """A context manager for one call of a source. `client` is the SDK's; what is asked of it goes through `ask`."""

    def __init__(self, place: Place, grant: Grant, transport: Transport, *, answer_s: float = ANSWER_S) -> None:
        self.place = place
        self._grant = grant
        self._origin = Target.parse(place.endpoint).origin
        pipe = RequestsTransport(
            session=session(tls_context_for(transport, place), _proxy(transport, place), answer_s),
            connection_timeout=min(SILENCE_S, transport.connect_timeout),
            read_timeout=min(SILENCE_S, transport.stall_timeout),
        )
        self.client = ContainerClient(
            place.endpoint,
            place.container,
            credential=_sdk_credential(grant),
            api_version=VERSION,
            transport=pipe,
            retry_total=0,
            permit_redirects=False,  # the service never redirects, and a SAS would be sent along
            user_agent=transport.user_agent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.client.close()

    def blobs(self, doing: str, prefix: str, *include: str) -> Iterator[Blob]:
        """Every blob whose name begins with `prefix`; `include`: metadata, snapshots, versions, deleted. Raises `SourceError`."""
        deadline, count = time.monotonic() + CALL_S, 0
        marker: str | None = None
        while True:
            page, marker = self.ask(doing, partial(self._page, prefix, include, marker))
            yield from page
            count += len(page)
            if not marker:
                return
            if time.monotonic() > deadline:
                raise SourceError(Code.SOURCE_STALLED, f"cannot {doing}: {count:,} blobs were listed in {CALL_S:g} s, and there are more")

    def names(self, doing: str, folder: str, count: int) -> tuple[str, ...]:
        """The first `count` names in `folder` ("" or with a slash at its end); folders in it end in a slash."""

        def ask() -> tuple[str, ...]:
            page = next(self.client.walk_blobs(folder, delimiter="/", results_per_page=count).by_page(), ())
            return tuple(item.name.removeprefix(folder) for item in page)[:count]

        return self.ask(doing, ask)

    def read(self, doing: str, blob: Blob) -> bytes:
        """The content of a small blob, provided that it is the one that was listed."""

        def ask() -> bytes:
            client = self.client.get_blob_client(blob.name, snapshot=blob.snapshot, version_id=blob.version)
            tag = f'"{blob.etag}"'
            return client.download_blob(etag=tag, match_condition=MatchConditions.IfNotModified, max_concurrency=1).readall()

        return self.ask(doing, ask, listed=True)

    @property
    def kind(self) -> Kind:
        """What it is authorised by."""
        return described(self._grant).kind

    def ask(self, doing: str, call: Callable[[], T], *, listed: bool = False, tries: int = TRIES) -> T:
        """What `call` returns, tried a few times where that may help. `doing` completes "cannot …"; `listed`: it is about a blob of a listing."""
        attempt, waited = Attempt(doing, self._origin, self._grant, listed), 0.0
        for failures in range(1, tries + 1):
            try:
                return self._once(attempt, call)
            except SourceError as error:
                pause = error.retry_after_s or backoff(failures, random.random())  # noqa: S311 - jitter
                final = error.code in (Code.SOURCE_CHANGED, Code.SOURCE_PROTOCOL) or not error.retryable
                if final or failures == tries or waited + pause > PATIENCE_S:
                    raise
                waited += pause
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _once(self, attempt: Attempt, call: Callable[[], T]) -> T:
        try:
            return call()
        except AzureError as error:
            raise attempt.explain(error) from None  # the SDK's text quotes URLs
        except (ValueError, AttributeError, TypeError, KeyError):  # the SDK's, about an answer that is not the service's
            raise attempt.no_service() from None

    def _page(self, prefix: str, include: tuple[str, ...], marker: str | None) -> tuple[list[Blob], str | None]:
        pages: Any = self.client.list_blobs(name_starts_with=prefix or None, include=list(include)).by_page(marker)
        page = [blob_of(found) for found in next(pages, ())]
        return page, pages.continuation_token


def blob_of(found: BlobProperties) -> Blob:
    """One blob of a listing as plain facts."""
    return Blob(
        name=found.name,
        size=found.size,
        etag=(found.etag or "").strip('"'),
        modified=stamp(found.last_modified),
        version=found.version_id,
        snapshot=found.snapshot,
        archived=found.archive_status or ("archive" if found.blob_tier == "Archive" else ""),
        metadata=dict(found.metadata or {}),
        md5=bytes(found.content_settings.content_md5 or b""),
        deleted=bool(found.deleted),
    )


def tls_context_for(transport: Transport, place: Place) -> ssl.SSLContext:
    """What to trust. Raises `SourceError` (source-tls)."""
    try:
        return tls_context(transport.ca_file)
    except UnreadableCaError as error:
        why = f"the certificates in {transport.ca_file} cannot be read"
        raise SourceError(Code.SOURCE_TLS, f"cannot reach {place.endpoint}: {why}") from error


def _proxy(transport: Transport, place: Place) -> str | None:
    try:
        return proxy_for(Target.parse(place.endpoint), transport.proxies)
    except ValueError as error:
        raise SourceError(Code.SOURCE_UNREACHABLE, f"cannot reach {place.endpoint}: {error}", retryable=False) from None


class _Given:
    """A token that was got already, in the form that the SDK takes."""

    def __init__(self, token: str) -> None:
        self._token = token

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        return AccessToken(self._token, int(time.time()) + 3600)  # a client lives for one call


def _sdk_credential(grant: Grant) -> Any:
    match grant:
        case Key():
            return {"account_name": grant.account, "account_key": grant.secret}
        case Sas():
            return AzureSasCredential(grant.text)
        case Bearer():
            return _Given(grant.token)
        case Anonymous():
            return None
