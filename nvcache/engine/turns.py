"""Whose turn it is in the pool of workers: which task starts where, and which running ones make way. Pure choices; it starts and stops nothing.

Tasks start in order of urgency, then of arrival. One that its source's limit holds up keeps back only tasks of the same source; one that waits for
lanes of a worker keeps back all that come after it, or a task of many lanes would never find them free together. A task that somebody waits for
need not wait for less urgent fetches: as few of them as it takes make way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nvcache.core.plan import Priority


@dataclass(frozen=True, slots=True)
class Limit:
    """What this node may ask of one source at a time: range requests in flight, and bytes a second. None: as many as there are."""

    connections: int | None = None
    bandwidth: int | None = None


@dataclass(frozen=True, slots=True)
class Asking:
    """A task that waits. `number` is its place in the order of arrival, `source` None where it asks none."""

    number: int
    priority: Priority
    lanes: int
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A running fetch that may be stopped and gone on with later, or (`stopping`) that was told to."""

    number: int
    worker: int
    priority: Priority
    lanes: int
    source: str | None = None
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Start task `number` on `worker`."""

    number: int
    worker: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """Stop these running tasks, by number, for task `number`."""

    number: int
    victims: tuple[int, ...]


def choose(asking: Iterable[Asking], free: Sequence[int], room: Mapping[str, int], held: Collection[Held]) -> Start | Preempt | None:
    """The next step, or None: there is nothing to do before something ends.

    `asking` needs to have only the first of each source. `free` are the free lanes of each worker; `room` is what each limited source still allows;
    `held` are all that could make way or do so already.
    """
    roomiest = max(range(len(free)), key=free.__getitem__, default=None)
    for each in sorted(asking, key=lambda task: (task.priority, task.number)):
        allowed = each.source is None or each.lanes <= room.get(each.source, each.lanes)
        if allowed and roomiest is not None and each.lanes <= free[roomiest]:
            return Start(each.number, roomiest)
        way = _way_for(each, free, room, held)
        if way is not None:
            return Preempt(each.number, tuple(victim.number for victim in way)) if way else None
        if allowed:
            return None
    return None


def _way_for(asking: Asking, free: Sequence[int], room: Mapping[str, int], held: Collection[Held]) -> list[Held] | None:
    """Who has to be stopped for `asking`: nobody when enough are stopping already; None when it would be no use.

    The most urgent and oldest are left alone first, then whoever else is not needed.
    """
    if asking.priority is not Priority.DEMAND:
        return None
    allowed = None if asking.source is None else room.get(asking.source)

    def enough(going: Iterable[Held]) -> bool:
        lanes, asked = list(free), 0
        for each in going:
            lanes[each.worker] += each.lanes
            asked += each.lanes if each.source == asking.source else 0
        return asking.lanes <= max(lanes, default=0) and (allowed is None or asking.lanes <= allowed + asked)

    stopping = [each for each in held if each.stopping]
    victims = [each for each in held if not each.stopping and each.priority > asking.priority]
    if not enough(stopping + victims):
        return None
    for each in sorted(victims, key=lambda each: (each.priority, each.number)):
        rest = [other for other in victims if other is not each]
        if enough(stopping + rest):
            victims = rest
    return victims


def shares(bandwidth: int, lanes: Sequence[int]) -> list[float]:
    """What each worker gets of a source's `bandwidth` (bytes a second), in proportion to the lanes that it runs for it."""
    total = sum(lanes)
    return [bandwidth * each / total if total else 0.0 for each in lanes]
