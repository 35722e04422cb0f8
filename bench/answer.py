"""Measures how long the daemon takes to say that a model is ready: idle, and while it fills another model at full speed. It changes no setting.

Requests go out on a fixed schedule over the Unix socket, in turn on a connection that is kept and by `nvcache.client`, which opens one for each
request. A latency runs from sending to the whole answer read. "From schedule" runs from when the request was due, so that a slow answer also
counts against the requests it held up (and, on a busy machine, so does the wait of this process for a core).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.connection import UnixConnection
from bench.daemon import NVCACHE, Daemon, clean_environment, fresh
from bench.fill import RESULTS, WORK, origin, read_through
from bench.machine import describe
from bench.measure import MeasureError, spread
from bench.report_answer import table
from bench.rows import REPO
from nvcache.client.transport import Transport
from nvcache.settings import parse_size
from tests.support.nginx import NginxHub

READY = "bench/ready"
READY_SIZE = 64 * 10**6
WAYS = ("kept", "new")
EDGES_MS = [10 ** (exponent / 10) for exponent in range(-10, 31)]  # 0.1 ms to 1 s, ten bins a decade


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: its way, when it was sent (unix seconds), and seconds from sending and from its due time to the end of the answer."""

    way: str
    at: float
    latency: float
    from_schedule: float


@dataclass
class Fills:
    """Fills the second model again and again until `seconds` of filling were had; a thread of its own."""

    daemon: Daemon
    seconds: float
    bytes: int
    spans: list[tuple[float, float]] = field(default_factory=list)  # unix seconds, as the daemon's jobs tell
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """The thread. What goes wrong is kept in `error`."""
        try:
            while sum(end - start for start, end in self.spans) < self.seconds:
                self.spans.append(self._once())
        except (MeasureError, subprocess.SubprocessError, OSError) as error:
            self.error = error
        finally:
            self.over.set()

    def _once(self) -> tuple[float, float]:
        fetched = json.loads(nvcache(self.daemon, "warm", "--json", f"hf://{REPO}"))["fetched_bytes"]
        if fetched < 0.99 * self.bytes:  # the small files may be the ready model's too
            raise MeasureError(f"cannot measure while filling: only {fetched} of {self.bytes} bytes were fetched")
        jobs = Transport(f"unix://{self.daemon.socket}").request("GET", "/v1/jobs")["jobs"]
        mine = [job for job in jobs if job["kind"] == "fill" and REPO in job["ref"] and job["ended_at"]]
        started, ended = max((_unix(job["created_at"]), _unix(job["ended_at"])) for job in mine)
        nvcache(self.daemon, "rm", f"hf://{REPO}")
        return started, ended


def ask(daemon: Daemon, rate: float, over: Callable[[int], bool]) -> list[Sample]:
    """Ask for the ready model `rate` times a second, the ways in turn, until `over(requests so far)`."""
    path = f"/v1/models?ref={quote(f'hf://{READY}', safe='')}"
    client = Transport(f"unix://{daemon.socket}")
    samples: list[Sample] = []
    gc.collect()
    gc.disable()  # a collection here would be counted as the daemon's time
    try:
        with closing(UnixConnection(daemon.socket)) as kept:
            due = time.perf_counter()
            while not over(len(samples)):
                due += 1 / rate
                time.sleep(max(0.0, due - time.perf_counter()))
                way = WAYS[len(samples) % len(WAYS)]
                at, sent = time.time(), time.perf_counter()
                if way == "kept":
                    kept.request("GET", path)
                    answer = json.loads(kept.getresponse().read())
                else:
                    answer = client.request("GET", path)
                done = time.perf_counter()
                if answer.get("state") != "ready":
                    raise MeasureError(f"cannot measure the ready answer: it says {answer}")
                samples.append(Sample(way, at, done - sent, done - due))
    finally:
        gc.enable()
    return samples


def measure(work: Path, size: int, requests: int, rate: float) -> dict[str, Any]:
    """The whole measurement; the result as JSON data, latencies in milliseconds."""
    machine = describe(work)
    ready, filled = origin(work, READY_SIZE, seed=1), origin(work, size)
    total = requests * len(WAYS)
    with NginxHub({READY: ready, REPO: filled}, fresh(work / "nginx")) as hub:
        env = clean_environment(work, hub.url, None)
        with Daemon(fresh(work / "target") / "store", env, work / "daemon.log") as daemon:
            nvcache(daemon, "warm", f"hf://{READY}")
            read_through(filled)
            ask(daemon, rate, lambda asked: asked >= 200)  # the first answers warm up both sides
            idle = ask(daemon, rate, lambda asked: asked >= total)
            fills = Fills(daemon, total / rate * 1.02, bytes_of(filled))
            thread = threading.Thread(target=fills.run, name="fills")
            thread.start()
            busy = ask(daemon, rate, lambda asked: fills.over.is_set())
            thread.join()
            if fills.error:
                raise MeasureError(f"cannot measure while filling: {fills.error}") from fills.error
    during = [sample for sample in busy if any(start <= sample.at <= end for start, end in fills.spans)]
    series = {
        f"{when}, {way} connection": summary([sample for sample in samples if sample.way == way])
        for when, samples in (("idle", idle), ("filling", during))
        for way in WAYS
    }
    speeds = [fills.bytes / (end - start) / 1e9 for start, end in fills.spans]
    return {"rate": rate, "fills": len(speeds), "fill_bytes": fills.bytes, "fill_rate": spread(speeds), "machine": machine, "series": series}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Percentiles (nearest rank) and a histogram, in milliseconds; what is outside the edges counts in the outermost bins."""
    latencies = sorted(sample.latency * 1e3 for sample in samples)
    counts = [0] * (len(EDGES_MS) - 1)
    for latency in latencies:
        counts[min(max(math.floor(math.log10(latency) * 10) + 10, 0), len(counts) - 1)] += 1
    return {
        "requests": len(latencies),
        "p50": round(percentile(latencies, 0.5), 4),
        "p99": round(percentile(latencies, 0.99), 4),
        "max": round(latencies[-1], 4),
        "p99_from_schedule": round(percentile(sorted(sample.from_schedule * 1e3 for sample in samples), 0.99), 4),
        "histogram": {"edges_ms": [round(edge, 4) for edge in EDGES_MS], "counts": counts},
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]


def nvcache(daemon: Daemon, *words: str) -> str:
    """What a command says. Raises `MeasureError`."""
    done = subprocess.run([*NVCACHE, *words], env=daemon.env, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise MeasureError(f"cannot run nvcache {words[0]}: exit {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


def bytes_of(directory: Path) -> int:
    """The sizes of all files, added up."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.answer", description="Latency of the ready answer, idle and during a fill.")
    parser.add_argument("--size", type=parse_size, default="4.5GB", help="bytes of the model that is filled meanwhile (4.5GB)")
    parser.add_argument("--requests", type=int, default=5000, help="requests for each way and state (5000)")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (200)")
    parser.add_argument("--work", type=Path, default=WORK, help="directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where answer.json goes")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = measure(args.work.resolve(), args.size, args.requests, args.rate)
    (args.out / "answer.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
