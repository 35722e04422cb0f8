"""Understands the header of a safetensors file: which tensor lies where. It opens no file.

Format: 8 bytes of length, little-endian; that many bytes of JSON, name → {dtype, shape, data_offsets}; the data, to which offsets are relative
(github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 100_000_000  # bytes of JSON, as the format's own library has it
BITS = {
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Entry:
    """One tensor: where its bytes begin and end in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def header_length(path: Path, start: bytes | memoryview, size: int) -> int:
    """How many bytes of JSON follow the first eight bytes, `start`, of a file of `size` bytes. Raises ValueError when they cannot."""
    length = int.from_bytes(start, "little")
    if size < 8 or not 2 <= length <= min(LARGEST, size - 8):
        raise ValueError(f"cannot load {path}: it is no safetensors file, or was cut short")
    return length


def entries(path: Path, text: bytes, size: int) -> list[Entry]:
    """The tensors that the JSON of a file of `size` bytes describes, in the order of their bytes, which fill it without holes and overlaps.

    Raises ValueError when it is not a whole safetensors file.
    """
    try:
        document = json.loads(text.decode(), object_pairs_hook=_once)
        _check_metadata(document.pop("__metadata__", {}))
        found = sorted((_entry(name, about, 8 + len(text)) for name, about in document.items()), key=lambda entry: (entry.begin, entry.end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot load {path}: its header is damaged: {error}") from error
    at = 8 + len(text)
    for entry in found:
        if entry.begin != at:
            raise ValueError(f"cannot load {path}: tensor {entry.name!r} begins at byte {entry.begin}, and what lies before it ends at {at}")
        at = entry.end
    if at != size:
        raise ValueError(f"cannot load {path}: its tensors end at byte {at}, the file at {size}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is in it twice")
    return found


def _check_metadata(about: dict[str, str]) -> None:
    if not all(isinstance(value, str) for value in about.values()):
        raise ValueError("its metadata are not text")


def _entry(name: str, about: dict[str, Any], start: int) -> Entry:
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"tensor {name!r} has the type {dtype!r}, which is not known here")
    if not isinstance(shape, list) or len(offsets) != 2 or not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        raise ValueError(f"tensor {name!r} has a shape or place that is no number")
    bits = BITS[dtype]
    for number in shape:  # in steps: the product of a long shape would take the interpreter minutes
        bits *= number
        if bits >= 1 << 66:
            raise ValueError(f"tensor {name!r} has a shape beyond all sizes")
    entry = Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])
    if bits % 8 or entry.end - entry.begin != bits // 8:
        raise ValueError(f"tensor {name!r} has {entry.end - entry.begin} bytes, which does not fit its shape")
    return entry
