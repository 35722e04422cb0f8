"""Tensors of a model by memory map: a thin convenience over the package safetensors. It converts, shards and moves nothing.

With framework "pt" the tensors are views of the mapping; "np" copies each tensor, as the package does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

INDEX = "model.safetensors.index.json"


def load_safetensors(path: str | Path, framework: Literal["np", "pt"] = "np") -> dict[str, Any]:
    """Every tensor of a file, or of a model's directory, by name.

    In a directory the index file says which shard has which tensor; without one every `*.safetensors` in it is read, and a name that occurs twice
    is an error. Raises ImportError without the package (`pip install 'nvcache[load]'`), FileNotFoundError when there is nothing to load, ValueError.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("cannot load tensors: the package safetensors is not installed; pip install 'nvcache[load]'") from error
    tensors: dict[str, Any] = {}
    for file, wanted in _files(Path(path)):
        with safe_open(file, framework=framework) as opened:
            for name in opened.keys() if wanted is None else wanted:
                if name in tensors:
                    raise ValueError(f"cannot load {path}: tensor {name!r} is in several files")
                tensors[name] = opened.get_tensor(name)
    return tensors


def _files(path: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """Each file to open, and the names to take from it (None: all)."""
    if not path.is_dir():
        yield path, None
        return
    index = path / INDEX
    if index.is_file():
        shards: dict[str, list[str]] = {}
        for name, shard in json.loads(index.read_bytes())["weight_map"].items():
            shards.setdefault(shard, []).append(name)
        for shard, names in shards.items():
            yield path / shard, names
        return
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"cannot load {path}: no safetensors file is in it")
    for file in found:
        yield file, None
