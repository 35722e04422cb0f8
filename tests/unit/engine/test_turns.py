"""Whose turn it is: whatever waits and runs, the order holds, and as few make way as it takes."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.plan import Priority
from nvcache.engine.turns import Asking, Held, Preempt, Start, choose, shares

LANES = 4
SOURCES = ("az", "hf", None)


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Asking], list[int], dict[str, int], list[Held]]:
    """Tasks that wait, one at most of a source, and some workers with fetches, other tasks' lanes in between, and limits that are kept."""
    numbers = iter(draw(st.permutations(range(40))))
    urgency = st.sampled_from(Priority)
    asking = [Asking(next(numbers), draw(urgency), draw(st.integers(1, LANES)), source) for source in SOURCES if draw(st.booleans())]
    held, free, used = [], [], dict.fromkeys(SOURCES, 0)
    for worker in range(draw(st.integers(0, 3))):
        left = LANES - draw(st.integers(0, 2))  # what does not make way
        while left and draw(st.booleans()):
            each = Held(next(numbers), worker, draw(urgency), draw(st.integers(1, left)), draw(st.sampled_from(SOURCES)), draw(st.booleans()))
            held.append(each)
            left -= each.lanes
            used[each.source] += each.lanes
        free.append(draw(st.integers(0, left)))
    room = {source: draw(st.integers(0, LANES)) for source in ("az", "hf") if draw(st.booleans())}
    # a task is cut to its source's limit, so that it fits in once nothing else runs
    return [each for each in asking if each.source not in room or each.lanes <= room[each.source] + used[each.source]], free, room, held


def fits(asking: Asking, free: list[int], room: dict[str, int], gone: list[Held]) -> bool:
    """Whether it could start once those have ended."""
    allowed = asking.source not in room or asking.lanes <= room[asking.source] + sum(each.lanes for each in gone if each.source == asking.source)
    return allowed and any(asking.lanes <= lanes + sum(each.lanes for each in gone if each.worker == worker) for worker, lanes in enumerate(free))


def order(asking: Asking) -> tuple[int, int]:
    """Who comes first."""
    return asking.priority, asking.number


@given(pools())
def test_a_task_starts_where_it_fits_and_overtakes_only_what_its_source_holds_up(
    pool: tuple[list[Asking], list[int], dict[str, int], list[Held]],
) -> None:
    asking, free, room, held = pool
    step = choose(asking, free, room, held)
    if isinstance(step, Start):
        started = next(each for each in asking if each.number == step.number)
        assert started.lanes <= free[step.worker] == max(free)
        assert fits(started, free, room, [])
        for other in asking:
            if order(other) < order(started):
                assert other.source in room
                assert other.lanes > room[other.source]
    else:
        first = min(asking, key=order, default=None)
        assert first is None or not fits(first, free, room, [])


@given(pools())
def test_no_more_make_way_than_it_takes_and_only_for_who_is_waited_for(pool: tuple[list[Asking], list[int], dict[str, int], list[Held]]) -> None:
    asking, free, room, held = pool
    step = choose(asking, free, room, held)
    stopping = [each for each in held if each.stopping]
    if isinstance(step, Preempt):
        favoured = next(each for each in asking if each.number == step.number)
        victims = [each for each in held if each.number in step.victims]
        assert favoured.priority is Priority.DEMAND
        assert victims
        assert all(each.priority > favoured.priority and not each.stopping for each in victims)
        assert fits(favoured, free, room, stopping + victims)
        for fewer in range(len(victims)):
            assert not any(fits(favoured, free, room, [*stopping, *some]) for some in combinations(victims, fewer))


@given(pools())
def test_who_is_waited_for_never_waits_for_less_urgent_fetches(pool: tuple[list[Asking], list[int], dict[str, int], list[Held]]) -> None:
    asking, free, room, held = pool
    first = min(asking, key=order, default=None)
    if choose(asking, free, room, held) is None and first is not None and first.priority is Priority.DEMAND:
        stopping = [each for each in held if each.stopping]
        movable = [each for each in held if each.priority > first.priority and not each.stopping]
        assert fits(first, free, room, stopping) or not fits(first, free, room, stopping + movable)


@given(pools())
def test_steps_come_to_an_end(pool: tuple[list[Asking], list[int], dict[str, int], list[Held]]) -> None:
    asking, free, room, held = pool
    for _ in range(len(asking) + len(held)):
        match choose(asking, free, room, held):
            case Start(number, worker):
                started = next(each for each in asking if each.number == number)
                asking = [each for each in asking if each is not started]
                free = [lanes - started.lanes * (index == worker) for index, lanes in enumerate(free)]
                room = {source: lanes - started.lanes * (source == started.source) for source, lanes in room.items()}
            case Preempt(_, victims):
                held = [Held(h.number, h.worker, h.priority, h.lanes, h.source, h.stopping or h.number in victims) for h in held]
            case None:
                break
    assert choose(asking, free, room, held) is None


def test_the_least_urgent_and_newest_make_way() -> None:
    held = [Held(1, 0, Priority.REPAIR, 2), Held(2, 0, Priority.DECLARED, 2), Held(3, 1, Priority.REPAIR, 2), Held(4, 1, Priority.REPAIR, 2)]
    assert choose([Asking(9, Priority.DEMAND, 2)], [0], {}, held[:2]) == Preempt(9, (1,))
    assert choose([Asking(9, Priority.DEMAND, 2)], [0, 0], {}, held[1:]) == Preempt(9, (4,))
    assert choose([Asking(9, Priority.DEMAND, 4)], [0, 0], {}, held) == Preempt(9, (3, 4))


@given(st.integers(1, 10**12), st.lists(st.integers(0, 32), max_size=16))
def test_shares_add_up_to_the_bandwidth(bandwidth: int, lanes: list[int]) -> None:
    parts = shares(bandwidth, lanes)
    assert [part > 0 for part in parts] == [each > 0 for each in lanes]
    assert not any(lanes) or abs(sum(parts) - bandwidth) <= 1e-6 * bandwidth
