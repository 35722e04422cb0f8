"""Loads the tensors of a model: prefetch, then a memory map, without a copy. It converts, shards and moves nothing, and writes to no file.

Each file is mapped privately and writable, as torch itself does: what a program changes in a tensor is its own page, the file and other processes
see nothing of it. Tensors keep the mapping alive.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from nvcache.client.header import Entry, entries, header_length
from nvcache.client.leases import Lease
from nvcache.client.mapping import map_file
from nvcache.client.model import Model
from nvcache.client.pagecache import directory_of
from nvcache.client.reading import reading, within

INDEX = "model.safetensors.index.json"
Framework = Literal["np", "pt"]
_NUMPY = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"{letter}{bits}": f"{kind}int{bits}" for letter, kind in (("I", ""), ("U", "u")) for bits in (8, 16, 32, 64)},
}
_OTHERS = {  # the names that torch and ml_dtypes share
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_View = Callable[[memoryview, Entry], Any]


def load_safetensors(
    path: str | PathLike[str] | Lease | Model, framework: Framework = "np", *, threads: int | None = None, limit_bytes: int | None = None
) -> dict[str, Any]:
    """Every tensor of a file, or of a model's directory, by name; returns when their bytes are in the page cache, as far as memory allows.

    Arguments and errors are those of `stream_safetensors`.
    """
    return dict(stream_safetensors(path, framework, threads=threads, limit_bytes=limit_bytes))


def stream_safetensors(
    path: str | PathLike[str] | Lease | Model, framework: Framework = "np", *, threads: int | None = None, limit_bytes: int | None = None
) -> Iterator[tuple[str, Any]]:
    """Name and tensor, each as soon as its bytes are in the page cache, while the rest is still being read (see `prefetch`): what is done with a
    tensor, such as copying it to a GPU, costs no extra time as long as it is faster than the disk.

    In a directory the index file says which shard has which tensor; without one every `*.safetensors` in it is read. Shards come in that order,
    tensors as they lie in them. "np" gives numpy arrays (bfloat16 and float8 by the package ml_dtypes), "pt" torch tensors.
    Raises ImportError without the package for `framework`, FileNotFoundError when there is nothing to load, ValueError for a damaged file, an index
    that does not fit, or a name that is in several files; OSError and TimeoutError as `prefetch`. All files are mapped before the first tensor comes:
    a model that is removed or replaced meanwhile is loaded to its end as it was.
    """
    package = _package(framework)
    directory = directory_of(path)
    mapped = within(lambda: [(file, names, map_file(file)) for file, names in _wanted(directory.resolve()).items()])
    seen: set[str] = set()
    with reading([file for file, _, _ in mapped], threads=threads, limit_bytes=limit_bytes) as begun:
        view = {"numpy": _arrays, "torch": _tensors}[package](import_module(package))  # torch takes as long as reading some GB
        for file, names, data in mapped:
            begun.wait(file, 8)  # a silent or broken disk is told of by `begun`; touching the mapping would end in SIGBUS
            length = header_length(file, data[:8], len(data))
            begun.wait(file, 8 + length)
            found = entries(file, bytes(data[8 : 8 + length]), len(data))
            if names is not None and (lost := names - {entry.name for entry in found}):
                raise ValueError(f"cannot load {file}: tensor {min(lost)!r}, which the index says is in it, is not")
            for entry in found:
                if names is None or entry.name in names:
                    if entry.name in seen:
                        raise ValueError(f"cannot load {file.parent}: tensor {entry.name!r} is in several files")
                    seen.add(entry.name)
                    begun.wait(file, entry.end)
                    yield entry.name, view(data, entry)


def _wanted(path: Path) -> dict[Path, set[str] | None]:
    """The files to open, in order, and the names to take from each (None: all)."""
    if not path.is_dir():
        return {path: None}
    index = path / INDEX
    if index.is_file():
        try:
            return dict(_indexed(path, json.loads(index.read_bytes())["weight_map"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"cannot load {path}: {INDEX} is damaged: {error}") from error
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"cannot load {path}: no safetensors file is in it")
    return dict.fromkeys(found)


def _indexed(path: Path, weight_map: dict[str, str]) -> dict[Path, set[str]]:
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not shard.isprintable() or shard.startswith("/") or ".." in shard.split("/"):
            raise ValueError(f"the shard {shard!r} of {name!r} would lie elsewhere")
        shards.setdefault(path / shard, set()).add(name)
    if not shards:
        raise ValueError("it names no tensor")
    return shards


def _package(framework: Framework) -> str:
    """What is imported for it. Raises ImportError, ValueError."""
    package = {"np": "numpy", "pt": "torch"}.get(framework)
    if package is None:
        raise ValueError(f"cannot load tensors for {framework!r}: it is neither np nor pt")
    if package not in sys.modules and find_spec(package) is None:
        raise ImportError(f"cannot load tensors: the package {package} is not installed")
    return package


def _arrays(numpy: Any) -> _View:
    def view(data: memoryview, entry: Entry) -> Any:
        name = _NUMPY.get(entry.dtype)
        try:
            dtype = numpy.dtype(name or getattr(import_module("ml_dtypes"), _OTHERS[entry.dtype]))
        except (ImportError, KeyError) as error:
            more = ", or install the package ml_dtypes" if entry.dtype in _OTHERS else ""
            raise ValueError(f"cannot load tensor {entry.name!r}: numpy has no {entry.dtype}; use framework='pt'{more}") from error
        return numpy.frombuffer(data, dtype, entry.count, entry.begin).reshape(entry.shape)

    return view


def _tensors(torch: Any) -> _View:
    def view(data: memoryview, entry: Entry) -> Any:
        shape, count = entry.shape, entry.count
        if entry.dtype == "F4":  # torch has them in pairs
            if not shape or shape[-1] % 2:
                raise ValueError(f"cannot load tensor {entry.name!r}: torch has F4 in pairs only, and its last dimension is odd")
            dtype, shape, count = torch.float4_e2m1fn_x2, (*shape[:-1], shape[-1] // 2), count // 2
        else:
            dtype = getattr(torch, _OTHERS.get(entry.dtype) or _NUMPY[entry.dtype])
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=entry.begin).reshape(shape)  # aligned or not, as the stock library

    return view
