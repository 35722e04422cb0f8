"""Which models go to make room."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.evict import LEASED, Candidate, Marks, excess, plan_eviction
from nvcache.core.space import Room

BLOBS = {f"blob{at}": 10**at for at in range(6)}
candidates = st.lists(
    st.builds(
        Candidate,
        entry=st.sampled_from("abcdefgh"),
        blobs=st.sets(st.sampled_from(sorted(BLOBS)), max_size=4).map(lambda names: {name: BLOBS[name] for name in names}),
        last_used=st.integers(0, 5).map(float),
        held=st.sampled_from([(), (), ("pinned",), (LEASED,)]),
        in_use=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.entry,
)
needs = st.integers(0, 2 * sum(BLOBS.values()))
sizes = st.integers(0, 10**15)
wanted_blobs = st.sets(st.sampled_from(sorted(BLOBS)), max_size=2)


def free_without(every: Sequence[Candidate], gone: Collection[str], wanted: Collection[str]) -> int:
    """Bytes that are free when those entries are gone, counted by what is left."""
    before = {sha256 for each in every for sha256 in each.blobs}
    after = {sha256 for each in every if each.entry not in gone for sha256 in each.blobs}
    return sum(BLOBS[sha256] for sha256 in before - after - set(wanted))


@given(needs, candidates, wanted_blobs)
def test_what_is_said_to_be_freed_is_freed_and_nobody_goes_in_vain(need: int, every: list[Candidate], wanted: set[str]) -> None:
    plan = plan_eviction(need, every, wanted)
    gone = [victim.entry for victim in plan.victims]
    assert plan.freed == free_without(every, gone, wanted)
    most = free_without(every, {each.entry for each in every if not each.held}, wanted)
    assert plan.enough == (most >= need)
    for entry in gone:
        assert free_without(every, set(gone) - {entry}, wanted) < min(need, most), "it could have stayed"


@given(needs, candidates, wanted_blobs)
def test_who_is_held_stays_and_is_named(need: int, every: list[Candidate], wanted: set[str]) -> None:
    plan = plan_eviction(need, every, wanted)
    held = {each.entry for each in every if each.held}
    assert held.isdisjoint(victim.entry for victim in plan.victims)
    assert {each.entry for each in plan.in_the_way} == held


@given(needs, candidates)
def test_who_goes_was_used_before_whoever_could_have_gone_instead(need: int, every: list[Candidate]) -> None:
    """Of models that share nothing: whoever stays and alone frees no less than a victim was used later, or is open."""
    alone = [
        Candidate(each.entry, {f"{each.entry}{sha256}": size for sha256, size in each.blobs.items()}, each.last_used, each.held) for each in every
    ]
    plan = plan_eviction(need, alone)
    gone = {victim.entry for victim in plan.victims}
    order = sorted((each for each in alone if not each.held), key=lambda each: (each.last_used, each.entry))
    freed = 0
    needed = set()
    for each in order:
        if freed >= need:
            break
        needed.add(each.entry)
        freed += each.size
    assert gone <= needed


def test_what_is_open_goes_last_and_a_shared_blob_with_its_last_model() -> None:
    old_and_open = Candidate("a@1", {"x": 10}, 1.0, in_use=True)
    pair = [Candidate("b@1", {"s": 5, "b": 1}, 2.0), Candidate("b@2", {"s": 5, "c": 1}, 3.0)]
    plan = plan_eviction(7, [old_and_open, *pair])
    assert [(victim.entry, victim.frees) for victim in plan.victims] == [("b@1", 1), ("b@2", 6)]
    assert [victim.entry for victim in plan_eviction(8, [old_and_open, *pair]).victims] == ["a@1"], "it frees enough by itself"


def test_nothing_goes_for_nothing() -> None:
    assert plan_eviction(0, [Candidate("a@1", {"x": 10}, 1.0)]).victims == ()
    assert plan_eviction(-5, [Candidate("a@1", {"x": 10}, 1.0)]).need == 0


def test_what_can_never_be_freed_is_known_in_advance() -> None:
    plan = plan_eviction(100, [Candidate("a@1", {"x": 60}, 1.0), Candidate("b@1", {"y": 60}, 2.0, ("pinned",))])
    assert (plan.enough, plan.freed, [each.held for each in plan.in_the_way]) == (False, 60, [("pinned",)])


@pytest.mark.parametrize(
    ("used", "reserved", "free", "over"),
    [
        (95, 0, 1000, 0),  # at the mark
        (96, 0, 1000, 6),  # above: down to the low one
        (90, 6, 1000, 6),  # what is promised counts
        (50, 0, 53, 0),  # the disk could hold 53 without others: just so
        (50, 0, 52, 4),  # others filled it: down to the low mark of what is left
        (50, 2, 51, 7),
        (50, 0, 0, 50),  # and more than is to be left to them
    ],
)
def test_the_marks(used: int, reserved: int, free: int, over: int) -> None:
    assert excess(Room(limit=100, used=used, reserved=reserved, free=free, min_free=50).capacity, used, reserved, Marks()) == over


@given(limit=sizes, used=sizes, reserved=sizes, free=sizes, min_free=sizes)
def test_below_the_marks_others_have_what_they_need(limit: int, used: int, reserved: int, free: int, min_free: int) -> None:
    room = Room(limit=limit, used=used, reserved=reserved, free=free, min_free=min_free)
    if excess(room.capacity, used, reserved, Marks()) == 0 and used + reserved > 0:
        assert free - reserved >= min_free
        assert used + reserved <= limit
    over = excess(room.capacity, used, reserved, Marks())
    assert over <= used + reserved
    if over <= used:
        after = Room(limit=limit, used=used - over, reserved=reserved, free=free + over, min_free=min_free)
        assert excess(after.capacity, after.used, reserved, Marks()) == 0, "what it takes is enough"


def test_a_thousand_models_are_planned_at_once() -> None:
    """Each with ten files, half of them shared with the next: what is counted is counted once."""
    every = [Candidate(f"m{at:04}@1", {f"{at + part // 5}-{part % 5}": 10 for part in range(10)}, float(at)) for at in range(1000)]
    plan = plan_eviction(25_000, every)
    assert plan.enough
    assert len(plan.victims) == 500
