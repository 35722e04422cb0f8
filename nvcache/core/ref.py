"""Model references and entry names: parse, canonical form, slug. It asks no source whether a model exists.

Grammar::

    hf://[org/]name[@revision]   org/name[@revision]   file:///absolute/dir[@<64 hex>]
    az://account/container[/prefix][@<64 hex>|@<time>]
    https://account.blob.core.windows.net/container[/prefix][@…]     the same; other hosts (sovereign clouds, custom domains) keep this form
    http://127.0.0.1:10000/account/container[/prefix][@…]            an address, localhost or a port: the account is in the path (an emulator)
    <slug>                       <slug>@<revision>     an entry of the store

`<time>` (RFC 3339, UTC) means the blobs as they were then, by version or snapshot. For what is in the store, the first 7 to 39 digits of a revision
name it as well, as `nvcache ls` shows them.

The Hub's rules for repository ids (ASCII letters, digits, `_ . -`, 96 characters a part, never `--` or `..`, not ending in `.git`) make `/` → `--`
injective; any other location is escaped so that `--` only ever separates parts.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from urllib.parse import quote, unquote, urlsplit

from nvcache.errors import Code, RequestError
from nvcache.logs import mask

SLUG_LIMIT = 180  # <slug>@<64 hex>.json is a file name: 255 bytes at most
_HF_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHORT = re.compile(r"[0-9a-f]{7,39}")
_REVISION = re.compile(r"[A-Za-z0-9_.+=/-]{1,200}")
_SLUG = re.compile(r"[a-z]+--[A-Za-z0-9_.=-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_CONTAINER = re.compile(r"[a-z0-9](?:-?[a-z0-9]){2,62}|\$root|\$web")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,7})?Z")
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")
_PORTS = {"http": 80, "https": 443}
_PUBLIC = ".blob.core.windows.net"
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class Scheme(StrEnum):
    """Where weights come from."""

    HF = "hf"
    FILE = "file"
    AZ = "az"


@dataclass(frozen=True, slots=True)
class Ref:
    """A model at a source; `revision` is None for the source's default.

    `location` is `org/name`, an absolute path, or for blobs `account/container[/prefix]` or, at another host than public Azure's, their whole URL.
    """

    scheme: Scheme
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.base if self.revision is None else f"{self.base}@{self.revision}"

    @property
    def base(self) -> str:
        """The canonical form without a revision."""
        location = quote(self.location, safe="/:+,~$[]")
        return location if self.scheme is Scheme.AZ and "://" in self.location else f"{self.scheme}://{location}"

    @property
    def slug(self) -> str:
        """The reference without revision as one safe file name and URL segment: injective, at most 180 bytes."""
        parts = [part for part in self.location.split("/") if part]
        text = "--".join([str(self.scheme), *(_escape(part) for part in parts)])
        if len(text) <= SLUG_LIMIT:
            return text
        tail = hashlib.sha256(self.base.encode()).hexdigest()[:32]
        return f"{text[: SLUG_LIMIT - 34]}=-{tail}"

    @property
    def pinned(self) -> bool:
        """Whether the revision already names exact bytes (a commit or a listing digest)."""
        return self.revision is not None and is_commit(self.revision)

    def at(self, revision: str | None) -> Ref:
        """The same model at another revision."""
        return replace(self, revision=revision)


@dataclass(frozen=True, slots=True, order=True)
class EntryId:
    """One model at one exact revision in the store: `<slug>@<40 or 64 hex>`."""

    slug: str
    revision: str

    def __str__(self) -> str:
        return f"{self.slug}@{self.revision}"


@dataclass(frozen=True, slots=True)
class SlugName:
    """A slug as a caller wrote it, with or without a revision, which may be short."""

    slug: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.slug if self.revision is None else f"{self.slug}@{self.revision}"


def is_commit(text: str) -> bool:
    """Whether `text` is a full commit id (40 hex) or a listing digest (64 hex)."""
    return _COMMIT.fullmatch(text) is not None


def is_short(text: str) -> bool:
    """Whether `text` may be the beginning of a commit or a listing digest: 7 to 39 hex digits. A tag may look the same."""
    return _SHORT.fullmatch(text) is not None


def is_moment(text: str) -> bool:
    """Whether `text` is a time as Azure names versions and snapshots: RFC 3339 in UTC, up to seven decimals."""
    return _MOMENT.fullmatch(text) is not None


def shortened(name: Ref | SlugName) -> tuple[str, str] | None:
    """Slug and first digits of the revision, where `name` may be read that way: also a directory's `@<digits>`, which could be part of its path."""
    if name.revision is not None:
        return (name.slug, name.revision) if is_short(name.revision) else None
    if isinstance(name, Ref) and name.scheme is Scheme.FILE:
        location, _, tail = name.location.rpartition("@")
        if is_short(tail) and not location.endswith("/"):
            return Ref(Scheme.FILE, location).slug, tail
    return None


