"""Tries, in a virtual machine, chunk sizes, read-aheads and file systems on four striped disks, read by mapping and by nvcache. It chooses nothing.

``python -m bench.sweep`` writes results/sweep.json. The arrays are made by mdadm itself; `nvcache disks ensure` is asked what the defaults are.
What is measured is the shape: each emulated disk serves one request at a time, 0.1 ms + size / rate each; the processor is emulated too (no KVM).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import arguments
from bench.machine import describe
from bench.measure import spread
from bench.report import RESULTS
from bench.report_sweep import READERS, table
from bench.vm import RATE, fio, throttle
from nvcache.settings import parse_size
from tests.node.guest import Guest
from tests.node.machine import MIB, Machine, disks
from tests.node.node import Node

CHUNKS = tuple(kib << 10 for kib in (64, 128, 256, 512, 1024))
READ_AHEADS = tuple(kib << 10 for kib in (128, 512, 2048, 4096, 8192, 16384))
MAKE = {
    "xfs": "mkfs.xfs -q -f -K -l su=32k",
    "ext4": "mkfs.ext4 -q -F -m 0 -E nodiscard,lazy_itable_init=0",
}  # nothing is left to write while reading
DISKS = 4
FILES = 4
ARRAY, MOUNT = "md0", "/sweep"
FOLDER = f"{MOUNT}/files"
READ_SECONDS = 300


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=arguments.rounds, default=2)
    parser.add_argument("--size", type=parse_size, default="64MiB", help=f"bytes read each time, in {FILES} files (64MiB)")
    parser.add_argument("--chunks", type=_sizes, default=CHUNKS, help="chunk sizes of the array (64KiB,128KiB,256KiB,512KiB,1MiB)")
    parser.add_argument("--read-aheads", type=_sizes, default=READ_AHEADS, help="read-aheads of the array (128KiB,512KiB,2MiB,4MiB,8MiB,16MiB)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the result")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="nvcache-bench-") as folder:
        result = measure(Path(folder), args.size, args.chunks, args.read_aheads, args.rounds)
    result["machine"] = describe(RESULTS)
    (args.out / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


def measure(folder: Path, size: int, chunks: Iterable[int], read_aheads: Iterable[int], rounds: int) -> dict[str, Any]:
    """Every array in one boot. Rates in bytes/s, sizes in bytes."""
    _make_files(folder / "files", size)
    machine = Machine(folder / "machine", disks(DISKS, size=max(512 * MIB, size)), shares={"files": folder / "files"})
    with machine.boot() as guest:
        defaults = _defaults(guest)
        guest.run("udevadm control --exit").check()  # it would assemble what is being taken apart
        chunks, read_aheads = sorted({*chunks, defaults["chunk"]}), sorted({*read_aheads, defaults["read_ahead"]})
        arrays = [(filesystem, chunk) for chunk in chunks for filesystem in MAKE]
        rows = []
        for number, (filesystem, chunk) in enumerate(arrays):
            print(f"array {number + 1} of {len(arrays)}: {filesystem}, chunk {chunk >> 10}K", flush=True)
            with _array(guest, machine.serials, filesystem, chunk):
                rows.append({"filesystem": filesystem, "chunk": chunk, **_read(guest, read_aheads, rounds)})
    return {
        "rounds": rounds,
        "rate": RATE,
        "disks": DISKS,
        "bytes": size,
        "files": FILES,
        "defaults": defaults,
        "read_aheads": read_aheads,
        "rows": rows,
    }


def _defaults(guest: Guest) -> dict[str, Any]:
    """What nvcache makes of the disks when nobody says anything. They are blank afterwards."""
    node = Node(guest)
    made = node.ensure("Created").report
    chunk = int(guest.run(f"cat /sys/block/{Path(made['array']).name}/md/chunk_size").check())
    removed = node.disks("teardown")
    assert removed.status == 0, removed.said
    return {"filesystem": made["filesystem"], "chunk": chunk, "read_ahead": made["read_ahead"]}


@contextmanager
def _array(guest: Guest, serials: Sequence[str], filesystem: str, chunk: int) -> Iterator[None]:
    """The files on a new array of all disks, which have their speed inside."""
    node = Node(guest)
    devices = " ".join(node.device(serial) for serial in serials)
    layout = f"--metadata=1.2 --level=0 --data-offset=1M --chunk={chunk >> 10}K --raid-devices={len(serials)}"
    create = f"mdadm -q --create /dev/{ARRAY} --run {layout} {devices}"
    mount = f"mkdir -p {MOUNT} && mount -o noatime /dev/{ARRAY} {MOUNT} && cp -r /mnt/files {FOLDER} && sync"
    guest.run(f"export MDADM_NO_UDEV=1; {create} && {MAKE[filesystem]} /dev/{ARRAY} && {mount}", 120).check()
    throttle(guest, serials, RATE)
    yield
    throttle(guest, serials, 0)
    guest.run(f"export MDADM_NO_UDEV=1; umount {MOUNT} && mdadm -q --stop /dev/{ARRAY} && mdadm -q --zero-superblock {devices}").check()


def _read(guest: Guest, read_aheads: Sequence[int], rounds: int) -> dict[str, Any]:
    """The rates of fio, and of each reader at each read-ahead."""
    limit = [fio(guest, f"{FOLDER}/*") for _ in range(rounds)]
    asked = f"python3 -S -m bench.read_ahead {FOLDER} {ARRAY} {rounds} {' '.join(map(str, read_aheads))}"
    found = [json.loads(line) for line in guest.run(asked, READ_SECONDS).check().splitlines()]
    return {"fio": spread(limit)} | {
        reader: [spread([one["rate"] for one in found if (one["reader"], one["read_ahead"]) == (reader, size)]) for size in read_aheads]
        for reader in READERS
    }


def _make_files(folder: Path, size: int) -> None:
    folder.mkdir()
    source = random.Random(1)
    for number in range(FILES):
        (folder / str(number)).write_bytes(source.randbytes(size // FILES))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_size(part) for part in text.split(","))


if __name__ == "__main__":
    main()
