"""Model references and entry names: parse, canonical form, slug. It asks no source whether a model exists.

Grammar::

    hf://[org/]name[@revision]   org/name[@revision]   file:///absolute/dir[@<64 hex>]
    <slug>                       <slug>@<revision>     an entry of the store

For what is in the store, the first 7 to 39 digits of a revision name it as well, as `nvcache ls` shows them.

The Hub's rules for repository ids (ASCII letters, digits, `_ . -`, 96 characters a part, never `--` or `..`, not ending in `.git`) make `/` → `--`
injective; any other location is escaped so that `--` only ever separates parts.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from urllib.parse import quote, unquote

from nvcache.errors import Code, RequestError

SLUG_LIMIT = 180  # <slug>@<64 hex>.json is a file name: 255 bytes at most
_HF_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHORT = re.compile(r"[0-9a-f]{7,39}")
_REVISION = re.compile(r"[A-Za-z0-9_.+=/-]{1,200}")
_SLUG = re.compile(r"[a-z]+--[A-Za-z0-9_.=-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class Scheme(StrEnum):
    """Where weights come from."""

    HF = "hf"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Ref:
    """A model at a source. `location` is `org/name` or an absolute path; `revision` is None for the source's default."""

    scheme: Scheme
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.base if self.revision is None else f"{self.base}@{self.revision}"

    @property
    def base(self) -> str:
        """The canonical form without a revision."""
        return f"{self.scheme}://{quote(self.location, safe='/:+,~')}"

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
    return RequestError(Code.BAD_REFERENCE, f"cannot read model reference {text[:200]!r}: {why}")
