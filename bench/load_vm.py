"""Measures, in a virtual machine with throttled disks, how fast a model loads from an OS disk and from 1 to 8 NVMe disks. It judges nothing.

``python -m bench.load_vm`` writes results/load-vm.json. nvcache itself makes the stripes; every row of `bench.loaders`, and fio as the limit, reads
the same files, cold. The OS disk is an NVMe disk too, of a model that nvcache never takes, as slow beside two striped disks as in published figures.
What is measured is the shape: each emulated disk serves one request at a time, 0.1 ms + size / rate each; the processor is emulated too (no KVM).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import arguments
from bench.loaders import ROWS
from bench.machine import describe
from bench.measure import MeasureError, ratios, rotated, spread
from bench.report import RESULTS
from bench.report_load_vm import LIMIT, OS_DISK, OURS, STOCK, named, table
from bench.vm import RATE, SITE, Loaders, fio, throttle
from nvcache.client.load import INDEX
from nvcache.settings import parse_size
from tests.node.guest import Guest
from tests.node.machine import MIB, REMOTE_DISK, Disk, Machine, disks
from tests.node.node import STORE, Node
from tests.support.models import make_llama

COUNTS = (1, 2, 4, 8)
PUBLISHED = (30.9, 5.6)  # seconds: 15 GB by vLLM's default loader from the OS disk and from two striped NVMe disks of a Standard_NC80adis_H100_v5
OS_RATE = round(2 * RATE * PUBLISHED[1] / PUBLISHED[0])
OS_SERIAL, OS_MODEL = "OS", "/os/model"
STRIPE_MODEL = f"{STORE}/model"
SHARDS = 4
ONCE = frozenset({LIMIT, *ROWS}) - {OURS, STOCK}  # of the OS disk, where a load takes long and no verdict asks for these again

Seconds = dict[str, dict[str, list[float]]]  # by place and row, one for each round


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.load_vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=arguments.rounds, default=3)
    parser.add_argument("--size", type=parse_size, default="320MB", help="bytes of weights, the same for every number of disks (320MB)")
    parser.add_argument("--most", type=int, choices=COUNTS[1:], default=COUNTS[-1], help="leave out stripes of more disks than this (8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the result")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="nvcache-bench-") as folder:
        result = measure(Path(folder), args.size, [count for count in COUNTS if count <= args.most], args.rounds)
    result["machine"] = describe(RESULTS)
    (args.out / "load-vm.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


def measure(folder: Path, size: int, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Everything, in one boot. Rates in bytes/s, times in seconds."""
    make_llama(folder / "model", size, SHARDS)
    machine = Machine(
        folder / "machine",
        [Disk(OS_SERIAL, size=size + 256 * MIB, model=REMOTE_DISK), *disks(max(counts), size=size + 320 * MIB)],
        shares={"model": folder / "model", "site": SITE},
        memory="3G",
    )
    total = json.loads((folder / "model" / INDEX).read_text())["metadata"]["total_size"]
    with machine.boot() as guest:
        bench = Bench(guest, machine.serials[1:], total, rounds)
        for turn in range(rounds):
            bench.measure_os_disk(turn)
            for count in counts:
                bench.measure_stripe(count, turn)
    return {
        "rounds": rounds,
        "rate": RATE,
        "os_rate": OS_RATE,
        "published": PUBLISHED,
        "bytes": total,
        "files": SHARDS,
        "left_out": bench.loaders.left_out,
        "places": {place: {row: spread(found) for row, found in rows.items()} for place, rows in bench.seconds.items()},
        "ratios": compared(bench.seconds),
    }


