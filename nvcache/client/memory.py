"""How much memory this process may still fill with page cache. It reads the kernel's figures and reserves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARGIN = 0.1  # of each limit, for what the loader itself needs
NO_LIMIT = 1 << 62
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True)
class Room:
    """Bytes below the tightest limit, less a margin; at least 0.

    `available` counts page cache as free that is inactive, which the kernel gives up first, or that no process has mapped; `free` counts only what
    nothing uses.
    """

    available: int
    free: int

    def beside(self, cached: int) -> int:
        """What may be added to a model of which `cached` bytes are in the page cache, without pushing those out again.

        They may be counted in `available`, as page cache; where they are not (they are mapped, or another cgroup's), `free` is the truth.
        """
        return max(0, self.available - cached, self.free)


def room(cgroups: Path = CGROUPS, proc: Path = PROC) -> Room:
    """What the machine and every memory cgroup above this process leave. Both cgroup versions are read; what cannot be read sets no limit."""
    every = [_machine(proc), *_v2(cgroups, proc), *_v1(cgroups, proc)]
    return Room(max(0, min(left.available for left in every)), max(0, min(left.free for left in every)))


def _machine(proc: Path) -> Room:
    figures = {name: 1024 * number for name, number in _pairs(proc / "meminfo").items()}
    margin = int(MARGIN * figures.get("MemTotal:", 0))
    return Room(figures.get("MemAvailable:", NO_LIMIT) - margin, figures.get("MemFree:", NO_LIMIT) - margin)


def _v2(cgroups: Path, proc: Path) -> Iterator[Room]:
    """Every level from this process's own group up to what the mount shows; inside a container that is the container's limit.

    Beyond `memory.high` the kernel slows a group down instead of giving it more (cgroup-v2, memory interface files), so it is a limit as well.
    """
    for group in _groups(cgroups, proc, "0::"):
        limits = [int(text) for name in ("memory.max", "memory.high") if (text := _text(group / name).strip()).isdigit()]
        if limits:
            figures = _pairs(group / "memory.stat")
            idle = _idle(figures.get("inactive_file", 0), figures.get("active_file", 0), figures.get("file_mapped", 0))
            yield _left(min(limits), _number(group / "memory.current"), idle)


def _v1(cgroups: Path, proc: Path) -> Iterator[Room]:
    for group in _groups(cgroups / "memory", proc, ":memory:"):
        limit = _number(group / "memory.limit_in_bytes")
        figures = _pairs(group / "memory.stat")
        if limit:  # a container does not see the groups above its own, whose limits the kernel sums up here
            limit = min(limit, figures.get("hierarchical_memory_limit", limit))
            idle = _idle(figures.get("total_inactive_file", 0), figures.get("total_active_file", 0), figures.get("total_mapped_file", 0))
            yield _left(limit, _number(group / "memory.usage_in_bytes"), idle)


def _groups(top: Path, proc: Path, mark: str) -> Iterator[Path]:
    """This process's group of a hierarchy and those above it. A path that the mount does not show, as in a container, leaves its top."""
    lines = (line for line in _text(proc / "self/cgroup").splitlines() if mark in line)
    group = top / next(lines, mark).partition(mark)[2].strip("/")
    while group.is_relative_to(top):
        yield group
        group = group.parent


def _idle(inactive: int, active: int, mapped: int) -> int:
    """Page cache that can be given up for more: a model that was read twice, or in large pages, is active, whether anybody still wants it or not."""
    return inactive + max(0, active - mapped)


def _left(limit: int, used: int, idle: int) -> Room:
    margin = int(MARGIN * limit)
    return Room(limit - margin - (used - idle), limit - margin - used)


def _pairs(file: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(file: Path) -> int:
    text = _text(file).strip()
    return int(text) if text.isdigit() else 0


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
