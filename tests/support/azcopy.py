"""Runs azcopy, Microsoft's own tool for copying to and from Blob Storage, with its logs and job plans in the test's folder. It makes no SAS."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.azurite import NODE

AZCOPY = NODE / "node_modules/@azure-tools/azcopy-linux/dist/bin/azcopy_linux_amd64"


def upload(directory: Path, url: str, work: Path, *, md5: bool = False, timeout_s: float = 120) -> None:
    """Put what is in `directory` at `url` (container, prefix and SAS); with the Content-MD5 of every file if `md5`."""
    _copy(work, timeout_s, f"{directory}/*", url, "--from-to", "LocalBlob", *(["--put-md5"] if md5 else []))


def download(url: str, directory: Path, work: Path, *, check_md5: bool = False, timeout_s: float = 120) -> None:
    """Fetch what is below `url` (container, prefix and SAS) into `directory`; `check_md5` compares each file with its Content-MD5, if it has one."""
    directory.mkdir(parents=True, exist_ok=True)
    base, _, sas = url.partition("?")
    check = "FailIfDifferent" if check_md5 else "NoCheck"
    _copy(work, timeout_s, f"{base}/*?{sas}", str(directory), "--from-to", "BlobLocal", "--check-md5", check)


def _copy(work: Path, timeout_s: float, *arguments: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(work), "AZCOPY_LOG_LOCATION": str(work), "AZCOPY_JOB_PLAN_LOCATION": str(work)}
    environment |= {"AZCOPY_DISABLE_SYSLOG": "true", "NO_PROXY": "127.0.0.1"}
    command = [AZCOPY, "copy", *arguments, "--recursive", "--skip-version-check", "--output-level", "essential"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot copy with azcopy: {done.stdout[-2000:]}{done.stderr[-2000:]}")