def parse_ref(text: str) -> Ref:
    """Read a reference to a source. Raises `RequestError` (bad-reference) that says where it went wrong."""
    if not text or len(text) > 4096:
        raise _bad(text, "it is empty" if not text else "it is longer than 4096 characters")
    if control := _CONTROL.search(text):
        raise _bad(text, f"control character at position {control.start()}")
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        raise _bad(text, "it is not valid Unicode")
    scheme, sep, rest = text.partition("://")
    if not sep:
        return _parse_hf(text, text)
    match scheme:
        case "hf":
            return _parse_hf(text, rest)
        case "file":
            return _parse_file(text, rest)
        case "az":
            return _parse_blobs(text, rest)
        case "http" | "https":
            return _parse_url(text)
        case _:
            raise _bad(text, f"unknown scheme {scheme!r} at position 0")


def parse_pinned(text: object) -> Ref:
    """Read a reference that names exact bytes. Raises `RequestError` (bad-reference), TypeError."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.80} is not a reference")
    ref = parse_ref(text)
    if not ref.pinned:
        raise _bad(text, "it has no full revision")
    return ref


def parse_alias(text: str) -> str:
    """Read the `org/name` under which a model is shown in the HuggingFace view. Raises `RequestError` (bad-reference)."""
    ref = parse_ref(text)
    if ref.scheme is not Scheme.HF or text != ref.location:
        raise RequestError(Code.BAD_REFERENCE, f"cannot use alias {text[:200]!r}: an alias has the form org/name")
    return text


def parse_name(text: str) -> Ref | SlugName:
    """Read what a caller names a model by: a reference, an entry or a bare slug. Raises `RequestError` (bad-reference)."""
    head, at, revision = text.partition("@")
    if "/" not in text and len(head) <= SLUG_LIMIT and _SLUG.fullmatch(head) and head.partition("--")[0] in Scheme.__members__.values():
        if at and not is_commit(revision) and not is_short(revision):
            raise _bad(text, f"the part after '@' at position {len(head)} is no revision, nor the first 7 digits or more of one")
        return SlugName(head, revision or None)
    return parse_ref(text)


def shown(text: str) -> str:
    """What a caller named a model by, for people and logs: as it was typed, or without what may be a secret where it is no reference."""
    try:
        parse_name(text)
    except RequestError:
        return mask(re.sub(r"(?s)([?#]).+", r"\1…", text))[:200]
    return text


def parse_entry(text: str) -> EntryId:
    """Read `<slug>@<revision>`. Raises `RequestError` (bad-reference)."""
    name = parse_name(text)
    if not isinstance(name, SlugName) or name.revision is None or not is_commit(name.revision):
        raise _bad(text, "it is not <slug>@<full revision>")
    return EntryId(name.slug, name.revision)


def _parse_hf(text: str, rest: str) -> Ref:
    name, at, revision = rest.partition("@")
    parts = name.split("/")
    if len(parts) > 2:
        raise _bad(text, "a Hub model has the form org/name: too many '/'")
    position = len(text) - len(rest)
    for part in parts:
        if not _HF_PART.fullmatch(part) or "--" in part or ".." in part:
            raise _bad(text, f"{part!r} at position {position} is not a Hub name")
        position += len(part) + 1
    if parts[-1].endswith(".git"):
        raise _bad(text, "a Hub name does not end in '.git'")
    if at:
        _check_revision(text, revision)
    return Ref(Scheme.HF, name, revision or None)


def _parse_file(text: str, rest: str) -> Ref:
    head, at, tail = rest.rpartition("@")
    revision = tail if at and is_commit(tail) and len(tail) == 64 else None
    quoted = head if revision else rest
    if not quoted.startswith("/"):
        raise _bad(text, "a directory is written file:///absolute/dir, with three slashes")
    if "?" in quoted or "#" in quoted:
        raise _bad(text, "'?' and '#' in a path are written %3F and %23")
    path = unquote(quoted)
    if _CONTROL.search(path):
        raise _bad(text, "the path has a control character")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _bad(text, "the path has a '..'")
    if not parts:
        raise _bad(text, "the path is the root directory")
    return Ref(Scheme.FILE, "/" + "/".join(parts), revision)


def _parse_blobs(text: str, rest: str) -> Ref:
    """`account/container[/prefix][@revision]`."""
    path, revision = _blob_parts(text, rest)
    if len(path) < 2:
        raise _bad(text, "blobs are named az://account/container[/prefix]")
    if not _ACCOUNT.fullmatch(path[0]):
        raise _bad(text, f"{path[0]!r} is no storage account (3 to 24 lower-case letters and digits)")
    _check_container(text, path[1])
    return Ref(Scheme.AZ, "/".join(path), revision)


def _parse_url(text: str) -> Ref:
    """The URL of blobs. Where the host is an address, `localhost` or has a port, the account is the first part of the path."""
    try:
        url = urlsplit(text)
        port = None if url.port == _PORTS[url.scheme] else url.port
        host = (url.hostname or "").lower()
    except ValueError:
        raise _bad(text, "it is no URL") from None
    if "@" in url.netloc:
        raise _bad("the URL", "it has a user name or a password")
    if not is_host(host):
        raise _bad(text, f"{host[:80]!r} is no host name or address (others: their IDNA form)" if host else "the URL has no host")
    if host in ("huggingface.co", "hf.co"):
        raise _bad(text, "a Hub model is written org/name")
    path, revision = _blob_parts(text, text.partition("://")[2].partition("/")[2])
    inside = _account_in_path(host, port)
    if len(path) < 1 + inside:
        raise _bad(text, f"the URL of blobs has the form {url.scheme}://{url.netloc}/{'account/' if inside else ''}container[/prefix]")
    _check_container(text, path[inside])
    account = host.removesuffix(_PUBLIC)
    if url.scheme == "https" and not inside and account != host and _ACCOUNT.fullmatch(account):
        return Ref(Scheme.AZ, "/".join([account, *path]), revision)
    return Ref(Scheme.AZ, f"{url.scheme}://{_authority(host, port)}/{'/'.join(path)}", revision)


def is_host(text: str) -> bool:
    """Whether `text` (in lower case) is an address or a plain host name: one that every library that takes URLs apart reads alike."""
    return _HOST.fullmatch(text) is not None or (":" in text and "%" not in text and _is_address(text))


def blobs_of(ref: Ref) -> tuple[str | None, str, str, str]:
    """Endpoint (None: the account's own, as configured), account, container and prefix (no slash at its ends) of an az reference."""
    if "://" not in ref.location:
        account, container, *rest = ref.location.split("/")
        return None, account, container, "/".join(rest)
    scheme, _, _, *path = ref.location.split("/")
    url = urlsplit(ref.location)
    host = url.hostname or ""
    if _account_in_path(host, url.port):
        account, container, *rest = path
        return f"{scheme}//{url.netloc}/{account}", account, container, "/".join(rest)
    return f"{scheme}//{url.netloc}", host.partition(".")[0], path[0], "/".join(path[1:])


def _account_in_path(host: str, port: int | None) -> bool:
    return host == "localhost" or port is not None or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _authority(host: str, port: int | None) -> str:
    host = f"[{host}]" if ":" in host else host
    return host if port is None else f"{host}:{port}"


def _blob_parts(text: str, rest: str) -> tuple[list[str], str | None]:
    """Path parts (unquoted) and revision. Blob names are free text; what a store could not hold is refused here."""
    if "?" in rest or "#" in rest:
        raise _bad(text, "it has a '?' or '#': in a name they are written %3F and %23; a SAS belongs into a file (az_sas_file), not into a name")
    head, at, tail = rest.rpartition("@")
    revision = tail if at and (is_commit(tail) or is_short(tail) or is_moment(tail)) else None
    if at and revision is None:
        raise _bad(text, f"{mask(tail)[:80]!r} is no revision of blobs: 64 hex digits, or a time such as 2026-01-31T12:00:00Z; '@' in a name is %40")
    path = unquote(head if at else rest)
    if _CONTROL.search(path):
        raise _bad(text, "a name has a control character")
    parts = path.strip("/").split("/") if path.strip("/") else []
    if any(part in ("", ".", "..") for part in parts):
        raise _bad(text, "the prefix has an empty, '.' or '..' part")
    return parts, revision


def _check_container(text: str, container: str) -> None:
    if not _CONTAINER.fullmatch(container):
        raise _bad(text, f"{container[:80]!r} is no container (3 to 63 lower-case letters, digits and single dashes)")


def _check_revision(text: str, revision: str) -> None:
    where = f"the revision at position {text.find('@') + 1}"
    if not revision:
        raise _bad(text, f"{where} is empty")
    if not _REVISION.fullmatch(revision) or ".." in revision or revision.startswith(("/", "-", ".")) or revision.endswith(("/", ".", ".lock")):
        raise _bad(text, f"{where} is not a branch, tag or commit")


def _escape(part: str) -> str:
    """One path part with everything but `[A-Za-z0-9_.]` and inner single `-` as `=XX`, so that parts can be joined by `--`."""
    out: list[str] = []
    raw = part.encode("utf-8", "surrogateescape")
    for i, byte in enumerate(raw):
        dash_unsafe = byte == 0x2D and (i in (0, len(raw) - 1) or raw[i - 1] == 0x2D)
        out.append(chr(byte) if byte in _SAFE and not dash_unsafe else f"={byte:02X}")
    return "".join(out)


def _bad(text: str, why: str) -> RequestError:
    return RequestError(Code.BAD_REFERENCE, f"cannot read model reference {_cut(text)!r}: {why}")


def _cut(text: str) -> str:
    return mask(re.split(r"[?#]", text, maxsplit=1)[0])[:200]  # what follows may be a signature
