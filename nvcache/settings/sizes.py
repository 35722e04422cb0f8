"""Sizes as people write them, `140GB` or `2TiB`, and back. It knows no setting."""

from __future__ import annotations

import re
from fractions import Fraction

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(I?)B?")
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """`140GB`, `1.5 TiB`, `1024` → bytes, rounded down. Raises ValueError."""
    match = _SIZE.fullmatch(text.replace(" ", "").upper())
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text[:80]!r} is not a size such as 140GB or 2TiB")
    return int(Fraction(match[1]) * (1024 if match[3] else 1000) ** _EXPONENT[match[2]])


def format_size(size: int) -> str:
    """Bytes as they would be written in the file, exactly: the shortest that `parse_size` reads back."""
    written = [str(size)]
    for power, unit in enumerate("KMGT", 1):
        written += [f"{size // base**power}{unit}{letter}" for base, letter in ((1000, "B"), (1024, "iB")) if size and size % base**power == 0]
    return min(written, key=len)
