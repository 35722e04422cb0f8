"""Exit codes by cause: the one table. It prints nothing and exits nothing; `__main__` does."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from nvcache.errors import Code


class Exit(IntEnum):
    """What a script may rely on; numbers never change meaning."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    SOURCE = 5
    INTEGRITY = 6
    SPACE = 7
    TIMEOUT = 8
    DAEMON = 9
    HELD = 10
    DISK = 11
    UNREADABLE = 12
    INTERRUPTED = 130


MEANING: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.INTERNAL: "a defect in nvcache, or `doctor` found something that does not work",
    Exit.USAGE: "the command line, a model reference or a setting is wrong",
    Exit.NOT_FOUND: "the node has no such model or it is not ready (`path`), or the source has no such repository or revision",
    Exit.REFUSED: "gated, private or refused by the source, or this socket or user may not do that",
    Exit.SOURCE: "the source cannot be reached, stalls, is busy or answers nonsense",
    Exit.INTEGRITY: "bytes are wrong: at the source, or on the disk and not repaired",
    Exit.SPACE: "the model does not fit, now or ever",
    Exit.TIMEOUT: "not finished in the time given; the fill goes on in the daemon",
    Exit.DAEMON: "the daemon cannot be reached",
    Exit.HELD: "pinned, leased, in use or ambiguous; another nvcache works on the disks",
    Exit.DISK: "the node's disks failed, do not answer, or are refused",
    Exit.UNREADABLE: "the model is ready on the node, but not to be read from here: a mount is missing, or not for this user",
    Exit.INTERRUPTED: "interrupted (Ctrl-C), or the job was cancelled",
}

_BY_CAUSE: dict[Exit, tuple[Code, ...]] = {
    Exit.INTERNAL: (Code.INTERNAL, Code.WORKER_DIED),
    Exit.USAGE: (
        Code.BAD_REFERENCE,
        Code.BAD_REQUEST,
        Code.BAD_CONFIG,
        Code.STORE_FOREIGN,
        Code.STORE_FORMAT,
        Code.STORE_LOCKED,
        Code.STORE_READONLY,
        Code.STORE_UNFIT,
        Code.SOCKET_IN_USE,
    ),
    Exit.NOT_FOUND: (
        Code.UNKNOWN_MODEL,
        Code.UNKNOWN_JOB,
        Code.UNKNOWN_LEASE,
        Code.UNKNOWN_BLOB,
        Code.NOT_READY,
        Code.REPOSITORY_NOT_FOUND,
        Code.REVISION_NOT_FOUND,
        Code.FILE_NOT_FOUND,
    ),
    Exit.REFUSED: (Code.GATED, Code.BAD_TOKEN, Code.SOURCE_FORBIDDEN, Code.NOT_ALLOWED, Code.UNAUTHORIZED),
    Exit.SOURCE: (
        Code.SOURCE_UNREACHABLE,
        Code.SOURCE_STALLED,
        Code.SOURCE_BUSY,
        Code.SOURCE_FAILED,
        Code.SOURCE_TLS,
        Code.SOURCE_PROTOCOL,
        Code.SOURCE_CHANGED,
        Code.NEEDS_XET,
        Code.ARCHIVED,
    ),
    Exit.INTEGRITY: (
        Code.DIGEST_MISMATCH,
        Code.NO_DIGEST,
        Code.SIZE_MISMATCH,
        Code.POINTER_FILE,
        Code.BAD_SAFETENSORS,
        Code.BAD_INDEX,
        Code.HOSTILE_NAME,
        Code.LISTING_CONFLICT,
        Code.DEGRADED,
    ),
    Exit.SPACE: (Code.TOO_LARGE, Code.FULL, Code.DISK_FULL),
    Exit.TIMEOUT: (Code.TIMEOUT,),
    Exit.DAEMON: (Code.DAEMON_UNREACHABLE, Code.STARTING, Code.STOPPING),
    Exit.HELD: (Code.AMBIGUOUS_REVISION, Code.LEASED, Code.PINNED, Code.IN_USE, Code.ALIAS_CONFLICT, Code.DISKS_BUSY),
    Exit.DISK: (
        Code.DISK_IO,
        Code.DISK_STALLED,
        Code.NO_STRIPE,
        Code.DISKS_REFUSED,
        Code.TOOL_MISSING,
        Code.TOOL_FAILED,
        Code.TOOL_STALLED,
    ),
    Exit.UNREADABLE: (Code.UNREADABLE,),
    Exit.INTERRUPTED: (Code.CANCELLED,),
}
EXIT_OF: dict[Code, Exit] = {code: exit_ for exit_, codes in _BY_CAUSE.items() for code in codes}

# Which of several causes a command reports: what a person must mend before what passes by itself.
_WORST_FIRST = (
    Exit.INTERRUPTED,
    Exit.INTERNAL,
    Exit.DISK,
    Exit.INTEGRITY,
    Exit.USAGE,
    Exit.UNREADABLE,
    Exit.NOT_FOUND,
    Exit.REFUSED,
    Exit.SPACE,
    Exit.HELD,
    Exit.SOURCE,
    Exit.DAEMON,
    Exit.TIMEOUT,
    Exit.OK,
)


def exit_of(code: str) -> Exit:
    """The exit code of an error code; one that this version does not know (a newer daemon's) counts as internal."""
    return EXIT_OF[Code(code)] if code in Code.__members__.values() else Exit.INTERNAL


def worst(exits: Iterable[Exit]) -> Exit:
    """The one to report of several; `OK` of none."""
    return min(exits, key=_WORST_FIRST.index, default=Exit.OK)
