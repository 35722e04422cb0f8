"""How much memory this process may still fill with page cache. It reads the kernel's figures and reserves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MARGIN = 0.1  # of the limit, for the loader's own memory
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def available(cgroups: Path = CGROUPS, proc: Path = PROC) -> int:
    """Bytes: the least of what the machine and every memory cgroup above this process has free, less a margin; at least 0.

    Free means not used by anything but inactive page cache, which the kernel gives up first. Both cgroup versions are read; what cannot be read sets
    no limit.
    """
    return max(0, min([_machine(proc), *_v2(cgroups, proc), *_v1(cgroups)]))


def _machine(proc: Path) -> int:
    figures = _pairs(proc / "meminfo")
    return (figures["MemAvailable:"] - int(MARGIN * figures["MemTotal:"])) * 1024


def _v2(cgroups: Path, proc: Path) -> Iterator[int]:
    """Every level from this process's own group up to what the mount shows; inside a container that is the container's limit."""
    line = next((line for line in _text(proc / "self/cgroup").splitlines() if line.startswith("0::")), None)
    if line is None:
        return
    group = cgroups / line[3:].strip("/")
    while group.is_relative_to(cgroups):
        limit = _text(group / "memory.max").strip()
        if limit.isdigit():
            yield _left(int(limit), _number(group / "memory.current"), _pairs(group / "memory.stat").get("inactive_file", 0))
        group = group.parent


def _v1(cgroups: Path) -> Iterator[int]:
    group = cgroups / "memory"
    limit = _number(group / "memory.limit_in_bytes")
    if limit:
        yield _left(limit, _number(group / "memory.usage_in_bytes"), _pairs(group / "memory.stat").get("total_inactive_file", 0))


def _left(limit: int, used: int, inactive: int) -> int:
    return limit - int(MARGIN * limit) - (used - inactive)


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
