"""Describes the machine a figure was measured on: processor, memory, kernel, file system, disk, versions. It measures nothing.

``python -m bench.machine [DIR]`` prints one line and the JSON that goes into every result.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.azurite import NODE

PEERS = {"nginx": ("nginx", "-v"), "aria2c": ("aria2c", "--version"), "curl": ("curl", "--version"), "fio": ("fio", "--version")}
PACKAGES = (
    "nvcache",
    "huggingface_hub",
    "httpx2",
    "httpx",
    "hf_xet",
    "uvicorn",
    "xxhash",
    "azure-storage-blob",
    "torch",
    "safetensors",
    "runai-model-streamer",
    "fastsafetensors",
)
FROM_NPM = {"azurite": "azurite", "azcopy": "@azure-tools/azcopy-linux"}


def describe(directory: Path) -> dict[str, Any]:
    """Facts about this machine and the disk under `directory`, as plain JSON data. Memory in bytes; what cannot be found out is None."""
    cpu = Path("/proc/cpuinfo").read_text()
    flags = set(_field(cpu, "flags", "").split())
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _field(cpu, "model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "sha_ni": "sha_ni" in flags,
        "avx512": "avx512f" in flags,
        "virtual": "hypervisor" in flags,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        **_disk(directory),
        "python": platform.python_version(),
        "versions": {name: _version(argv) for name, argv in PEERS.items()}
        | {name: _package(name) for name in PACKAGES}
        | {name: _from_npm(package) for name, package in FROM_NPM.items()},
        "revision": _revision(),
    }


def one_line(machine: dict[str, Any]) -> str:
    """The machine in one sentence, for tables and plots."""
    extras = ", ".join(name for name, key in {"SHA-NI": "sha_ni", "AVX-512": "avx512", "virtual": "virtual"}.items() if machine[key])
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({extras or 'no SHA-NI'}), {machine['memory'] / 2**30:.0f} GiB, Linux {machine['kernel']}, "
        f"{machine['file_system']} on {machine['disk']}, Python {machine['python']}"
    )


def _field(text: str, name: str, default: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else default


def _disk(directory: Path) -> dict[str, Any]:
    """The mount that holds `directory` (the longest mount point that is a prefix of it) and the block device under it, as sysfs tells."""
    real = str(directory.resolve())
    best = ("/", "", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point, (kind, source) = left.split()[4].replace("\\040", " "), right.split()[:2]
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, kind, source)
    device = os.stat(real).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    queue = next((path for path in (block / "queue", block.parent / "queue", block / "../queue") if path.is_dir()), None)
    return {
        "file_system": best[1],
        "disk": best[2] + _kind(block),
        "read_ahead_kb": int((queue / "read_ahead_kb").read_text()) if queue else None,
        "disk_free": shutil.disk_usage(real).free,
    }


def _kind(block: Path) -> str:
    """A disk's model, or what a block device is made of."""
    model, md = block / "device/model", block / "md"
    if model.is_file():
        return f" ({model.read_text().strip()})"
    if md.is_dir():
        level, disks, chunk = ((md / name).read_text().strip() for name in ("level", "raid_disks", "chunk_size"))
        return f" ({level} of {disks}, chunk {int(chunk) // 1024} KiB)"
    parts = len(list((block / "slaves").glob("*")))
    return f" (of {parts})" if parts else ""


def _version(argv: tuple[str, ...]) -> str | None:
    if shutil.which(argv[0]) is None:
        return None
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    found = re.search(r"\d+(?:\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else None


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _from_npm(name: str) -> str | None:
    about = NODE / "node_modules" / name / "package.json"
    return str(json.loads(about.read_text())["version"]) if about.is_file() else None


def _revision() -> str | None:
    """The commit measured, with a "+" when the tree differs from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "-c", "core.optionalLocks=false"]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20, check=False)
    if head.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain", "--", ":/nvcache"], capture_output=True, text=True, timeout=20, check=False).stdout
    return head.stdout.strip() + ("+" if dirty else "")


if __name__ == "__main__":
    found = describe(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    print(one_line(found))
    print(json.dumps(found, indent=1))