class Bench:
    """One boot in which everything is measured; `seconds` is what was found so far. `total` is the bytes of all tensors."""

    def __init__(self, guest: Guest, serials: Sequence[str], total: int, rounds: int) -> None:
        self.guest, self.serials, self.total, self.rounds = guest, serials, total, rounds
        self.loaders = Loaders(guest)
        self.seconds: Seconds = {}
        self._checksums: set[str] = set()
        print("making the OS disk, and importing in the guest what the loaders need", flush=True)
        device = Node(guest).device(OS_SERIAL)
        guest.run(f"mkfs.ext4 -q -E lazy_itable_init=0 {device} && mkdir /os && mount {device} /os").check()
        guest.run(f"grep -x 128 /sys/block/{Path(device).name}/queue/read_ahead_kb").check()  # KiB: as the kernel has it
        self._copy_model(OS_MODEL)
        self.loaders.try_out(ROWS, OS_MODEL)
        for row, why in self.loaders.left_out.items():
            print(f"{row} is left out: {why}")
        if lacking := {OURS, STOCK} & set(self.loaders.left_out):
            raise MeasureError(f"cannot compare: {', '.join(sorted(lacking))} cannot run in the guest; are torch and safetensors installed here?")
        throttle(guest, [OS_SERIAL], OS_RATE)

    def measure_os_disk(self, turn: int) -> None:
        """Rows from the OS disk, mounted as it comes."""
        self._measure(OS_DISK, OS_MODEL, [row for row in self._rows(turn) if not turn or row not in ONCE], turn)

    def measure_stripe(self, count: int, turn: int) -> None:
        """All rows from a new stripe of that many disks."""
        with self._stripe(count):
            self._measure(str(count), STRIPE_MODEL, self._rows(turn), turn)

    @contextmanager
    def _stripe(self, count: int) -> Iterator[None]:
        """The model on a stripe that `nvcache disks ensure` makes; the disks are blank before and after."""
        chosen = self.serials[:count]
        node = Node(self.guest, *(word for serial in self.serials[count:] for word in ("--disk-exclude", serial)))
        made = node.ensure("Created")
        if len(made.report["members"]) != count or made.verdicts()[OS_SERIAL][0] != "not used":
            raise MeasureError(f"cannot measure a stripe of {count} disks: nvcache made one of {made.report['members']} and says {made.verdicts()}")
        self._copy_model(STRIPE_MODEL)
        throttle(self.guest, chosen, RATE)
        yield
        throttle(self.guest, chosen, 0)
        removed = node.disks("teardown")
        if removed.status:
            raise MeasureError(f"cannot give {count} disks back: {removed.said}")

    def _copy_model(self, directory: str) -> None:
        self.guest.run(f"mkdir {directory} && cp /mnt/model/*.safetensors {directory} && sync", 300).check()

    def _rows(self, turn: int) -> list[str]:
        return rotated([LIMIT, *(row for row in ROWS if row not in self.loaders.left_out)], turn)

    def _measure(self, place: str, directory: str, rows: Sequence[str], turn: int) -> None:
        for row in rows:
            seconds = self.total / fio(self.guest, f"{directory}/*.safetensors") if row == LIMIT else self._load(row, directory)
            self.seconds.setdefault(place, {}).setdefault(row, []).append(seconds)
            print(f"round {turn + 1} of {self.rounds}, {named(place)}: {row} {seconds:.2f} s", flush=True)

    def _load(self, row: str, directory: str) -> float:
        found = self.loaders.load(row, directory)
        self._checksums.add(found["checksum"])
        if found["bytes"] != self.total or len(self._checksums) > 1:
            raise MeasureError(f"cannot compare: {row} gave {found['bytes']} bytes of {self.total}, and checksums so far are {self._checksums}")
        return float(found["seconds"])


def compared(seconds: Seconds) -> dict[str, Any]:
    """Ratios, taken within each round: nvcache's rate over fio's and over N x one disk, its gain over the OS disk, its time over the other rows'."""
    counts = [place for place in seconds if place != OS_DISK]
    one = seconds["1"][LIMIT]
    return {
        "limit": {count: ratios(seconds[count][LIMIT], seconds[count][OURS]) for count in counts},
        "one disk": {count: ratios([each / int(count) for each in one], seconds[count][OURS]) for count in counts},
        "os disk": {row: ratios(seconds[OS_DISK][row], seconds["2"][OURS]) for row in (STOCK, OURS)},
        "rows": {
            place: {row: ratios(rows[OURS][: len(found)], found) for row, found in rows.items() if row not in (OURS, LIMIT)}
            for place, rows in seconds.items()
        },
    }


if __name__ == "__main__":
    main()
