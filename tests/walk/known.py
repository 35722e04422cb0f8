"""What is known of a node by somebody who walks on it: what was acknowledged, what was damaged, and what follows from both. It does nothing.

What the daemon has acknowledged must outlive a kill. What was damaged is forgiven until somebody had the daemon look; from then on it is not shown.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass
from typing import Any

from nvcache.client.transport import Problem
from tests.walk.disk import Disk, Stamp
from tests.walk.ground import LIMIT, MB, Ground, until

Key = tuple[str, str]  # name and commit
NO_ROOM = {"full", "too-large", "disk-full"}
ENDED = ("done", "failed", "cancelled")


@dataclass
class Lease:
    """A hold that was granted: it is there for certain until `until` (unix seconds)."""

    key: Key
    ttl: float
    until: float
    kept: bool = True  # it is on the disk as it is, and survives the daemon


@dataclass
class Mapped:
    """A file that a pod has mapped: what it held then, and until when that is known."""

    map: mmap.mmap
    fd: int
    stamp: Stamp
    due: bytes


class Known:
    """The knowledge of one walk over a ground, and how to ask the daemon."""

    def __init__(self, ground: Ground) -> None:
        self.on = ground
        self.disk = Disk(ground.store, ground.truth)
        self.ready: dict[Key, bool] = {}  # models that were seen ready → pinned
        self.leases: dict[str, Lease] = {}
        self.released: set[str] = set()
        self.declared: dict[str, bool] = {}  # name → pinned
        self.going: Key | None = None  # its removal was asked for and not answered, though nothing forbade it
        self.hurt: set[str] = set()  # SHA-256 of what was damaged and not seen mended
        self.apart: set[str] = set()  # SHA-256 of what was unlinked: views may still show that file, right as it is, when the blob was made anew
        self.withdrawn: set[Key] = set()  # models that had such files, and were not seen whole since
        self.rot: set[Stamp] = set()  # wrong bytes that nobody had the daemon look at
        self.cut: set[tuple[Key, str]] = set()  # files taken out of a view
        self.mapped: list[Mapped] = []
        self.down = False
        self.target: Key | None = None  # what the call under way may have changed
        self.planned: set[Key] = set()  # what was begun when the daemon died last
        self.trail: list[str] = []

    def chosen(self, pick: int) -> Key | None:
        """One of the models that are known."""
        keys = sorted(self.ready)
        return keys[pick % len(keys)] if keys else None

    def is_hurt(self, key: Key) -> bool:
        """Whether it has files that were damaged, or had them and may not be back yet."""
        return key in self.withdrawn or not self.hurt.isdisjoint(self.disk.expected(*key).values())

    def sharers(self, key: Key) -> list[Key]:
        """The other models that have a file of it."""
        own = set(self.disk.expected(*key).values())
        return sorted(other for other in self.ready if other != key and own & set(self.disk.expected(*other).values()))

    def held(self, key: Key) -> bool:
        """Whether it must not go, for certain."""
        return self.ready.get(key, False) or self.leased(key) or self.declared_as(key) is not None

    def leased(self, key: Key) -> bool:
        """Whether a lease on it lives for certain."""
        return any(lease.key == key and lease.until > time.time() for lease in self.leases.values())

    def declared_as(self, key: Key) -> bool | None:
        """Whether a declaration pins it, None when it is not the one that is declared, or it is not known which revision is."""
        alone = sum(name == key[0] for name, _ in self.ready) == 1
        return self.declared.get(key[0]) if alone else None

    def may_be_held(self, key: Key) -> bool:
        """Whether it may be refused to remove it."""
        return self.held(key) or key[0] in self.declared or any(lease.key == key for lease in self.leases.values())

    def surely_fits(self, key: Key) -> bool:
        """Whether nothing can be in the way of fetching it but what others hold and what is under way, and that leaves room."""
        if self.hurt or self.withdrawn or self.apart or self.mapped or self.on.foreign.exists():
            return False
        wanted = {key} | {other for other in self.ready if self.may_be_held(other)}
        sizes = {sha: len(self.on.truth[each][path]) for each in wanted for path, sha in self.disk.expected(*each).items()}
        named = {sha for each in self.ready for sha in self.disk.expected(*each).values()}
        fresh = sum(path.stat().st_size for path in self.on.store.glob("blobs/sha256/*/*") if path.name not in named)
        return sum(sizes.values()) + fresh + MB <= LIMIT and not self.disk.entries("ingest/plans")

    def no_room(self, problem: Problem) -> bool:
        """Whether the disk is full, as it may be."""
        return problem.code in NO_ROOM and self.on.foreign.exists()

    # -- asking

    def saw(self, model: dict[str, Any], *, pin: bool = False) -> None:
        """It is ready, so the daemon answers for it."""
        key = key_of(model["entry"])
        if model["state"] == "ready":
            self.ready[key] = self.ready.get(key, False) or pin
        elif pin and key in self.ready:  # withdrawn in the same moment: its pin may have been first
            self.ready[key] = self.disk.pinned(*key)

    def end_of(self, job: str) -> dict[str, Any]:
        """The job when it is over."""
        last: dict[str, Any] = {}

        def over() -> bool:
            last.update(self.on.ask("GET", f"/v1/jobs/{job}"))
            return last["state"] in ENDED

        until(over, f"job {job} ends")
        return last

    def forget(self, key: Key) -> None:
        """It is gone, and what held it."""
        self.ready.pop(key, None)
        self.leases = {name: lease for name, lease in self.leases.items() if lease.key != key}
        self.cut = {(one, path) for one, path in self.cut if one != key}
        self.withdrawn.discard(key)

    def told(self) -> dict[Key, dict[str, Any]]:
        """Every model that the daemon tells of."""
        return {key_of(model["entry"]): model for model in self.on.ask("GET", "/v1/models")["models"]}

    def state_of(self, key: Key) -> dict[str, Any]:
        """The model as it is told now."""
        return self.on.ask("GET", f"/v1/models/{entry(key)}")


def entry(key: Key) -> str:
    """The name in the API."""
    return f"hf--acme--{key[0]}@{key[1]}"


def key_of(name: str) -> Key:
    """The reverse."""
    slug, _, commit = name.partition("@")
    return slug.removeprefix("hf--acme--"), commit
