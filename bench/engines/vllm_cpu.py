"""vLLM serves a model from nvcache's views by the recipes of docs/recipes.md, on CPUs. It measures no GPU; `bench.load` compares loaders.

``python -m bench.engines.vllm_cpu`` (as root) makes a virtual environment, a Llama-shaped model, a Hub and a daemon that fetches it. Then the Hub
goes away, and each recipe's block is run as it stands, as another user, the store read-only and out of the page cache. All must answer a prompt as
vLLM does from the original directory. Prints a table and writes bench/results/engines.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.cold import drop
from bench.daemon import NVCACHE, Daemon, clean_environment
from bench.engines.serving import Serving, complete
from bench.engines.venv import prepared, versions
from bench.measure import MeasureError
from bench.tables import Table
from nvcache.settings import parse_size
from tests.support.hub import HubServer
from tests.support.models import make_llama
from tests.support.pod import pod_command, pod_environment, pods_place
from tests.support.recipes import recipes
from tests.support.repo import Repo

CACHE = Path(__file__).parents[2] / ".cache"
RESULTS = Path(__file__).parents[1] / "results"
RECIPES = ("vllm-directory", "vllm-name", "vllm-streamer")
ORIGINAL = "the original directory, without nvcache"
READY_SECONDS = 300
# What a small model on CPUs needs besides the block's own flags; `exec` leaves no shell between vLLM and its signals.
ENGINE = """#!/bin/sh
echo "bench: vllm $*"
exec {vllm} "$@" --enforce-eager --max-model-len 256 --dtype bfloat16 --host 127.0.0.1 --port {port}
"""


@dataclass(frozen=True)
class Row:
    """One start. Seconds: until the block's shell ran vLLM (asking nvcache, reading ahead), vLLM's loading of the model, and from start to ready."""

    recipe: str
    before_s: float
    load_s: float
    ready_s: float
    answer: dict[str, Any]


def measure(work: Path, venv: Path, size: int, shards: int) -> dict[str, Any]:
    """Everything, in a fresh directory below `work`, which is removed. Raises `MeasureError`."""
    with pods_place(work) as place:
        source = place / "source"
        make_llama(source, size, shards)
        with ExitStack() as life:
            hub = life.enter_context(HubServer({"org/name": Repo.of_directory(source)}))
            with Daemon(place / "store", clean_environment(place, hub.url, None), place / "daemon.log") as daemon:
                _warm(daemon.env)
                life.close()  # from here on nothing comes from the Hub
                rows = [serve(name, recipes()[name], place / "store" / "models", place, venv, daemon.socket) for name in RECIPES]
        original = place / "original"
        make_llama(original, size, shards)  # the same bytes in files that no socket has held: sent pages may stay in the page cache for a while
        rows.append(serve(ORIGINAL, f"vllm serve {shlex.quote(str(original))} --served-model-name org/name", original, place, venv, daemon.socket))
        return {
            "machine": machine.describe(place),
            "versions": versions(venv),
            "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
            "shards": shards,
            "rows": [asdict(row) for row in rows],
            "same_answer": all(same(rows[-1].answer, row.answer) for row in rows),
        }


def _warm(env: Mapping[str, str]) -> None:
    done = subprocess.run([*NVCACHE, "warm", "org/name"], env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasureError(f"cannot make the model ready: {done.stderr}")


def serve(name: str, block: str, model: Path, place: Path, venv: Path, nvcache: Path) -> Row:
    """Run a block, with `model` out of the page cache, until vLLM has answered a prompt. Raises `MeasureError` when it does not."""
    print(f"{name} …", file=sys.stderr)
    port = _free_port()
    engine = place / "bin" / "vllm"
    engine.parent.mkdir(exist_ok=True)
    engine.write_text(ENGINE.format(vllm=shlex.quote(str(venv / "bin/vllm")), port=port))
    engine.chmod(0o755)
    home = place / "pod"
    wanted = {"HOME": str(home), "NVCACHE_SOCKET": str(nvcache), "HF_ENDPOINT": "http://127.0.0.1:9"}  # discard: nobody listens there
    wanted |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    drop(model)
    command = pod_command(place, ["sh", "-c", block], needed=(venv, Path(os.path.realpath(venv / "bin/python"))), network=True)
    with Serving(command, pod_environment(wanted, engine.parent)) as serving:
        before = serving.says("bench: vllm", seconds=READY_SECONDS)
        began = serving.says("Starting to load model", seconds=READY_SECONDS)
        loaded = serving.says("KV cache layout", "KV cache size", seconds=READY_SECONDS)
        serving.says("Application startup complete", seconds=READY_SECONDS)
        ready = serving.listens(port, seconds=READY_SECONDS)
        answer = complete(f"http://127.0.0.1:{port}", "org/name")
    return Row(name, round(before, 2), round(loaded - began, 2), round(ready, 2), answer)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers are the same tokens, as likely as each other but for rounding."""
    pairs = zip(one["logprobs"], other["logprobs"], strict=True)
    return one["tokens"] == other["tokens"] and all(math.isclose(a, b, abs_tol=1e-3) for a, b in pairs)


def table(result: dict[str, Any]) -> Table:
    """What was found."""
    rows = tuple((row["recipe"], *(f"{row[figure]:.2f}" for figure in ("before_s", "load_s", "ready_s"))) for row in result["rows"])
    title = f"vLLM on CPUs, {result['bytes'] / 1e9:.2f} GB in {result['shards']} shards, cold page cache, the Hub gone"
    verdict = "All answered alike." if result["same_answer"] else "The answers DIFFER."
    tools = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return Table(title, ("recipe", "before vLLM s", "model load s", "ready s"), rows, (verdict, tools, machine.one_line(result["machine"])))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.vllm_cpu", description="vLLM on CPUs, by the recipes of docs/recipes.md.")
    parser.add_argument("venv", type=Path, nargs="?", default=CACHE / "vllm-cpu", help="its virtual environment, made if it is not there")
    parser.add_argument("--size", type=parse_size, default="512MiB", help="bytes of the model (512MiB)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--work", type=Path, default=CACHE / "bench", help="directory on the disk that holds model and store")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where engines.json goes")
    args = parser.parse_args(argv)
    if os.geteuid():
        raise MeasureError("cannot be another user on a read-only mount: run this as root")
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = measure(args.work.resolve(), prepared(args.venv.absolute()), args.size, args.shards)
    (args.out / "engines.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result).show()
    if not result["same_answer"]:
        raise MeasureError("cannot trust a view: vLLM answers otherwise from it than from the original directory")


if __name__ == "__main__":
    try:
        main()
    except MeasureError as error:
        sys.exit(str(error))
