"""Reads back the JSON that the store wrote: every field of the type it must have, or one error. It knows no record's form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nvcache.errors import Code, IntegrityError, RequestError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while a record is taken apart into `IntegrityError` (degraded) that names `what`."""
    try:
        yield
    except KeyError as error:
        raise IntegrityError(Code.DEGRADED, f"cannot read {what}: it has no {error}") from error
    except (TypeError, ValueError, RecursionError, RequestError, IntegrityError) as error:
        raise IntegrityError(Code.DEGRADED, f"cannot read {what}: {error}") from error


def record(data: bytes, form: int) -> dict[str, Any]:
    """The JSON object in `data`, of format `form`. Raises ValueError, KeyError."""
    raw = json.loads(data)
    if not isinstance(raw, dict):
        raise TypeError("it is not an object")
    if raw["format"] != form:
        raise ValueError(f"its format is {raw['format']!r}, this version knows {form}")
    return raw


def text(value: object) -> str:
    """A string, or TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} stands where a text is due")
    return value


def texts(value: object) -> tuple[str, ...]:
    """A list of strings, or TypeError."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} stands where a list of texts is due")
    return tuple(text(item) for item in value)


def count(value: object) -> int:
    """An integer that is not negative, or TypeError."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.80} stands where a size is due")
    return value


def flag(value: object) -> bool:
    """True or false, or TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r:.80} stands where true or false is due")
    return value


def moment(value: object) -> float:
    """A time in unix seconds, or TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise TypeError(f"{value!r:.80} stands where a time is due")
    return float(value)


def sha256(value: object) -> str:
    """64 hex digits in lower case, safe as a file name, or TypeError, ValueError."""
    if not _SHA256.fullmatch(text(value)):
        raise ValueError(f"{value!r:.80} is not a SHA-256")
    return text(value)


def commit(value: object) -> str | None:
    """A commit of the Hub, in hex, or None. Raises TypeError, ValueError."""
    if value is None:
        return None
    if not _COMMIT.fullmatch(text(value)):
        raise ValueError(f"{value!r:.80} is no commit")
    return text(value)
