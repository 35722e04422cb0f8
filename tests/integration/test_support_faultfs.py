"""The calls that fail by order (tests/support/faultfs): what is lifted does not strike any more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faultfs import FaultFs

BUSY = """
import os, sys, threading

def touch():
    while True:
        os.utime(sys.argv[1])

for _ in range(3):
    threading.Thread(target=touch, daemon=True).start()
sys.stdout.write("begun\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[FaultFs, Path]]:
    """Faults, and a file that a process never stops to touch."""
    faults, file = FaultFs(tmp_path), tmp_path / "file"
    file.touch()
    command = [sys.executable, "-c", BUSY, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **faults.environment}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        try:
            yield faults, file
        finally:
            process.kill()


def test_a_call_that_is_under_way_when_the_rule_is_lifted(busy: tuple[FaultFs, Path]) -> None:
    """A daemon that "lived" would be killed by it a moment later."""
    faults, file = busy
    counted = 0
    for _ in range(1000):
        faults.watch(str(file))
        while not faults.seen:
            os.sched_yield()
        faults.lift()
        seen = faults.seen
        for _ in range(20):
            os.sched_yield()
        assert faults.seen == seen, "it was judged by a rule that was lifted"
        counted += seen
    assert counted >= 1000
