"""Real block devices for tests: loop devices on files of their own. It needs root, and touches no other device."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.disks import unmount


@contextmanager
def loop(image: Path) -> Iterator[str]:
    """The node of a loop device on `image`, for as long as the context lasts."""
    node = run("losetup", "--find", "--show", "--nooverlap", str(image)).strip()
    try:
        yield node
    finally:
        run("losetup", "--detach", node)


@contextmanager
def mount(node: str, point: Path) -> Iterator[Path]:
    """The file system on `node`, mounted at the new directory `point`."""
    point.mkdir()
    run("mount", node, str(point))
    try:
        yield point
    finally:
        unmount(point)


def run(*argv: str) -> str:
    """What a command that must succeed wrote."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout
