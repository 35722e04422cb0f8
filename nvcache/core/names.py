"""Refuses file names that are not safe to create or that collide. It touches no file system; `store.files` opens with O_NOFOLLOW besides."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nvcache.errors import Code, IntegrityError

NAME_BYTES = 255
PATH_BYTES = 1024  # leaves room for the store's own prefix below PATH_MAX (4096)
UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
"""The inside of a regular expression's brackets: characters that make a terminal or an editor show other text than what is there. Control characters,
line and paragraph separators, and what turns the direction of writing round (Unicode standard annex 9, "Directional Formatting Characters")."""
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")


def check_name(path: str) -> None:
    """Raises `IntegrityError` (hostile-name) unless `path` is a relative path that stays inside its directory on every file system."""
    why = unsafe(path)
    if why:
        raise IntegrityError(Code.HOSTILE_NAME, f"cannot store file {path[:120]!r}: {why}")


def check_names(paths: Iterable[str]) -> None:
    """`check_name` for each, then refuse names that collide with each other.

    Raises `IntegrityError`: hostile-name, or listing-conflict for case-colliding names, a file that is also a folder, and duplicates.
    """
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        check_name(path)
        key = path.casefold()
        if key in files:
            what = "is listed twice" if files[key] == path else f"differs from {files[key]!r} only in case"
            raise IntegrityError(Code.LISTING_CONFLICT, f"cannot store file {path!r}: it {what}")
        files[key] = path
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            known = folders.setdefault(folder.casefold(), folder)
            if known != folder:
                raise IntegrityError(Code.LISTING_CONFLICT, f"cannot store file {path!r}: folder {folder!r} differs from {known!r} only in case")
    for key, path in files.items():
        if key in folders:
            raise IntegrityError(Code.LISTING_CONFLICT, f"cannot store file {path!r}: {folders[key]!r} is also a folder")


def unsafe(path: str) -> str | None:
    """Why `path` may not be created below a directory, or None."""
    if not path:
        return "the name is empty"
    if path.startswith("/"):
        return "the path is absolute"
    if "\\" in path:
        return "it has a backslash"
    if _UNPRINTABLE.search(path):
        return "it has a control character, or one that turns the direction of writing round"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(raw) > PATH_BYTES:
        return f"the path is longer than {PATH_BYTES} bytes"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "it has an empty, '.' or '..' segment"
        if len(part.encode()) > NAME_BYTES:
            return f"a name in it is longer than {NAME_BYTES} bytes"
    return None
