"""Measures the answers that many clients get at the same time, each a process of its own, while a fill runs at full speed. It changes no setting.

The clients are those of `bench.crowd`. In one turn they ask at times of their own, in the other all at the same moments, as pods of one rollout do. A
latency runs from sending to the whole answer read; answers that came while nothing was being filled do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import arguments
from bench.answer import READY, READY_SIZE, Fills, bytes_of, nvcache, percentile
from bench.crowd import Crowd
from bench.daemon import Daemon, clean_environment, fresh
from bench.fill import RESULTS, WORK, origin, read_through
from bench.machine import describe
from bench.measure import MeasureError, cpu_times, spread
from bench.report_clients import table
from bench.rows import REPO
from nvcache.client.transport import Transport
from nvcache.settings import parse_size
from tests.support.nginx import NginxHub

TURNS = {"each when it likes": False, "all at the same moment": True}
START_SECONDS = 60.0


def measure(work: Path, size: int, clients: int, rate: float, seconds: float, bandwidth: int | None) -> dict[str, Any]:
    """Both turns, fills at `bandwidth` bytes a second at most; the result as JSON data, latencies in milliseconds. Raises `MeasureError`."""
    machine = describe(work)
    ready, filled = origin(work, READY_SIZE, seed=1), origin(work, size)
    with NginxHub({READY: ready, REPO: filled}, fresh(work / "nginx")) as hub:
        env = clean_environment(work, hub.url, None) | ({} if bandwidth is None else {"NVCACHE_HF_BANDWIDTH": str(bandwidth)})
        with Daemon(fresh(work / "target") / "store", env, work / "daemon.log") as daemon:
            nvcache(daemon, "warm", f"hf://{READY}")
            entry = Transport(f"unix://{daemon.socket}").request("GET", f"/v1/models?ref=hf://{READY}")["entry"]
            read_through(filled)
            turns = {
                name: turn(daemon, Crowd(str(daemon.socket), f"hf://{READY}", entry, clients, rate, seconds, together), bytes_of(filled))
                for name, together in TURNS.items()
            }
    return {"clients": clients, "rate": rate, "seconds": seconds, "bandwidth": bandwidth, "machine": machine, "turns": turns}


def turn(daemon: Daemon, crowd: Crowd, size: int) -> dict[str, Any]:
    """One turn: the crowd asks while the second model is filled again and again."""
    results = daemon.store.parent / "crowd"
    results.unlink(missing_ok=True)
    fills = Fills(daemon, crowd.seconds, size)
    argv = [sys.executable, "-m", "bench.crowd", json.dumps(asdict(crowd)), str(results)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdin is not None
        assert asking.stdout is not None
        if asking.stdout.readline() != "ready\n":
            raise MeasureError("cannot gather the clients: see above")
        thread = threading.Thread(target=fills.run, name="fills")
        before = cpu_times([daemon.pid])
        thread.start()
        asking.stdin.write("go\n")
        asking.stdin.flush()
        status = asking.wait(crowd.seconds + START_SECONDS)
        thread.join()
        used = sum(cpu_times([daemon.pid])) - sum(before)
    if fills.error or status:
        raise MeasureError(f"cannot measure while filling: {fills.error or f'the clients ended with {status}'}") from fills.error
    lives = [json.loads(line) for line in results.read_text().splitlines()]
    if len(lives) != crowd.clients:
        raise MeasureError(f"cannot tell what {crowd.clients - len(lives)} of {crowd.clients} clients were answered: they did not say")
    samples = [sample for found, _ in lives for sample in found if any(start <= sample[1] <= end for start, end in fills.spans)]
    errors = [error for _, found in lives for error in found]
    by_kind = {kind: [sample for sample in samples if sample[0] == kind] for kind in sorted({sample[0] for sample in samples})}
    return {
        "all": summary(samples),
        "kinds": {kind: summary(found) for kind, found in by_kind.items()},
        "errors": len(errors),
        "first_errors": dict(Counter(errors).most_common(5)),
        "fills": len(fills.spans),
        "fill_rate": spread([size / (end - start) / 1e9 for start, end in fills.spans]),
        "daemon_core_seconds": round(used, 2),
    }


def summary(samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """How many answers, and percentiles (nearest rank) of their latencies in milliseconds."""
    latencies = sorted(sample[2] * 1e3 for sample in samples)
    from_schedule = sorted(sample[3] * 1e3 for sample in samples)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {name: round(percentile(latencies, share), 2) for name, share in at.items()}
    return {"answers": len(latencies), **found, "p99_from_schedule": round(percentile(from_schedule, 0.99), 2)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description="Latency of the answers to many clients, during a fill.")
    parser.add_argument("--size", type=parse_size, default="4.5GB", help="bytes of the model that is filled meanwhile (4.5GB)")
    parser.add_argument("--clients", type=arguments.rounds, default=500, help="clients, a process each (500)")
    parser.add_argument("--rate", type=float, default=1.0, help="questions a second of each client (1)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each turn lasts (30)")
    parser.add_argument("--bandwidth", type=parse_size, help="what a fill may take, bytes a second, as a node's network would (as much as there is)")
    parser.add_argument("--work", type=Path, default=WORK, help="directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where clients.json goes")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = measure(args.work.resolve(), args.size, args.clients, args.rate, args.seconds, args.bandwidth)
    (args.out / "clients.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
