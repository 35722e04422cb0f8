"""A daemon that is killed at each of its changes of the disk in turn: what is committed or withdrawn is so as a whole, whichever it was.

CI takes every so-manieth, `KILL_POINTS=1` all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest

from tests.walk.ground import Ground
from tests.walk.invariants import check, finish
from tests.walk.known import Key
from tests.walk.walker import Walker

ALL = os.environ.get("KILL_POINTS") == "1"
FIRST = 3  # of those that CI takes


@pytest.fixture(scope="module")
def walker() -> Iterator[Walker]:
    """Each test ends with `finish`, which leaves nothing."""
    with Ground("xfs") as ground:
        one = Walker(ground)
        yield one
        one.unmap_all()


def points(stride: int) -> Iterator[int]:
    """Which calls to be killed at, one after the other, where CI takes one of `stride`."""
    return count(1) if ALL else count(FIRST, stride)


def key_of(walker: Walker, name: str) -> Key:
    """The model as it is on main."""
    return name, walker.on.repo(name).commit


def test_a_fill(walker: Walker) -> None:
    walker.warm("pair", pin=True)
    key, told = key_of(walker, "cousin"), []
    for nth in points(23):
        told.append(walker.die_at(nth, "warm", "cousin", pin=False))
        check(walker)
        if key in walker.planned:
            assert key in walker.ready, "what was begun is gone on with"
        if key in walker.ready:
            assert walker.remove(key) == "removed"
        if told[-1].startswith("lived"):
            break
    assert sum(each.startswith("died") for each in told) >= 4, told
    finish(walker)


def test_a_removal(walker: Walker) -> None:
    walker.warm("pair", pin=True)
    key, told = key_of(walker, "cousin"), []
    for nth in points(9):
        walker.warm("cousin", pin=False)
        told.append(walker.die_at(nth, "remove", key))
        check(walker)
        if told[-1].startswith("lived"):
            break
    assert sum(each.startswith("died") for each in told) >= 4, told
    finish(walker)


def test_a_repair(walker: Walker) -> None:
    walker.warm("pair", pin=True)
    walker.warm("cousin", pin=False)
    key, told = key_of(walker, "pair"), []
    for nth in points(53):
        assert walker.damage(key, "flip", 0) == "a.safetensors"
        told.append(walker.die_at(nth, "verify", key))
        check(walker)
        walker.verify(key)
        check(walker)
        if told[-1].startswith("lived"):
            break
    assert sum(each.startswith("died") for each in told) >= 4, told
    finish(walker)


@pytest.mark.parametrize("what", ["pin", "lease", "release"])
def test_a_hold(walker: Walker, what: str) -> None:
    walker.warm("small", pin=False)
    key = key_of(walker, "small")
    for nth in points(4):
        if what == "release":
            walker.lease(key, 600)
        arguments = {"pin": (key,), "lease": (key, 600.0), "release": (0,)}[what]
        named = {"pinned": not walker.ready[key]} if what == "pin" else {}
        told = walker.die_at(nth, what, *arguments, **named)
        check(walker)
        if told.startswith("lived"):
            break
    finish(walker)
