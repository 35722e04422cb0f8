"""The ways to fetch a model that are compared: the command of each, and where its files end up. It runs and measures none of them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from bench.daemon import NVCACHE

REPO = "bench/llama"


@dataclass(frozen=True)
class Wanted:
    """One file of the model and the URL the origin gives it under."""

    path: str
    size: int
    sha256: str
    url: str


@dataclass(frozen=True)
class Task:
    """What is to be fetched, and the empty directory `target` to fetch it into.

    `reference` is the model's on the Hub, or the URL of a container in which prefixes hold the same files with different digests.
    """

    files: tuple[Wanted, ...]
    reference: str
    commit: str
    target: Path
    ca_file: Path | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Row:
    """One way. `verifies` says what of the bytes it proves; `found` where the model's files are, from the task and what it printed.

    `daemon`: its command asks a daemon, which is started before.
    """

    name: str
    verifies: str
    command: Callable[[Task], list[str]]
    found: Callable[[Task, str], Path]
    environment: tuple[tuple[str, str], ...] = ()
    daemon: bool = False


def wanted(directory: Path, base: str) -> tuple[Wanted, ...]:
    """The files under `directory` as they are served at the URL `base`, which ends in a slash."""
    found = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        found.append(Wanted(name, path.stat().st_size, sha256_of(path), base + quote(name)))
    return tuple(found)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ours(verifies: str, name: str = "nvcache", prefix: str = "") -> Row:
    """A row of nvcache's: the reference, or what is below its `prefix`."""
    found = lambda task, said: Path(json.loads(said)["path"])  # noqa: E731 - as those of the peers
    return Row(name, verifies, lambda task: [*NVCACHE, "warm", "--json", task.reference + prefix], found, daemon=True)


def _hf(task: Task) -> list[str]:
    hf = Path(sys.executable).with_name("hf")
    return [str(hf), "download", REPO, "--cache-dir", str(task.target), "--max-workers", "8"]


def _aria2(task: Task) -> list[str]:
    urls = task.target / "urls"
    urls.write_text("".join(f"{file.url}\n  out={file.path}\n" for file in task.files))
    quiet = ["--console-log-level=error", "--summary-interval=0", "--download-result=hide", "--no-conf"]
    trust = [f"--ca-certificate={task.ca_file}"] if task.ca_file else []
    return ["aria2c", "-x4", "-s4", "-j4", "--file-allocation=falloc", *quiet, *trust, f"--dir={task.target}", f"--input-file={urls}"]


def _curl(task: Task) -> list[str]:
    """--parallel-immediate: do not wait to learn whether a connection can be shared, over HTTP/1.1 it cannot. --disable: no curlrc."""
    quiet = ["--silent", "--show-error", "--no-progress-meter"]
    trust = ["--cacert", str(task.ca_file)] if task.ca_file else []
    each = [word for file in task.files for word in ("--output", str(task.target / file.path), file.url)]
    return ["curl", "--disable", "-Z", "--parallel-max", "4", "--parallel-immediate", *quiet, "--fail", "--location", "--create-dirs", *trust, *each]


def _trial(task: Task) -> list[str]:
    listing = task.target / "list"
    listing.write_text("".join(f"{file.url} {task.target / file.path} {file.sha256}\n" for file in task.files))
    return [sys.executable, "-m", "bench.trial", str(listing)]


def in_target(task: Task, said: str) -> Path:
    """Where most leave the files."""
    return task.target


OURS = ours("SHA-256, headers")
HF = Row(
    "hf download",
    "sizes",
    _hf,
    lambda task, said: task.target / f"models--{REPO.replace('/', '--')}" / "snapshots" / task.commit,
    (("HF_HUB_DISABLE_XET", "1"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("HF_HUB_DISABLE_TELEMETRY", "1")),
)
ARIA2 = Row("aria2c", "no", _aria2, in_target)
CURL = Row("curl -Z", "no", _curl, in_target)
TRIAL = Row("bare trial", "SHA-256", _trial, in_target)
HUB_ROWS = (OURS, HF, ARIA2, CURL, TRIAL)
