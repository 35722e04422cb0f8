"""Reads files from their disks by mapping and by nvcache's client, at one read-ahead after the other. Standard library only: it runs in the guest.

`python -m bench.read_ahead DIR DEVICE ROUNDS READ_AHEAD…` (DEVICE as in /sys/block, READ_AHEAD in bytes) prints a line of JSON for each reading: how
it was read, at what read-ahead, bytes a second. Before each the files are dropped from the page cache, which is checked page by page.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from pathlib import Path

from bench.cold import drop
from nvcache.client import prefetch


def touch(directory: Path) -> None:
    """As loaders that map do: one page after the other, in the order of the file."""
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            sum(mapping[:: mmap.PAGESIZE])


READERS = {"mmap": touch, "nvcache": prefetch}


def main(directory: Path, device: str, rounds: int, read_aheads: list[int]) -> None:
    """Every reader at every read-ahead, in turn."""
    size = sum(path.stat().st_size for path in directory.iterdir())
    for _ in range(rounds):
        for read_ahead in read_aheads:
            Path(f"/sys/block/{device}/queue/read_ahead_kb").write_text(str(read_ahead >> 10))
            for name, reader in READERS.items():
                drop(directory)
                began = time.perf_counter()
                reader(directory)
                print(json.dumps({"reader": name, "read_ahead": read_ahead, "rate": size / (time.perf_counter() - began)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [int(each) for each in sys.argv[4:]])
