"""Decides whether bytes may come in: the store's limit, what is promised to fills, and the file system's room. It measures and reserves nothing."""

from __future__ import annotations

from dataclasses import dataclass

from nvcache.core.evict import Eviction
from nvcache.errors import Code, SpaceError

SHOWN = 3  # models that an error names
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


@dataclass(frozen=True, slots=True)
class Room:
    """The store's room, in bytes. Every byte is counted once: `reserved` is what fills were promised and have not yet taken from the disk.

    limit      most bytes the store may hold (`effective_limit`)
    used       what the store has on the disk: blobs, and the preallocated files of running fills
    reserved   promised to admitted fills, not yet allocated
    free       what the file system has left for the daemon's user
    min_free   what must stay free for others
    """

    limit: int
    used: int
    reserved: int
    free: int
    min_free: int = 0

    @property
    def capacity(self) -> int:
        """The most the store could hold if it were empty: its limit, or what the disk can give."""
        return max(0, min(self.limit, self.free + self.used - self.min_free))

    @property
    def disk_is_short(self) -> bool:
        """Whether it is the disk, not the limit, that leaves no more room: there, bytes that a process has open are free only when it closes them."""
        return self.free - self.min_free < self.limit - self.used

    @property
    def available(self) -> int:
        """What could be admitted now; never negative."""
        return max(0, min(self.limit - self.used, self.free - self.min_free) - self.reserved)


def effective_limit(max_bytes: int | None, free: int, used: int) -> int:
    """`max_bytes`, or half of what would be free without the store's own `used` bytes, so that the limit stays put as the store fills."""
    return (free + used) // 2 if max_bytes is None else max_bytes


def admit(room: Room, need: int, *, what: str) -> None:
    """Accept `need` more bytes for `what`, or raise `SpaceError`: too-large when an empty cache could not hold them, full when it cannot just now."""
    facts: dict[str, object] = {
        "need_bytes": need,
        "available_bytes": room.available,
        "limit_bytes": room.limit,
        "used_bytes": room.used,
        "reserved_bytes": room.reserved,
        "free_bytes": room.free,
        "min_free_bytes": room.min_free,
    }
    if need > room.capacity:
        why = f"it needs {amount(need)}, an empty cache could hold {amount(room.capacity)}"
        if room.capacity < room.limit:
            why += f" (its limit is {amount(room.limit)}, its disk has less)"
        raise SpaceError(Code.TOO_LARGE, f"cannot make room for {what}: {why}", facts=facts)
    if need > room.available:
        why = f"it needs {amount(need)}, {amount(room.available)} are available (used {amount(room.used)}, promised {amount(room.reserved)}"
        why += f", limit {amount(room.limit)}, free on the disk {amount(room.free)})"
        raise SpaceError(Code.FULL, f"cannot make room for {what} just now: {why}", facts=facts)


def shortfall(error: SpaceError) -> int:
    """The bytes that `admit` was short of, from its error (full)."""
    return int(str(error.facts["need_bytes"])) - int(str(error.facts["available_bytes"]))


def in_the_way(error: SpaceError, plan: Eviction, *, names: bool = False) -> SpaceError:
    """The same error, with what eviction could free and which models are held, and why; with `names` by whom, for nobody but an operator."""
    whys = [(each, each.named if names else each.held) for each in plan.in_the_way]
    held = [{"entry": each.entry, "bytes": each.size, "held": list(why)} for each, why in whys]
    why = f"; evicting everything that is not held would free {human(plan.freed)}"
    if held:
        some = ", ".join(f"{each.entry} ({human(each.size)}: {', '.join(why)})" for each, why in whys[:SHOWN])
        why += f"; held are {some}" + (f" and {len(held) - SHOWN} more" if len(held) > SHOWN else "")
    return SpaceError(error.code, f"{error}{why}", hint=error.hint, facts={**error.facts, "evictable_bytes": plan.freed, "in_the_way": held})


def human(size: float) -> str:
    """A size for people, in powers of a thousand: `1.5 GB`, `512 bytes`."""
    value = float(size)
    for unit in _UNITS:
        if abs(value) < 999.95 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def amount(size: int) -> str:
    """A size in both forms: `1.5 GB (1500000000 bytes)`."""
    return human(size) if abs(size) < 1000 else f"{human(size)} ({size} bytes)"
