"""Reads the safetensors headers and indexes of an entry from its blobs and has `core.shards` judge them. It reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nvcache.core.selection import is_safetensors
from nvcache.core.shards import Tensor, check_weights, header_length, is_index, parse_header
from nvcache.store.files import disk_errors

INDEX_CAP = 100_000_000


def check_files(files: Mapping[str, tuple[str, int]]) -> list[str]:
    """Parse every safetensors header and index among `files` (path → blob path, size) and return warnings.

    A file whose blob path is "" is listed by the repository but not here.
    Raises `IntegrityError`: bad-safetensors or bad-index for what is fatal.
    """
    headers: dict[str, Mapping[str, Tensor]] = {}
    indexes: dict[str, bytes] = {}
    for path, (blob, size) in files.items():
        if not blob:
            continue
        if is_safetensors(path):
            headers[path] = parse_header(_header(Path(blob), size, path), size, path)
        elif is_index(path):
            with disk_errors(f"read {path}"), Path(blob).open("rb") as file:
                indexes[path] = file.read(INDEX_CAP + 1)
    return check_weights({path: size for path, (_, size) in files.items()}, headers, indexes)


def _header(blob: Path, size: int, path: str) -> bytes:
    with disk_errors(f"read the header of {path}"), blob.open("rb") as file:
        return file.read(header_length(file.read(8), size, path))
