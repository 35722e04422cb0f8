"""What is so at every moment of a walk at which nothing is under way. It changes nothing."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

from tests.walk.disk import CHUNK, SECTOR
from tests.walk.ground import LIMIT, until
from tests.walk.known import ENDED, Key, entry
from tests.walk.walker import Walker

Told = dict[Key, dict[str, Any]]


def check(walker: Walker) -> None:
    """Raises AssertionError for what must not be. What something else changed while it was looked at is looked at again."""
    good = False

    def looked() -> bool:
        nonlocal good
        before = moment(walker)
        if any(state not in ENDED for _, state in before[0]):
            return walker.down  # without a source there is no end to wait for
        try:
            everything(walker)
        except AssertionError:
            if moment(walker) == before:
                raise
            return False
        good = True
        return True

    news = walker.on.news()
    assert "Traceback" not in news, news
    until(looked, "everything is quiet")
    assert good or walker.down


def moment(walker: Walker) -> tuple[frozenset[tuple[str, str]], frozenset[tuple[Key, str]]]:
    """Jobs and models with their states: the same before and after is as good as nothing having happened."""
    jobs = frozenset((job["id"], job["state"]) for job in walker.on.ask("GET", "/v1/jobs")["jobs"])
    return jobs, frozenset((key, model["state"]) for key, model in walker.told().items())


def everything(walker: Walker) -> None:
    """All of it, once."""
    told = walker.told()
    held_are_there(walker, told)
    shown_is_true(walker, told)
    links_agree(walker, told)
    nothing_is_left_behind(walker)
    leases_agree(walker)
    space_is_right(walker)


def held_are_there(walker: Walker, told: Told) -> None:
    """No model that is leased, pinned or declared is lost, and one that nobody damaged is served."""
    for key, pinned in list(walker.ready.items()):
        model = told.get(key)
        if model is None:
            assert key == walker.going or not walker.held(key), f"{key} is held and gone"
            walker.forget(key)
            continue
        assert model["state"] == "ready" or walker.is_hurt(key), f"{key} is not served: {model}"
        assert model["pinned"] == pinned or walker.declared.get(key[0]), f"{key}: {model}"
    for key, model in told.items():
        assert (model["path"] is not None) == (model["state"] == "ready"), model
        if model["state"] == "ready":
            walker.ready.setdefault(key, walker.disk.pinned(*key))
    walker.going = None


def shown_is_true(walker: Walker, told: Told) -> None:
    """No wrong byte is shown, no file is missing, and no view is of a model that is not served."""
    for view, name, commit in walker.disk.views():
        key = name, commit
        assert key in told, f"{view} is of no model"
        assert told[key]["state"] == "ready", f"{view} is shown, and the model is {told[key]['state']}"
        for path, sha256, found in walker.disk.wrong(view, name, commit):
            forgiven = (key, path) in walker.cut if found is None else found in walker.rot
            assert forgiven, f"{view} shows {'nothing' if found is None else 'wrong bytes'} as {path} ({sha256})"
    shown = Counter((name, commit) for _, name, commit in walker.disk.views())
    for key, model in told.items():
        assert model["state"] != "ready" or shown[key] == 2, f"{key} is ready and has {shown[key]} views"
    assert not walker.disk.dangling()


def links_agree(walker: Walker, told: Told) -> None:
    """Each blob has as many links as views show it, and its own name.

    A view may still have a damaged file, where nobody had the daemon look, while a fill of another model has already made the blob anew; or one that
    is right, and was unlinked.
    """
    due: Counter[str] = Counter()
    for key, model in told.items():
        if model["state"] == "ready":
            due.update(2 * list(walker.disk.expected(*key).values()))
    for view, name, commit in walker.disk.views():
        due.subtract(sha256 for _, sha256, _ in walker.disk.wrong(view, name, commit))
    there = walker.disk.links()
    walker.apart &= there.keys() | walker.hurt
    for sha256, (links, names) in there.items():
        if sha256 in walker.apart and sha256 not in walker.hurt and names < due[sha256]:
            assert links == 1 + names, f"blob {sha256}: {links} links, {names} names in views"
        elif sha256 not in walker.hurt:
            walker.apart.discard(sha256)
            assert links == 1 + names == 1 + due[sha256], f"blob {sha256}: {links} links, {names} names in views, {due[sha256]} due"


def nothing_is_left_behind(walker: Walker) -> None:
    """No blob without a user is older than it may be, and nothing is half-made while nobody makes anything."""
    orphans, halves = walker.disk.orphans(walker.on.started), walker.disk.halves()
    assert not orphans, orphans
    assert not halves, halves


def leases_agree(walker: Walker) -> None:
    """What was granted is told, and what was released is not."""
    told = {lease["lease"] for lease in walker.on.ask("GET", "/v1/leases")["leases"]}
    for name, lease in walker.leases.items():
        assert name in told or lease.until <= time.time(), f"the lease on {lease.key} is lost"
    assert not told & walker.released


def space_is_right(walker: Walker) -> None:
    """The daemon's sum is the disk's within a chunk, and the file system's; and within the limit."""
    walker.on.ask("POST", "/v1/evict", {"need_bytes": 1, "dry_run": True})  # it measures
    space, used = walker.on.ask("GET", "/v1/space"), walker.disk.used()
    assert abs(space["used"] - used) <= CHUNK, (space, used)
    assert space["used"] + space["reserved"] <= LIMIT, space
    assert space["reserved"] == 0, space
    if walker.hurt or walker.withdrawn or walker.apart:
        return  # what was unlinked by others is nobody's
    apart = sum(facts.st_blocks * SECTOR for facts in open_elsewhere(walker))
    until(lambda: abs(walker.on.taken() - walker.on.empty - apart - used) <= CHUNK, f"the file system has given away {used + apart}")


def open_elsewhere(walker: Walker) -> list[os.stat_result]:
    """The foreign file, and what is only there because somebody has it mapped."""
    mapped = {facts.st_ino: facts for facts in (os.fstat(one.fd) for one in walker.mapped) if facts.st_nlink == 0}
    return [*mapped.values(), *([walker.on.foreign.stat()] if walker.on.foreign.exists() else [])]


def finish(walker: Walker) -> None:
    """Everything is put right: what can be mended is, without anybody asking; and when all models are removed, nothing is left."""
    walker.on.down(really=False)
    walker.down = False
    walker.on.tidy()
    while walker.mapped:
        walker.unmap()
    walker.declare({})
    walker.restart(kindly=True)
    check(walker)
    for key in sorted(walker.ready):
        if walker.is_hurt(key):
            walker.verify(key)
    check(walker)
    for lease in walker.on.ask("GET", "/v1/leases")["leases"]:
        walker.on.ask("DELETE", f"/v1/models/{lease['entry']}/leases/{lease['lease']}")
    assert not walker.on.ask("GET", "/v1/leases")["leases"]
    for key in sorted(walker.told()):
        if walker.ready.get(key):
            walker.on.ask("DELETE", f"/v1/models/{entry(key)}/pin")
        walker.on.ask("DELETE", f"/v1/models/{entry(key)}")
        walker.forget(key)
    walker.hurt.clear()
    check(walker)
    assert not walker.told()
    assert not walker.disk.links()
    assert walker.disk.used() == 0, sorted(walker.on.store.glob("ingest/**/*"))
