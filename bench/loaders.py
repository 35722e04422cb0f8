"""Loads a model once, in this process, by one of the loaders that are compared, and hashes what it got. It drops no cache and compares nothing.

``python -m bench.loaders ROW DIR [--hold]`` loads every tensor of the safetensors files in DIR, hashes its bytes as soon as the loader hands it over,
which touches each once, and prints one JSON line: `Load`. With --hold it then keeps its tensors until its standard input ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import xxhash

Tensors = Iterator[tuple[str, Any]]
READ = 2**20  # bytes that the row `read` asks for at a time


@dataclass(frozen=True)
class Load:
    """What one load took and gave. Seconds (imports are not counted) run from the first call of the loader to the last byte hashed.

    `checksum` is that of the tensors' names and bytes, in whatever order they came. `core_seconds` are those of all threads. `peak_rss`, in bytes,
    includes mapped page cache.
    """

    row: str
    seconds: float
    bytes: int
    tensors: int
    checksum: str
    core_seconds: float
    peak_rss: int


@dataclass(frozen=True)
class Loader:
    """One way to load. `prepare` imports what it needs and returns the loading itself; `packages` are what to install: import name to package."""

    prepare: Callable[[], Callable[[Path], Tensors]]
    packages: dict[str, str]


def files_of(directory: Path) -> list[Path]:
    """The safetensors files in `directory`, by name. Raises FileNotFoundError when there is none."""
    if found := sorted(directory.glob("*.safetensors")):
        return found
    raise FileNotFoundError(f"cannot load {directory}: no safetensors file is in it")


def _safetensors() -> Callable[[Path], Tensors]:
    """The stock library as engines use it: file by file, tensors in the order in which they lie there."""
    import torch  # noqa: F401 - else safe_open would import it within the clock
    from safetensors import safe_open

    def load(directory: Path) -> Tensors:
        for path in files_of(directory):
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    yield name, file.get_tensor(name)

    return load


def _nvcache() -> Callable[[Path], Tensors]:
    """nvcache's client: the page cache filled by all disks at once, tensors mapped and handed over as soon as their bytes are there."""
    import torch  # noqa: F401 - else the client would import it within the clock

    from nvcache.client import stream_safetensors

    return lambda directory: stream_safetensors(directory, "pt")


def _runai() -> Callable[[Path], Tensors]:
    """runai-model-streamer with its defaults: threads that read into memory of their own."""
    from runai_model_streamer import SafetensorsStreamer

    def load(directory: Path) -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in files_of(directory)])
            yield from streamer.get_tensors()

    return load


def _fastsafetensors() -> Callable[[Path], Tensors]:
    """fastsafetensors without GPU Direct Storage, all files at once into memory of its own, tensors handed over while others are still read."""
    import torch  # noqa: F401 - as above
    from fastsafetensors import SafeTensorsFileLoader

    def load(directory: Path) -> Tensors:
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [str(path) for path in files_of(directory)]})
        buffers = loader.copy_files_to_device(allow_inflight=True)
        for name in loader.get_keys():
            yield name, buffers.get_tensor(name)
        buffers.close()
        loader.close()

    return load


def _read() -> Callable[[Path], Tensors]:
    """No loader at all: one file after the other is read into memory."""

    def load(directory: Path) -> Tensors:
        for path in files_of(directory):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                data = memoryview(mmap(-1, max(1, path.stat().st_size - file.tell())))
                at = 0
                for name, tensor in sorted(_described(header), key=lambda item: item[1]):
                    while at < tensor.stop:
                        got = file.readinto(data[at : min(at + READ, tensor.stop)])
                        if not got:
                            raise EOFError(f"cannot load {path}: it ends within {name}")
                        at += got
                    yield name, data[tensor]

    return load


ROWS = {
    "safetensors": Loader(_safetensors, {"safetensors": "safetensors", "torch": "torch"}),
    "nvcache": Loader(_nvcache, {"torch": "torch"}),
    "runai": Loader(_runai, {"runai_model_streamer": "runai-model-streamer", "torch": "torch"}),
    "fastsafetensors": Loader(_fastsafetensors, {"fastsafetensors": "fastsafetensors", "torch": "torch"}),
    "read": Loader(_read, {}),
}


def load(row: str, directory: Path) -> tuple[Load, list[Any]]:
    """Load all of `directory` by `row`: what it took, and the tensors. Raises what the loader raises."""
    loading = ROWS[row].prepare()
    digests: dict[str, bytes] = {}
    tensors, size = [], 0
    began, used = time.perf_counter(), time.process_time()
    for name, tensor in loading(directory):
        data = _bytes(tensor)
        digests[name] = _digest([data])
        size += len(data)
        tensors.append(tensor)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    checksum = _digest(part for name in sorted(digests) for part in (name.encode(), b"\0", digests[name])).hex()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Load(row, round(seconds, 4), size, len(tensors), checksum, round(used, 3), peak), tensors


def _described(header: dict[str, Any]) -> Iterator[tuple[str, slice]]:
    """Name and place of each tensor of a file, counted from the header's end."""
    return ((name, slice(*about["data_offsets"])) for name, about in header.items() if name != "__metadata__")


def _bytes(tensor: Any) -> memoryview:
    """The bytes of a tensor, where they lie."""
    if isinstance(tensor, memoryview):
        return tensor
    from torch import uint8

    return memoryview(tensor.reshape(-1).view(uint8).numpy())


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    """XXH3-64. Hashed by `update`, which lets other threads run meanwhile; the package's one-shot functions do not."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.digest()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.loaders", description="Load a model once by one loader; prints one JSON line.")
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--hold", action="store_true", help="keep the tensors until standard input ends")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # what other projects' loaders warn of is theirs
    logging.disable()
    result, tensors = load(args.row, args.directory)
    print(json.dumps(asdict(result)), flush=True)
    if args.hold:
        sys.stdin.read()
    del tensors


if __name__ == "__main__":
    main()
