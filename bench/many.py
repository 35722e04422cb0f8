"""Measures a daemon whose store has a thousand models: its start, what it says to `ls`, and its memory. It changes no setting.

Models are made and filled from directories, as an operator would, and shown under a Hub name, so every one has both views. Then, each round, a daemon
is started on that store: once with the kernel's memory of files and directories dropped (root only), once with it warm. A start runs from the
`exec` of `nvcache serve` until /readyz answers 200. What is asked then runs from sending to the whole answer read; commands run from `exec` to exit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import arguments
from bench.answer import percentile
from bench.connection import UnixConnection
from bench.daemon import NVCACHE, Daemon, clean_environment, fresh
from bench.fill import RESULTS, WORK
from bench.machine import describe
from bench.measure import MeasureError, pss_of, spread, tree
from bench.report_many import table
from nvcache.client.transport import Transport

SMALL = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "README.md")
TENSOR_BYTES = 4096
SMALL_BYTES = 512
CALLERS = 16  # fills that are asked for at a time
SETTLE_SECONDS = 5.0  # from ready to the sample of memory: workers and what they import are there by then
FILL_SECONDS = 600.0  # for one model, all others before it
CACHES = Path("/proc/sys/vm/drop_caches")
NAME = "model-{:05}"
COMMANDS = (["ls"], ["ls", "--json"], ["path", "bench/model-00000"])


def make_models(directory: Path, models: int, files: int) -> list[Path]:
    """`models` directories of `files` small files each, no two alike: weights with a sound header, the rest noise. Made once and kept."""
    places = [directory / NAME.format(number) for number in range(models)]
    for number, place in enumerate(places):
        if place.is_dir():
            continue
        half = directory / "half"
        half.mkdir(parents=True, exist_ok=True)
        noise = random.Random(number)
        named = SMALL[: files - 1]
        for name in named:
            (half / name).write_text(json.dumps({"noise": noise.randbytes(SMALL_BYTES // 2).hex()}))
        for shard in range(files - len(named)):
            header = json.dumps({f"tensor.{shard}": {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": [0, TENSOR_BYTES]}}).encode()
            weights = len(header).to_bytes(8, "little") + header + noise.randbytes(TENSOR_BYTES)
            (half / f"weights-{shard:05}.safetensors").write_bytes(weights)
        half.rename(place)
    return places


def fill(daemon: Daemon, places: Sequence[Path]) -> None:
    """Have the daemon make every model ready. Raises `MeasureError`."""
    transport = Transport(f"unix://{daemon.socket}")

    def one(place: Path) -> None:
        wish = {"ref": f"file://{place}", "alias": f"bench/{place.name}"}
        deadline = time.monotonic() + FILL_SECONDS
        while time.monotonic() < deadline:
            answer = transport.request("POST", "/v1/models", wish, timeout=60)
            if answer.get("state") == "ready":
                return
            job = answer["job"]["id"]
            while (found := transport.request("GET", f"/v1/jobs/{job}"))["ended_at"] is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if found["error"]:
                raise MeasureError(f"cannot fill {place}: {found['error']['detail']}")
        raise MeasureError(f"cannot fill {place}: it took more than {FILL_SECONDS:.0f} s")

    with ThreadPoolExecutor(CALLERS) as pool:
        for done, _ in enumerate(pool.map(one, places), 1):
            if done % 100 == 0:
                print(f"filled {done} of {len(places)}", file=sys.stderr, flush=True)


class Start:
    """A daemon on the full store, from its `exec` to the first 200 of /readyz, and what it is asked then."""

    def __init__(self, store: Path, env: dict[str, str], log: Path) -> None:
        self._daemon = Daemon(store, env, log)

    def measure(self, asked: int, commands: int, models: int) -> dict[str, Any]:
        """One round; seconds, bytes, and milliseconds of each question. Raises `MeasureError`."""
        began = time.perf_counter()
        with self._daemon as daemon:
            transport = Transport(f"unix://{daemon.socket}")
            transport.request("GET", "/readyz")  # raises for anything but 200
            ready = time.perf_counter() - began
            time.sleep(SETTLE_SECONDS)
            steady = self._memory()
            questions = {
                "GET /v1/models": "/v1/models",
                "GET /v1/models?ref=…": f"/v1/models?ref=hf://bench/{NAME.format(models // 2)}",
                "GET /metrics": "/metrics",
            }
            answers = {name: self._ask(path, asked) for name, path in questions.items()}
            runs = {" ".join(["nvcache", *words]): [self._run(words, models) for _ in range(commands)] for words in COMMANDS}
            return {"ready": ready, "steady": steady, "after": self._memory(), "answers": answers, "commands": runs}

    def _memory(self) -> dict[str, int]:
        own = pss_of(self._daemon.pid)
        return {"daemon": own, "workers": sum(pss_of(pid) for pid in tree([self._daemon.pid])) - own}

    def _ask(self, path: str, times: int) -> list[float]:
        took = []
        with closing(UnixConnection(self._daemon.socket)) as kept:
            for _ in range(times):
                sent = time.perf_counter()
                kept.request("GET", path)
                answer = kept.getresponse()
                answer.read()
                took.append((time.perf_counter() - sent) * 1e3)
                if answer.status != 200:
                    raise MeasureError(f"cannot ask for {path}: {answer.status}")
        return took

    def _run(self, words: Sequence[str], models: int) -> float:
        sent = time.perf_counter()
        done = subprocess.run([*NVCACHE, *words], env=self._daemon.env, capture_output=True, text=True, timeout=60, check=True)
        took = (time.perf_counter() - sent) * 1e3
        if words[0] == "ls" and done.stdout.count("/model-") < models:
            raise MeasureError(f"cannot measure nvcache {' '.join(words)}: it lists fewer than {models} models")
        return took


def measure(work: Path, models: int, files: int, rounds: int, asked: int, commands: int) -> dict[str, Any]:
    """Fill a fresh store, then start daemons on it; the result as JSON data. Raises `MeasureError`."""
    machine = describe(work)
    places = make_models(work / "many-origin", models, files)
    store, env, log = fresh(work / "target") / "store", clean_environment(work, None, None), work / "daemon.log"
    began = time.perf_counter()
    with Daemon(store, env, log) as daemon:
        fill(daemon, places)
    filled = time.perf_counter() - began
    cases = {"warm": False} | ({"cold": True} if os.access(CACHES, os.W_OK) else {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name, cold in cases.items():
            if cold:
                os.sync()
                CACHES.write_text("3")
            found[name].append(Start(store, env, log).measure(asked, commands, models))
            print(f"round {turn + 1}  {name}  ready after {found[name][-1]['ready']:.2f} s", file=sys.stderr, flush=True)
    return {
        "models": models,
        "files": files,
        "fill_seconds": round(filled, 1),
        "machine": machine,
        "ready": {name: spread([each["ready"] for each in runs]) for name, runs in found.items()},
        "memory": {when: _memory([each[when] for runs in found.values() for each in runs]) for when in ("steady", "after")},
        "answers": _questions([each["answers"] for each in found["warm"]]),
        "commands": _questions([each["commands"] for each in found["warm"]]),
    }


def _memory(samples: Sequence[dict[str, int]]) -> dict[str, dict[str, float]]:
    return {part: spread([sample[part] for sample in samples]) for part in samples[0]}


def _questions(rounds: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each question over all rounds: least, and p50, p99 and most by nearest rank."""
    found = {}
    for name in rounds[0]:
        ordered = sorted(took for each in rounds for took in each[name])
        shares = {"p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99)}
        found[name] = {"asked": len(ordered), "min": ordered[0], **shares, "max": ordered[-1]}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.many", description="A daemon with many models: start, answers, memory.")
    parser.add_argument("--models", type=arguments.rounds, default=1000, help="models in the store (1000)")
    parser.add_argument("--files", type=arguments.rounds, default=10, help="files of each (10)")
    parser.add_argument("--rounds", type=arguments.rounds, default=5, help="starts of each kind (5)")
    parser.add_argument("--asked", type=arguments.rounds, default=200, help="how often each question is asked in a round (200)")
    parser.add_argument("--commands", type=arguments.rounds, default=10, help="how often each command is run in a round (10)")
    parser.add_argument("--work", type=Path, default=WORK, help="directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where many.json goes")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = measure(args.work.resolve(), args.models, args.files, args.rounds, args.asked, args.commands)
    (args.out / "many.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
