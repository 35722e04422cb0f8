"""Checks safetensors headers and weight indexes, given as bytes. It reads no file and never looks at a tensor's values.

The rules are those of safetensors 0.8 (github.com/huggingface/safetensors: the README's format section and `Metadata::validate`), made strict where
the library takes the last of two equal JSON keys. What would keep a loader from opening the file is fatal; what is merely untidy in a file that
matches its source (a wrong total size, a tensor in another shard than the index says) is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isinf
from pathlib import PurePosixPath
from typing import Any, NamedTuple, NoReturn

from nvcache.core.names import unsafe
from nvcache.core.selection import is_safetensors
from nvcache.errors import Code, IntegrityError

HEADER_CAP = 100_000_000  # the library's own limit
LENGTH_BYTES = 8
U64 = 2**64
DEPTH_CAP = 125  # serde_json refuses 128 levels; a field of a tensor begins at the third
METADATA = "__metadata__"
INDEX_MARK = ".safetensors.index."  # model.safetensors.index.json, diffusion_pytorch_model.safetensors.index.fp16.json

DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class Tensor(NamedTuple):
    """One tensor of a header. `begin` and `end` are bytes counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _HeaderError(ValueError):
    """Why a header cannot be used; `parse_header` adds which file it is."""


def header_length(first8: bytes, file_size: int, name: str = "") -> int:
    """The length in bytes of the JSON header, from a file's first eight bytes. Raises `IntegrityError` (bad-safetensors)."""
    if file_size < LENGTH_BYTES or len(first8) < LENGTH_BYTES:
        raise _bad(name, f"it has {file_size} bytes, fewer than the {LENGTH_BYTES} that give the header's length")
    length = int.from_bytes(first8[:LENGTH_BYTES], "little")
    if length > HEADER_CAP:
        raise _bad(name, f"its header claims {length} bytes, more than the {HEADER_CAP} allowed")
    if LENGTH_BYTES + length > file_size:
        raise _bad(name, f"its header claims {length} bytes, but the file has {file_size}")
    return length


