"""The generated models are what tests take them for: real headers, the asked size, the same bytes each time, loadable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from nvcache.core.shards import check_weights, header_length, parse_header
from tests.support.models import make_llama


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize(("size", "shards"), [(400_000, 1), (3_000_000, 2), (10_000_000, 7)])
def test_size_shards_and_index(tmp_path: Path, size: int, shards: int) -> None:
    """Weights within a row of the size, in that many files, all named by the index and accepted by our own checks."""
    make_llama(tmp_path, size, shards)
    weights = sorted(tmp_path.glob("*.safetensors"))
    assert len(weights) == shards
    headers, total = {}, 0
    for path in weights:
        raw = path.read_bytes()
        length = header_length(raw[:8], len(raw))
        headers[path.name] = parse_header(raw[8 : 8 + length], len(raw), path.name)
        total += len(raw) - 8 - length
        with safe_open(path, "numpy") as tensors:
            assert set(tensors.keys()) == set(headers[path.name])
    assert 0 <= size - total < 3000
    indexes = {path.name: path.read_bytes() for path in tmp_path.glob("*.index.json")}
    assert len(indexes) == (shards > 1)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert check_weights(files, headers, indexes) == []


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    """And another seed gives others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_llama(tmp_path / name, 500_000, 2, seed)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}


def test_too_small_is_refused(tmp_path: Path) -> None:
    """A Llama of ten bytes."""
    with pytest.raises(ValueError, match="too few"):
        make_llama(tmp_path, 10)
    assert json.dumps([*tmp_path.iterdir()]) == "[]"
