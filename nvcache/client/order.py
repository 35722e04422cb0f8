"""Which files a model has and in which order a loader meets them. It reads the index file and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

Order = Literal["index", "name"] | Sequence[str]


def in_order(path: Path, order: Order = "index") -> list[Path]:
    """The file `path`, or every file below the directory: first those that `order` names, then the others by name (`layer-2` before `layer-10`).

    "index": the shards as the index file lists them; "name": none first; a sequence: these, relative to the directory. Raises FileNotFoundError,
    ValueError for any other word.
    """
    if not path.is_dir():
        return [path]
    if isinstance(order, str) and order not in ("index", "name"):
        raise ValueError(f"cannot prefetch in the order {order!r}: it is neither index nor name")
    every = {file for file in path.rglob("*") if file.is_file()}
    wanted = _indexed(path) if order == "index" else [] if order == "name" else [path / name for name in order]
    first = [file for file in dict.fromkeys(wanted) if file in every]
    return [*first, *sorted(every - set(first), key=_natural)]


def _indexed(path: Path) -> Iterator[Path]:
    for index in sorted(path.glob("*.index.json")):
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):  # a broken index only loses the order
            yield from dict.fromkeys(path / shard for shard in json.loads(index.read_bytes())["weight_map"].values())


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for part, text in re.findall(r"(\d*)(\D*)", str(path))]