def parse_header(header: bytes, file_size: int, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file `name` of `file_size` bytes, from its whole JSON header (without the eight length bytes).

    Raises `IntegrityError` (bad-safetensors) on all that safetensors refuses, and on duplicate keys.
    """
    try:
        tensors = _tensors(_strict_json(header))
        end = _contiguous(tensors)
    except RecursionError as error:
        raise _bad(name, "its header is nested too deep") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise _bad(name, f"its header is broken: {error}") from error
    data = file_size - LENGTH_BYTES - len(header)
    if end != data:
        raise _bad(name, f"its tensors take {end} bytes, but {data} follow the header")
    return tensors


def is_index(path: str) -> bool:
    """Whether `path` is an index that says which tensor is in which safetensors file."""
    return INDEX_MARK in PurePosixPath(path).name and path.endswith(".json")


def index_files(paths: Iterable[str]) -> list[str]:
    """The indexes among `paths`, sorted; each speaks for the folder it is in."""
    return sorted(path for path in paths if is_index(path))


def check_weights(files: Mapping[str, int], headers: Mapping[str, Mapping[str, Tensor]], indexes: Mapping[str, bytes]) -> list[str]:
    """Check every index against the repository and the shards' headers; returns warnings, one sentence each.

    `files`: path → size of every file the repository has, also those the selection leaves out (a shard left out on purpose is not missing).
    `headers`: path → tensors of the safetensors files that were taken. `indexes`: path → content of the indexes that were taken.
    Raises `IntegrityError` (bad-index) when an index cannot be read, or names a file the repository does not have or a path outside its folder.
    """
    return [warning for path in sorted(indexes) for warning in check_index(files, indexes[path], path, headers)]


def check_index(files: Mapping[str, int], index: bytes, index_path: str, headers: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """`check_weights` for the one index at `index_path`."""
    duplicates: list[str] = []
    total, weight_map = _read_index(index, index_path, duplicates)
    folder = PurePosixPath(index_path).parent
    shards: dict[str, str] = {}  # as the index names it → its path in the repository
    for shard in dict.fromkeys(weight_map.values()):
        _check_shard(shard, index_path)
        shards[shard] = str(folder / shard)
    missing = [path for path in shards.values() if path not in files]
    if missing:
        raise _bad_index(index_path, f"it names {_some(missing)}, which the repository does not have")
    warnings = [f"{index_path} lists {_some(duplicates)} twice"] if duplicates else []
    single = str(folder / (PurePosixPath(index_path).name.partition(INDEX_MARK)[0] + ".safetensors"))
    if single in files and single not in shards.values():
        warnings.append(f"{single} is beside {index_path}: some loaders take the single file, some the shards")
    absent = [path for path in shards.values() if path not in headers]
    if absent:
        return [*warnings, f"{index_path} names {_some(absent)}, which the selection leaves out"]
    return [*warnings, *_compare(index_path, weight_map, {shard: headers[path] for shard, path in shards.items()}, total)]


def _compare(index_path: str, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, Tensor]], total: object) -> Iterable[str]:
    """What an index says against what its shards hold. Loaders pass over all of this, so it is only told."""
    holders = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    misplaced = [tensor for tensor, shard in weight_map.items() if tensor in holders and tensor not in shards[shard]]
    lacking = [tensor for tensor in weight_map if tensor not in holders]
    extra = [tensor for tensor in holders if tensor not in weight_map]
    if misplaced:
        yield f"{index_path} puts {_some(misplaced)} into another shard than the one that has it"
    if lacking:
        yield f"{index_path} names {_some(lacking)}, which no shard has"
    if extra:
        yield f"{index_path} does not name {_some(extra)}, which the shards have"
    held = sum(tensor.end - tensor.begin for tensors in shards.values() for tensor in tensors.values())
    if total is not None and total != held:
        yield f"{index_path} says total_size {total}, the tensors have {held} bytes"


def _read_index(index: bytes, path: str, duplicates: list[str]) -> tuple[object, dict[str, str]]:
    """`metadata.total_size` (None where it is not given) and `weight_map` of an index; keys given twice are added to `duplicates`."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            duplicates.extend(_duplicates(found))
        return made

    try:
        raw = json.loads(index.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise _bad_index(path, f"it is not JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _bad_index(path, "it has no weight_map of tensor names to file names")
    metadata = raw.get("metadata")
    return metadata.get("total_size") if isinstance(metadata, dict) else None, weight_map


def _check_shard(shard: str, index_path: str) -> None:
    """Raises `IntegrityError` (bad-index) unless a shard is a safetensors file inside the folder of its index."""
    why = unsafe(shard) or (None if is_safetensors(shard) else "it is not a .safetensors file")
    if why:
        raise _bad_index(index_path, f"it names {shard[:120]!r} as a shard: {why}")


def _strict_json(header: bytes) -> object:
    """JSON as serde_json reads it (RFC 8259, numbers within a double, no lone surrogates), without duplicate keys. Raises ValueError."""
    text = header.decode()
    raw: object = json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_constant)
    if "\\u" in text:
        json.dumps(raw, ensure_ascii=False).encode()  # raises on a lone surrogate, which only an escape can make
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _HeaderError(f"duplicate key {_some(_duplicates(pairs))}")
    return made


def _duplicates(pairs: list[tuple[str, Any]]) -> list[str]:
    seen: set[str] = set()
    return [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


def _integer(text: str) -> int | float:
    """An integer that 64 bits hold; else a float, as the library reads it (also `-0`), which is no valid size."""
    if len(text) < 20 and text != "-0":
        return int(text)
    return int(text) if len(text) == 20 and text[0] != "-" and int(text) < U64 else _finite(text)


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise _HeaderError(f"number out of range: {text[:40]}")
    return value


def _constant(text: str) -> NoReturn:
    raise _HeaderError(f"{text} is not JSON")


def _tensors(raw: object) -> dict[str, Tensor]:
    """The entries of a parsed header, each of the right form and size. Raises _HeaderError."""
    if not isinstance(raw, dict):
        raise _HeaderError("it is not an object")
    metadata = raw.pop(METADATA, None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise _HeaderError(f"{METADATA} is not a map of strings to strings")
    return {name: _tensor(name, entry) for name, entry in raw.items()}


def _tensor(name: str, entry: object) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **others}:
            pass
        case _:
            raise _HeaderError(f"tensor {name[:120]!r} has not the form {{dtype, shape, data_offsets: [begin, end]}}")
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise _HeaderError(f"tensor {name[:120]!r} has unknown dtype {dtype[:40]!r}")
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise _HeaderError(f"tensor {name[:120]!r} has {str(number)[:40]} where a size is due")
    if others and not _shallow(list(others.values())):
        raise _HeaderError(f"tensor {name[:120]!r} is nested too deep")
    elements = 1
    for length in shape:
        elements *= length
        if elements >= U64:
            raise _HeaderError(f"tensor {name[:120]!r} has a shape too large to count")
    bits *= elements
    if bits % 8 or bits // 8 != end - begin:
        raise _HeaderError(f"tensor {name[:120]!r} needs {bits} bits for its shape, but has bytes {begin} to {end}")
    return Tensor(dtype, tuple(shape), begin, end)


def _contiguous(tensors: Mapping[str, Tensor]) -> int:
    """Where the last tensor ends, given that they follow each other from 0 without hole or overlap. Raises _HeaderError."""
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != at:
            raise _HeaderError(f"tensor {name[:120]!r} begins at byte {tensor.begin}, not at {at} where the one before it ends")
        at = tensor.end
    return at


def _shallow(level: list[Any]) -> bool:
    """Whether unknown fields (which loaders pass over) are nested no deeper than the library reads."""
    for _ in range(DEPTH_CAP):
        level = [child for value in level if isinstance(value, dict | list) for child in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return True
    return False


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(name[:120] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _bad(name: str, why: str) -> IntegrityError:
    return IntegrityError(Code.BAD_SAFETENSORS, f"cannot use safetensors file {name or '(unnamed)'}: {why}", facts={"file": name} if name else None)


def _bad_index(path: str, why: str) -> IntegrityError:
    return IntegrityError(Code.BAD_INDEX, f"cannot use weights index {path}: {why}", facts={"file": path})
