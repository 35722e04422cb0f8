"""The settings' TOML file: read, bounded, where in it a setting is, and known again when it changed. It judges no setting and watches nothing."""

from __future__ import annotations

import hashlib
import stat
import tomllib
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvcache.errors import Code, ConfigError

MOST_BYTES = 1 << 20  # as large as a ConfigMap can be
MOST_LINES = 100  # of one value, when its line is looked for
NAME = "name the file with --config or NVCACHE_CONFIG"
QUOTE = 'correct the file there; texts and sizes stand in quotes, as in max_bytes = "2TB"'


@dataclass(frozen=True, slots=True)
class Document:
    """A file that was read: its tables and settings, and its text."""

    values: dict[str, Any]
    text: str

    def line(self, setting: str) -> int | None:
        """The line at which a setting begins, from 1, or the table that lacks it; `setting` has the path, such as `models.0.ref`.

        The file itself says so: read up to there it lacks the setting, read on it has it. None where that cannot be told.
        """
        path: tuple[int | str, ...] = tuple(int(part) if part.isdigit() else part for part in setting.split("."))
        while path and not _has(self.values, path):
            path = path[:-1]
        name = next((part for part in reversed(path) if isinstance(part, str)), None)
        if name is None:
            return None
        lines = self.text.split("\n")
        named = [number for number, line in enumerate(lines) if name in line]
        at = bisect_left(named, True, key=lambda number: _has(_part(lines[:number]), path))
        if at == 0 or _part(lines[: named[at - 1]]) is None:
            return None
        begin = named[at - 1]
        whole = (_part(lines[:end]) for end in range(begin + 1, min(begin + MOST_LINES, len(lines)) + 1))
        return begin + 1 if _has(next((found for found in whole if found is not None), None), path) else None


@dataclass(frozen=True, slots=True)
class Glance:
    """The file as it was seen. `identity` tells cheaply that it is the same; `content` stands for its bytes, or without `identity` for why they
    cannot be read.
    """

    identity: tuple[int, ...]
    content: str


def read(path: Path) -> Document:
    """The file's tables and settings. Raises `ConfigError` (bad-config)."""
    try:
        content = _bytes(path)
        text = content.decode().replace("\r\n", "\n")
        return Document(tomllib.loads(text), text)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise unreadable(path, f"it is not text in UTF-8 (at line {line})", "write it anew as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise unreadable(path, str(error), QUOTE) from error
    except RecursionError as error:
        raise unreadable(path, "its brackets are nested too deeply", QUOTE) from error
    except ValueError as error:
        raise unreadable(path, str(error)) from error


def glance(path: Path, before: Glance | None = None) -> Glance:
    """The file as it is now, at the price of one stat where it is as `before`. Links are followed: a mounted ConfigMap changes by one of them."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return Glance((), "it is not a file")  # a pipe would be waited for
        identity = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        if before is not None and before.identity == identity:
            return before
        return Glance(identity, hashlib.sha256(_bytes(path)).hexdigest())
    except OSError as error:
        return Glance((), error.strerror or str(error))
    except ValueError as error:
        return Glance((), str(error))


def _bytes(path: Path) -> bytes:
    """Its content. Raises ValueError for one that is too large to be settings."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    return content


def unreadable(path: Path, why: str, hint: str = NAME) -> ConfigError:
    """The error for a file of which nothing can be read."""
    return ConfigError(Code.BAD_CONFIG, f"cannot read config file {path}: {why}", hint=hint)


def _part(lines: list[str]) -> dict[str, Any] | None:
    """What the first lines of a file say; None where they end within a value."""
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return None


def _has(values: object, path: tuple[int | str, ...]) -> bool:
    for part in path:
        if isinstance(values, dict):
            if part not in values:
                return False
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            return False
    return True
