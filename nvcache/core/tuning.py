"""Decides what to set on the block queues of a mounted stripe: what they say and what the table wants → what to write. It touches no queue.

The read-ahead that counts is that of the device that is mounted, for the file system reads through it; the scheduler and where requests are completed
are matters of the disks below: an array or a volume only passes on. Meanings: Documentation/ABI/stable/sysfs-block of the kernel.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

AT_LEAST = 4 << 20  # bytes of read-ahead where the table names none; md's own, twice chunk by members, is left where it is larger


class Knob(StrEnum):
    """What can be set of a queue."""

    READ_AHEAD = "read_ahead"
    SCHEDULER = "scheduler"
    RQ_AFFINITY = "rq_affinity"


Value = int | str


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the table wants of one kind of stripe. `read_ahead` in bytes, None: at least `AT_LEAST`; another None is left as it is."""

    read_ahead: int | None = None
    scheduler: str | None = "none"
    rq_affinity: int | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """What the queue of the device at `device` (/dev/…) says now; None what cannot be read. `read_ahead` in bytes."""

    device: str
    read_ahead: int | None
    scheduler: str | None
    rq_affinity: int | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """One setting of one device: what it was, what is wanted, what it is now; `why` it is not what is wanted, if the kernel said so.

    `device` None is a stripe that is not there yet. With `least` a larger value of the kernel's own is as good.
    """

    device: str | None
    knob: Knob
    was: Value | None
    wanted: Value
    now: Value | None
    least: bool = False
    why: str = ""

    @property
    def met(self) -> bool:
        """Whether it is as wanted."""
        return self.now == self.wanted


def decide_tuning(tuning: Tuning, top: Queue | None, members: Sequence[Queue]) -> tuple[Tuned, ...]:
    """What is wanted of the mounted device (`top`, None before it is there) and of the disks it is made of; nothing is set yet, so `now` is `was`."""
    before = top.read_ahead if top is not None else None
    least = tuning.read_ahead is None
    size = max(AT_LEAST, before or 0) if tuning.read_ahead is None else tuning.read_ahead // mmap.PAGESIZE * mmap.PAGESIZE  # as the kernel counts
    found = [Tuned(top.device if top is not None else None, Knob.READ_AHEAD, before, size, before, least)]
    if tuning.scheduler is not None:
        found += [Tuned(disk.device, Knob.SCHEDULER, disk.scheduler, tuning.scheduler, disk.scheduler) for disk in members]
    if tuning.rq_affinity is not None:
        found += [Tuned(disk.device, Knob.RQ_AFFINITY, disk.rq_affinity, tuning.rq_affinity, disk.rq_affinity) for disk in members]
    return tuple(found)


def change(tuned: Iterable[Tuned]) -> str | None:
    """What differs from what was, as one step in words, such as `set scheduler of /dev/nvme0n1 from mq-deadline to none`; None: nothing."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in tuned:
        if one.was != one.wanted:
            wanted = f"at least {_shown(one, one.wanted)}" if one.least and one.device is None else _shown(one, one.wanted)
            was = f"from {_shown(one, one.was)} " if one.was is not None else ""
            groups.setdefault((one.knob, f"{was}to {wanted}"), []).append(one.device or "the stripe")
    parts = [f"{knob} of {', '.join(devices)} {values}" for (knob, values), devices in groups.items()]
    return f"set {', '.join(parts)}" if parts else None


def complaints(tuned: Iterable[Tuned]) -> tuple[str, ...]:
    """What is not as wanted though it was set, in words; devices with the same fault together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in tuned:
        if not one.met:
            why = one.why or "the kernel makes another value of it"
            groups.setdefault((one.knob, _shown(one, one.now), _shown(one, one.wanted), why), []).append(one.device or "the stripe")
    return tuple(f"{knob} of {', '.join(devices)} is {now}, not {wanted}: {why}" for (knob, now, wanted, why), devices in groups.items())


def _shown(one: Tuned, value: Value | None) -> str:
    if value is None:
        return "unknown"
    return f"{value >> 10} KiB" if one.knob is Knob.READ_AHEAD and isinstance(value, int) else str(value)  # as read_ahead_kb has it
