"""A long random walk over a real daemon: after each step nothing that is held is lost, nothing wrong is served, and the books agree with the disk.

In CI it is the same few walks each time. `WALK_MINUTES=30` walks new ways for so long and prints their seeds, `WALK_SEED` takes another seed, and
`WALK_ON=tmpfs` (or ext4) walks on another file system. What is printed tells every step and what came of it, and how the daemon took the last ones.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.walk.ground import MB, NAMES, Ground
from tests.walk.invariants import check, finish
from tests.walk.walker import Walker

PICK = st.integers(0, 1000)
NAME = st.sampled_from(NAMES)
NTH = st.integers(1, 120)  # changes of the disk that a fill or a removal makes, roughly
MINUTES = float(os.environ.get("WALK_MINUTES", "0"))
KIND = os.environ.get("WALK_ON", "xfs")


class Walk(RuleBasedStateMachine):
    """What can happen, each at any time; what it happens to is chosen among what is there. So nothing that is drawn depends on timing."""

    failures: list[BaseException]

    def __init__(self) -> None:
        super().__init__()
        self.sound = False
        self.ground = Ground(KIND).__enter__()
        self.walker = Walker(self.ground)
        self.sound = True

    def do(self, what: str, *arguments: object, **named: object) -> None:
        """Carry out one step, and tell it."""
        told = [*map(str, arguments), *(f"{name}={value}" for name, value in named.items())]
        with self.watched(), self.walker.step(f"{what}({', '.join(told)})") as say:
            say(getattr(self.walker, what)(*arguments, **named))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remembers the first failure: whether it comes again, the same steps taken again, is not sure."""
        self.sound = False
        try:
            yield
        except BaseException as error:
            self.failures.append(error)
            raise
        self.sound = True

    def do_to(self, pick: int, what: str, *arguments: object, **named: object) -> None:
        """The same to one of the models."""
        key = self.walker.chosen(pick)
        if key is not None:
            self.do(what, key, *arguments, **named)

    @initialize(names=st.lists(NAME, min_size=1, max_size=3, unique=True))
    def begin(self, names: list[str]) -> None:
        for name in names:
            self.do("warm", name, pin=False)

    @rule(name=NAME, pin=st.sampled_from([False, False, False, True]))
    def warm(self, name: str, pin: bool) -> None:
        self.do("warm", name, pin=pin)

    @rule(name=NAME)
    def warm_again(self, name: str) -> None:
        self.do("warm", name, pin=False)

    @rule(pick=PICK, pinned=st.booleans())
    def pin(self, pick: int, pinned: bool) -> None:
        self.do_to(pick, "pin", pinned=pinned)

    @rule(pick=PICK, ttl=st.sampled_from([1.0, 600.0]))
    def lease(self, pick: int, ttl: float) -> None:
        self.do_to(pick, "lease", ttl)

    @rule(pick=PICK)
    def renew(self, pick: int) -> None:
        self.do("renew", pick)

    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        self.do("release", pick)

    @rule()
    def expire(self) -> None:
        self.do("expire")

    @rule(pick=PICK)
    def remove(self, pick: int) -> None:
        self.do_to(pick, "remove")

    @rule(megabytes=st.integers(1, 90), dry_run=st.booleans())
    def evict(self, megabytes: int, dry_run: bool) -> None:
        self.do("evict", megabytes * MB, dry_run=dry_run)

    @rule(pick=PICK)
    def map(self, pick: int) -> None:
        self.do_to(pick, "map", pick)

    @rule()
    def unmap(self) -> None:
        self.do("unmap")

    @rule(pick=PICK, kind=st.sampled_from(["flip", "truncate", "unlink", "cut"]), looks=st.booleans())
    def damage(self, pick: int, kind: str, looks: bool) -> None:
        self.do_to(pick, "damage", kind, pick)
        if looks:
            self.do_to(pick, "look")

    @rule(pick=PICK)
    def verify(self, pick: int) -> None:
        self.do_to(pick, "verify")

    @rule(down=st.booleans())
    def source(self, down: bool) -> None:
        self.do("source", down=down)

    @rule(name=NAME, forget=st.booleans())
    def push(self, name: str, forget: bool) -> None:
        self.do("push", name, forget=forget)

    @rule(megabytes=st.sampled_from([0, 4, 12, 30, None]))
    def fill_up(self, megabytes: int | None) -> None:
        self.do("fill_up", megabytes)

    @rule(models=st.dictionaries(NAME, st.booleans(), max_size=2))
    def declare(self, models: dict[str, bool]) -> None:
        self.do("declare", models)

    @rule(kindly=st.booleans())
    def restart(self, kindly: bool) -> None:
        self.do("restart", kindly=kindly)

    @rule(nth=NTH, name=NAME)
    def die_filling(self, nth: int, name: str) -> None:
        self.do("die_at", nth, "warm", name, pin=False)

    @rule(nth=NTH, pick=PICK, what=st.sampled_from(["remove", "verify"]))
    def die_changing(self, nth: int, pick: int, what: str) -> None:
        key = self.walker.chosen(pick)
        if key is not None:
            self.do("die_at", nth % 40 + 1, what, key)

    @rule(nth=st.integers(1, 8), pick=PICK, what=st.sampled_from(["pin", "lease", "release"]))
    def die_holding(self, nth: int, pick: int, what: str) -> None:
        key = self.walker.chosen(pick)
        if key is not None:
            more = {"pin": ((key,), {"pinned": bool(pick % 2)}), "lease": ((key, 600.0), {}), "release": ((pick,), {})}[what]
            self.do("die_at", nth, what, *more[0], **more[1])

    @invariant()
    def holds(self) -> None:
        with self.watched(), self.walker.step("look around"):
            check(self.walker)
        self.walker.trail.pop()

    def teardown(self) -> None:
        try:
            if self.sound:
                with self.watched(), self.walker.step("put all right"):
                    finish(self.walker)
        finally:
            words = [] if self.sound else ["the daemon's last words:", self.ground.daemon.last_words()]
            print("\n".join(["the way:", *self.walker.trail, *words]))
            self.walker.unmap_all()
            self.ground.__exit__()


def walk(seed: int, walks: int, steps: int) -> None:
    """So many walks of so many steps at most. Nothing is tried again in a shorter form: a walk is no function of its steps alone."""
    seen: list[BaseException] = []

    class Ours(Walk):
        failures = seen

    try:
        run_state_machine_as_test(
            hypothesis.seed(seed)(Ours),
            settings=settings(
                max_examples=walks,
                stateful_step_count=steps,
                phases=[Phase.generate],
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Flaky as flaky:
        raise seen[0] from flaky


@pytest.mark.slow
def test_a_walk() -> None:
    if not MINUTES:
        walk(int(os.environ.get("WALK_SEED", "7")), walks=4, steps=40)
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        seed = random.SystemRandom().randrange(2**32)
        print(f"WALK_SEED={seed}", flush=True)
        walk(seed, walks=3, steps=100)
