"""Ending a server process that a test started. It ends no other."""

from __future__ import annotations

import subprocess


def end(process: subprocess.Popen[bytes] | None) -> None:
    """Ask it to stop, and insist after ten seconds."""
    if process is None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
