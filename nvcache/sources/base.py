"""The contract between the engine and a source of weights, and between a worker and a reader of bytes. It implements neither.

Every implementation passes the shared suite in tests/contract/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from nvcache.core.plan import RemoteFile
from nvcache.core.ref import Ref


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference names right now: the same model at an exact revision, and the moving name (`main`) it was found by, if any.

    `commit` is the Hub's, where a mirror says which one it is an exact copy of.
    """

    ref: Ref
    name: str | None
    endpoint: str  # where it came from, without credentials, for the manifest
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class HttpRemote:
    """Bytes behind a URL that honours Range. Secrets live in `headers` and in the URL's query; both are kept out of repr, logs and errors.

    `validator` is a strong ETag to send as If-Range, where the source has one before the first request; with `match` it is sent as If-Match, and a
    412 means that the file is another one now. `range_md5` asks for an MD5 of each range (Azure: of at most 4 MiB) and compares it. With `stay` no
    redirect is followed to another origin.
    """

    url: str = field(repr=False)
    size: int
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    validator: str | None = None
    origin: str = ""  # scheme://host:port of `url`, safe to print
    name: str = ""  # repository path, for messages
    match: bool = False
    range_md5: bool = False
    stay: bool = False


@dataclass(frozen=True, slots=True)
class FileRemote:
    """Bytes in a local file; `token` is what `sources.directory` derived from its stat and path, checked before and after reading."""

    path: str
    size: int
    token: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class XetRemote:
    """A file that only Xet can give (over 50 GB): its hash, where a token for the CAS is had, and the header that authorises asking."""

    hash: str
    size: int
    endpoint: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    token_expiry: int = 0  # unix seconds
    refresh_url: str | None = field(default=None, repr=False)
    refresh_headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    name: str = ""


Remote = HttpRemote | FileRemote | XetRemote
_KINDS: dict[str, type[HttpRemote] | type[FileRemote] | type[XetRemote]] = {"http": HttpRemote, "file": FileRemote, "xet": XetRemote}


def remote_to_dict(remote: Remote) -> dict[str, Any]:
    """A remote as plain data for the control pipe of a worker. It holds secrets: never log it."""
    kind = next(kind for kind, cls in _KINDS.items() if isinstance(remote, cls))
    return {"kind": kind, **asdict(remote)}


def remote_from_dict(raw: dict[str, Any]) -> Remote:
    """The inverse of `remote_to_dict`."""
    fields = dict(raw)
    cls = _KINDS[fields.pop("kind")]
    for key in ("headers", "refresh_headers"):
        if key in fields:
            fields[key] = tuple((name, value) for name, value in fields[key])
    return cls(**fields)


class Source(Protocol):
    """A place that holds models.

    All calls block, may be made from several threads at once, and are bounded: each returns or raises `SourceError` within its own time limit
    (30 s without an answer at most; retries of transient failures included, 120 s). They hold no state a restart would miss, read credentials anew
    at each call, and put no secret into what they return apart from `Remote`, or into an error. What a source's SDK raises is mapped by one table to
    `SourceError` (transient: `retryable`), or `IntegrityError` for listings that contradict themselves.
    """

    def resolve(self, ref: Ref) -> Resolved:
        """Pin `ref`: the exact revision that its revision (or the default one) names now. A pinned ref may be answered without asking."""

    def list(self, resolved: Resolved) -> tuple[RemoteFile, ...]:
        """Every file of the revision, names as the source gives them (the caller refuses hostile ones), at most 100,000 files."""

    def refuse(self, resolved: Resolved, file: RemoteFile) -> None:
        """Raise what `locate` would raise for `file` whatever the source answers (needs-xet); asks nothing. For planning."""

    def locate(self, resolved: Resolved, file: RemoteFile) -> Remote:
        """Where the bytes of `file` are, credentials included; asks nothing if it can be avoided. Called again for a fresh URL after a failure."""


class Reader(Protocol):
    """One sequential user of a remote's bytes: it belongs to one thread, except `abort` and `received`, which any thread may use."""

    @property
    def received(self) -> int:
        """Bytes that all reads so far brought, the running one included: for showing progress, not for deciding anything."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill all of `into` with the bytes from `offset`, retrying and resuming inside as the protocol allows; bounded in time.

        Raises `SourceError` (with `retryable`), `IntegrityError` (the remote is not the file that was listed), `Interrupted` (aborted).
        """

    def abort(self) -> None:
        """Make a running and every later `read` raise `Interrupted` promptly, also when the remote is stalled."""

    def close(self) -> None:
        """Give connections back. Safe to call twice."""


ReaderFactory = Callable[[], Reader]
"""Makes one more reader of the same remote; readers of one factory share what was learnt (the signed URL, the validator, the throttle)."""
