"""The ways to fetch a model from Blob Storage that are compared: nvcache's, azcopy's, the SDK's. It runs and measures none of them."""

from __future__ import annotations

import sys

from bench.rows import TRIAL, Row, Task, in_target, ours
from tests.support.azcopy import AZCOPY
from tests.support.azure_nginx import MIRRORED, PLAIN, UPLOADED


def _azcopy(task: Task, check: str) -> list[str]:
    quiet = ["--skip-version-check", "--output-level", "essential"]
    source = f"{task.reference}/{MIRRORED}/*"
    return [str(AZCOPY), "copy", source, str(task.target), "--recursive", "--from-to", "BlobLocal", "--check-md5", check, *quiet]


def _sdk(task: Task) -> list[str]:
    return [sys.executable, "-m", "bench.sdk", task.reference, f"{MIRRORED}/", str(task.target)]


NO_SYSLOG = (("AZCOPY_DISABLE_SYSLOG", "true"),)
BLOB_ROWS = (
    ours("SHA-256, headers", prefix=f"/{MIRRORED}"),
    ours("MD5, headers", "nvcache MD5", f"/{UPLOADED}"),
    ours("MD5 of ranges, headers", "nvcache first-use", f"/{PLAIN}"),
    Row("azcopy", "sizes", lambda task: _azcopy(task, "NoCheck"), in_target, NO_SYSLOG),
    Row("azcopy MD5", "MD5", lambda task: _azcopy(task, "FailIfDifferent"), in_target, NO_SYSLOG),
    Row("SDK", "sizes", _sdk, in_target),
    TRIAL,
)
