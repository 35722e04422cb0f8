"""Decides which models go to make room: least recently used first, whole models, and none that somebody holds. It removes nothing and asks no clock.

A blob that several models have is freed with the last of them; one that a running fill counts on is freed by nobody. Models whose files a process has
open go last: an unlinked file stays whole for who has it, but its bytes are not free before it is closed. Where it is the disk that is short they are
held: their going would give it nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

LEASED = "leased"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model as eviction sees it. `blobs` are its bytes by SHA-256, `last_used` unix seconds.

    `held` says in words why it must stay ("pinned", `LEASED`); empty when it may go. `in_use`: a process has files of it open. `holders` have leases.
    """

    entry: str
    blobs: Mapping[str, int]
    last_used: float
    held: tuple[str, ...] = ()
    in_use: bool = False
    holders: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """`held` with the names of the holders, which are the operator's to know: of a pod they tell the namespace and the name."""
        leased = [f"{LEASED} by {holder}" for holder in self.holders]
        return tuple(words for why in self.held for words in (leased if why == LEASED else [why]))

    @property
    def size(self) -> int:
        """Bytes of its blobs, each counted once."""
        return sum(self.blobs.values())


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that goes. `frees` are the bytes that its going frees after those that go before it."""

    entry: str
    last_used: float
    frees: int
    in_use: bool = False


@dataclass(frozen=True, slots=True)
class Eviction:
    """What goes, in this order, and what stays although it takes room. `freed` may be less than `need`: then it is no use to begin."""

    need: int
    victims: tuple[Victim, ...]
    in_the_way: tuple[Candidate, ...]

    @property
    def freed(self) -> int:
        """Bytes that all of it frees."""
        return sum(victim.frees for victim in self.victims)

    @property
    def enough(self) -> bool:
        """Whether that is what was asked for."""
        return self.freed >= self.need


def plan_eviction(need: int, candidates: Iterable[Candidate], wanted: Collection[str] = ()) -> Eviction:
    """The models that go so that `need` bytes are free, if there are enough of them; `wanted` are blobs that running fills count on.

    Who could stay after all, because others free enough, stays: the one used last first.
    """
    every = list(candidates)
    going = _Going(every, wanted)
    chosen: list[Candidate] = []
    for candidate in sorted((each for each in every if not each.held), key=lambda each: (each.in_use, each.last_used, each.entry)):
        if going.freed >= need:
            break
        going.take(candidate)
        chosen.append(candidate)
    goal = min(need, going.freed)
    for candidate in reversed(chosen[:]):
        if going.freed - going.frees(candidate) >= goal:
            going.give_back(candidate)
            chosen.remove(candidate)
    held = sorted((each for each in every if each.held), key=lambda each: (-each.size, each.entry))
    return Eviction(max(0, need), tuple(_victims(chosen, _Going(every, wanted))), tuple(held))


def _victims(chosen: Iterable[Candidate], going: _Going) -> Iterator[Victim]:
    for candidate in chosen:
        before = going.freed
        going.take(candidate)
        yield Victim(candidate.entry, candidate.last_used, going.freed - before, candidate.in_use)


class _Going:
    """How many bytes are free when some models are gone: those of the blobs that nobody has who is still there."""

    def __init__(self, every: Iterable[Candidate], wanted: Collection[str]) -> None:
        self.freed = 0
        self._left = Counter(sha256 for candidate in every for sha256 in candidate.blobs)
        self._wanted = frozenset(wanted)

    def take(self, candidate: Candidate) -> None:
        """It goes."""
        self._left.subtract(candidate.blobs.keys())
        self.freed += self.frees(candidate)

    def frees(self, candidate: Candidate) -> int:
        """What is free only because this one, which goes, does."""
        return sum(size for sha256, size in candidate.blobs.items() if self._left[sha256] == 0 and sha256 not in self._wanted)

    def give_back(self, candidate: Candidate) -> None:
        """It stays after all."""
        self.freed -= self.frees(candidate)
        self._left.update(candidate.blobs.keys())


@dataclass(frozen=True, slots=True)
class Marks:
    """Watermarks, as parts of what the store can hold: above `high` models are evicted until no more than `low` is used."""

    high: float = 0.95
    low: float = 0.90


def excess(capacity: int, used: int, reserved: int, marks: Marks) -> int:
    """The bytes to free now so that the store keeps to its marks; 0 while it does. All in bytes; `capacity` as `core.space.Room` has it.

    What was promised to fills counts as used: it will be. Others who fill the disk make the capacity smaller, so that `min_free` is kept as well.
    """
    full = used + reserved
    return full - int(capacity * marks.low) if full > int(capacity * marks.high) else 0
