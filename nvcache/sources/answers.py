"""What an answer to a range request means: the length of its body, or the error it is. Pure; it reads no body and asks nothing again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message

from nvcache.errors import Code, IntegrityError, SourceError

POINTER = b"version https://git-lfs.github.com/spec/"
HEAD = 512  # bytes of a body that `wrong_size` wants to see
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_HUB_CODES = {  # X-Error-Code of the Hub
    "RepoNotFound": Code.REPOSITORY_NOT_FOUND,
    "RevisionNotFound": Code.REVISION_NOT_FOUND,
    "EntryNotFound": Code.FILE_NOT_FOUND,
    "GatedRepo": Code.GATED,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of whom: bytes start…stop (exclusive) of a file of `size` bytes."""

    name: str
    origin: str
    start: int
    stop: int
    size: int

    @property
    def what(self) -> str:
        """How every message about it begins."""
        return f"cannot fetch {self.name} from {self.origin}"

    def error(self, code: Code, why: str, *, retryable: bool | None = None) -> SourceError:
        """A `SourceError` about it."""
        return SourceError(code, f"{self.what}: {why}", retryable=retryable)


class WrongSizeError(Exception):
    """The answer is about a file of another size; `wrong_size` says what that means once the head of the body is known."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def body_length(status: int, headers: Message, asked: Asked) -> int | None:
    """Bytes in the body of a 206, which begins at `asked.start`; None for a 200: the whole file comes (RFC 9110 §14.4, §15.3.7).

    A 206 may bring fewer bytes than were asked for, never others. Raises `SourceError` (source-protocol) and `WrongSizeError`.
    """
    coding = headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise asked.error(Code.SOURCE_PROTOCOL, f"the answer has Content-Encoding {coding[:20]!r}, which was not asked for")
    kind = headers.get("Content-Type", "").strip().lower()
    length = headers.get("Content-Length")
    if status == 200:
        if length is None and kind.startswith("text/html") and not asked.name.endswith((".html", ".htm")):
            raise portal(asked)
        if length is not None and length != str(asked.size):
            raise WrongSizeError(_size(length))
        return None
    if kind.startswith("multipart/"):
        raise asked.error(Code.SOURCE_PROTOCOL, "the answer to one range has several parts")
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if found is None:
        raise asked.error(Code.SOURCE_PROTOCOL, "a 206 without a readable Content-Range")
    start, stop = int(found[1]), int(found[2]) + 1
    if found[3] != "*" and int(found[3]) != asked.size:
        raise WrongSizeError(int(found[3]))
    if start != asked.start or not start < stop <= asked.stop:
        raise asked.error(Code.SOURCE_PROTOCOL, f"bytes {asked.start}-{asked.stop - 1} were asked for, {start}-{stop - 1} came")
    if length is not None and length != str(stop - start):
        raise asked.error(Code.SOURCE_PROTOCOL, f"Content-Length {length[:20]!r} contradicts Content-Range")
    return stop - start


def _size(text: str) -> int:
    """A size as a header has it; -1 for what no size can be: Python makes no number of thousands of digits."""
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else -1


def unsatisfiable(headers: Message, asked: Asked) -> SourceError | IntegrityError:
    """What a 416 means. Only ranges inside the listed size are asked for, so the file is shorter than that, unless the answer says otherwise."""
    total = headers.get("Content-Range", "").removeprefix("bytes */")
    if total == str(asked.size):
        return asked.error(Code.SOURCE_PROTOCOL, "it refuses a range that is inside the file (416)")
    return wrong_size(asked, _size(total), b"")


def wrong_size(asked: Asked, size: int, head: bytes) -> SourceError | IntegrityError:
    """The error for an answer about `size` bytes (-1: unknown) whose body begins with `head`: a pointer, somebody's web page, or another file."""
    if head.startswith(POINTER):
        return IntegrityError(Code.POINTER_FILE, f"{asked.what}: a git-lfs pointer came instead of the file")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")) and not asked.name.endswith((".html", ".htm")):
        return portal(asked)
    has = f"has {size:,}" if size >= 0 else "has fewer"
    what = f"{asked.what}: it is listed with {asked.size:,} bytes and {has}"
    hint = "so few bytes may be a git-lfs pointer: the mirror lacks its LFS objects" if 0 <= size < 200 < asked.size else None
    return IntegrityError(Code.SIZE_MISMATCH, what, hint=hint)


def portal(asked: Asked) -> SourceError:
    """Somebody between us and the source answers."""
    return asked.error(Code.SOURCE_PROTOCOL, "a web page came instead of the file (a captive portal or a proxy answers for it)")


def permanent(status: int, headers: Message, asked: Asked, *, authorised: bool) -> SourceError:
    """The error for a status that trying again does not mend; `authorised`: a credential was sent. The Hub names the cause in X-Error-Code."""
    said = re.sub(r"[^\x20-\x7e]", "", headers.get("X-Error-Message", ""))[:200]
    code = _HUB_CODES.get(headers.get("X-Error-Code", ""))
    if code is None and status == 401:
        code = Code.BAD_TOKEN if authorised else Code.SOURCE_FORBIDDEN
    if code is None:
        code = {403: Code.SOURCE_FORBIDDEN, 404: Code.FILE_NOT_FOUND, 410: Code.FILE_NOT_FOUND, 451: Code.SOURCE_FORBIDDEN}.get(status)
    return asked.error(code or Code.SOURCE_FAILED, f"it answers {status}{f': {said}' if said else ''}", retryable=False)


def strong(etag: str | None) -> str | None:
    """An ETag that names exactly these bytes, or None (RFC 9110 §8.8.1)."""
    return None if not etag or etag.startswith("W/") else etag
