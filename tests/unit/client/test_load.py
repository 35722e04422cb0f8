"""Tensors come back as they were written: from a file, a directory, an index."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nvcache.client import load_safetensors


def test_a_file(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "x.safetensors")
    tensors = load_safetensors(tmp_path / "x.safetensors")
    assert list(tensors) == ["a"]
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_torch_tensors_are_views_of_the_mapping(tmp_path: Path) -> None:
    save_file({"a": np.arange(4096, dtype=np.int64)}, tmp_path / "x.safetensors")
    tensor = load_safetensors(str(tmp_path), "pt")["a"]
    assert tensor[:4].tolist() == [0, 1, 2, 3]
    rows = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("x.safetensors")]
    assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in rows)


def test_the_index_says_which_shard_has_which_tensor(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1), "old": np.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(1), "a": np.ones(1)}, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert {name: float(value[0]) for name, value in load_safetensors(tmp_path).items()} == {"a": 0.0, "b": 1.0}


def test_without_an_index_a_name_may_occur_once(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(1)}, tmp_path / "2.safetensors")
    assert sorted(load_safetensors(tmp_path)) == ["a", "b"]
    save_file({"a": np.zeros(1)}, tmp_path / "3.safetensors")
    with pytest.raises(ValueError, match="tensor 'a' is in several files"):
        load_safetensors(tmp_path)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        load_safetensors(tmp_path)


def test_the_client_needs_only_the_standard_library() -> None:
    """With nothing but the standard library on the path the client imports, and says what loading needs."""
    root = Path(__file__).parents[3]
    script = """
try:
    nvcache.client.load_safetensors("/x")
except ImportError as error:
    print(error)
print([name for name in sys.modules if name.startswith("nvcache.") and not name.startswith("nvcache.client")])
"""
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(root)!r}); import nvcache.client\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "cannot load tensors: the package safetensors is not installed; pip install 'nvcache[load]'\n[]\n"
