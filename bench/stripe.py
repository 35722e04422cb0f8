"""Measures the stripe in a virtual machine with throttled NVMe disks: how reading scales with their number, and how long `disks ensure` takes.

``python -m bench.stripe`` writes results/stripe.json. What it measures is the stripe's shape, not a disk's speed: each emulated disk serves one
request at a time, 0.1 ms + size / rate each, and the guest's processor is emulated too (no KVM), which is what ends the scaling beyond 400 MB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import arguments
from bench.machine import describe
from bench.report import RESULTS
from bench.report_stripe import table
from tests.node.machine import MIB, Machine, disks
from tests.node.node import MOUNT, Node

RATE = 60 * 10**6  # bytes/s of each disk
FILE = 96 * MIB  # read per disk
COUNTS = (1, 2, 4)
FIO = "fio --name=read --rw=read --bs=4M --direct=1 --ioengine=libaio --iodepth=4 --readonly --output-format=json"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=arguments.rounds, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="nvcache-bench-") as folder:
        result = measure(Path(folder), rounds)
    result["machine"] = describe(RESULTS)
    (RESULTS / "stripe.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Rates in bytes/s, times in seconds. One boot for every number of disks and round."""
    one: list[float] = []
    stripe: dict[int, list[float]] = {count: [] for count in COUNTS}
    create: dict[int, list[float]] = {count: [] for count in COUNTS}
    again: dict[int, list[float]] = {count: [] for count in COUNTS}
    for turn in range(rounds):
        for count in COUNTS:
            print(f"round {turn + 1} of {rounds}, {count} disks")
            machine = Machine(folder / f"{turn}-{count}", disks(count, rate=RATE))
            with machine.boot() as guest:
                node = Node(guest)
                if count == 1:
                    one.append(_fio(node, node.device(machine.serials[0]), FILE))
                create[count].append(node.ensure("Created").report["seconds"])
                again[count] += [node.ensure("Unchanged").report["seconds"] for _ in range(3)]
                for serial in machine.serials:
                    guest.rate(serial, 0)  # what is written is not what is measured
                guest.run(f"head -c {FILE * count} /dev/urandom > {MOUNT}/store/file; sync", 300).check()
                for serial in machine.serials:
                    guest.rate(serial, RATE)
                stripe[count].append(_fio(node, f"{MOUNT}/store/file", FILE * count))
    single = statistics.median(one)
    return {
        "rounds": rounds,
        "rate": RATE,
        "one_disk": _spread(one),
        "counts": {
            str(count): {
                "rate": _spread(stripe[count]),
                "ratio": _spread([rate / single / count for rate in stripe[count]]),
                "create": _spread(create[count]),
                "again": _spread(again[count]),
            }
            for count in COUNTS
        },
    }


def _fio(node: Node, path: str, size: int) -> float:
    """Bytes a second of one sequential read around the page cache."""
    out = node.guest.run(f"echo 3 > /proc/sys/vm/drop_caches; {FIO} --filename={path} --size={size}", 300).check()
    return float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def _spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


if __name__ == "__main__":
    main()
