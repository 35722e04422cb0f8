"""Somebody who does to a node what people, pods and disks do, and knows what must be so afterwards. What it does next is not its choice."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nvcache.client.transport import Problem
from tests.walk.disk import stamp
from tests.walk.ground import LIMIT, MB, until
from tests.walk.harm import Harm
from tests.walk.known import NO_ROOM, Key, Lease, Mapped, entry, key_of

GRACE = 120.0  # seconds a lease lives at least after a restart


class Walker(Harm):
    """One walk over a ground."""

    # -- what pods and people do

    def warm(self, name: str, *, pin: bool) -> str:
        """Ask for main of a model and wait for the end."""
        key = self.target = name, self.on.repo(name).commit
        fits = self.surely_fits(key)
        answer = self.on.ask("POST", "/v1/models", {"ref": f"acme/{name}", "pin": pin})
        if "job" not in answer or answer.get("state"):
            assert answer["state"] == "ready" or self.hurt, answer
            self.saw(answer, pin=pin)
            return "hit"
        job = answer["job"]["id"]
        if self.down:
            self.on.ask("DELETE", f"/v1/jobs/{job}")
            return f"cancelled, {self.end_of(job)['state']}"
        ended = self.end_of(job)
        if ended["state"] == "done":
            found = self.on.ask("GET", f"/v1/models/{ended['entry']}")
            assert found["state"] == "ready" or self.is_hurt(key), found
            self.saw(found, pin=pin)
            return "filled"
        code = ended["error"]["code"]
        assert code in NO_ROOM, ended
        assert not fits, ended
        return str(code)

    def pin(self, key: Key, *, pinned: bool) -> str:
        """Pin it or let it be."""
        self.target = key
        answer = self.on.tried("PUT" if pinned else "DELETE", f"/v1/models/{entry(key)}/pin")
        if isinstance(answer, Problem):
            by_declaration = answer.code == "pinned" and not pinned and self.declared.get(key[0])
            assert by_declaration or self.no_room(answer), answer
            return answer.code
        self.ready[key] = pinned
        return "pinned" if pinned else "unpinned"

    def lease(self, key: Key, ttl: float) -> str:
        """Hold it."""
        self.target, before = key, time.time()
        lease = self.on.tried("POST", f"/v1/models/{entry(key)}/leases", {"holder": "a pod", "ttl_s": ttl})
        if isinstance(lease, Problem):
            assert (lease.code == "not-ready" and self.is_hurt(key)) or self.no_room(lease), lease
            return lease.code
        self.leases[lease["lease"]] = Lease(key, ttl, before + ttl, self.kept(lease["lease"], before + ttl))
        return "leased"

    def renew(self, pick: int) -> str:
        """Hold on to something for longer."""
        if not self.leases:
            return "none"
        lease = sorted(self.leases)[pick % len(self.leases)]
        held, before = self.leases[lease], time.time()
        self.target = held.key
        answer = self.on.tried("PUT", f"/v1/models/{entry(held.key)}/leases/{lease}")
        if isinstance(answer, Problem):
            assert (answer.code == "unknown-lease" and held.until <= time.time()) or self.no_room(answer), answer
            return answer.code
        held.until = before + held.ttl
        held.kept = self.kept(lease, held.until)
        return "renewed"

    def kept(self, lease: str, until: float) -> bool:
        """Whether what was granted until then is on the disk; only on a full one it may not be."""
        kept = self.disk.has_lease(lease, until)
        assert kept or self.on.foreign.exists(), f"the lease {lease} is not written"
        return kept

    def release(self, pick: int) -> str:
        """Let go of something, or break it: for an operator that is one call."""
        if not self.leases:
            return "none"
        lease = sorted(self.leases)[pick % len(self.leases)]
        held = self.leases[lease]
        self.target = held.key
        answer = self.on.tried("DELETE", f"/v1/models/{entry(held.key)}/leases/{lease}")
        if isinstance(answer, Problem):
            assert answer.code == "unknown-lease", answer
            assert held.until <= time.time(), answer
            return "it had run out"
        del self.leases[lease]
        self.released.add(lease)
        return "released"

    def expire(self) -> str:
        """Wait until the next short lease has run out."""
        soon = min((lease.until for lease in self.leases.values() if lease.until < time.time() + 2), default=None)
        if soon is None:
            return "none"
        until(lambda: time.time() > soon, "a lease runs out")
        return "ran out"

    def remove(self, key: Key) -> str:
        """Take it away, if nobody holds it."""
        self.target = key
        self.going = None if self.ready[key] or self.leased(key) or self.declared_as(key) else key
        answer = self.on.tried("DELETE", f"/v1/models/{entry(key)}")
        self.going = None
        if isinstance(answer, Problem):
            by_kernel = answer.code == "in-use" and self.mapped
            assert by_kernel or (answer.code in ("leased", "pinned") and self.may_be_held(key)), answer
            assert answer.status == 409
            assert answer.code != "leased" or answer.document["holders"], answer.document
            return answer.code
        assert not self.ready[key], "what is pinned was removed"
        assert not self.leased(key), "what is leased was removed"
        assert not self.declared_as(key), "what is declared with a pin was removed"
        self.forget(key)
        return "removed"

    def evict(self, need: int, *, dry_run: bool) -> str:
        """Have room made."""
        self.target = None
        answer = self.on.tried("POST", "/v1/evict", {"need_bytes": need, "dry_run": dry_run})
        if isinstance(answer, Problem):
            assert answer.code in NO_ROOM, answer
            assert not dry_run, answer
            return answer.code
        victims = [key_of(each["entry"]) for each in answer["victims"]]
        if dry_run:
            return f"would evict {len(victims)}"
        for key in victims:
            assert not self.held(key), f"{key} is held and was evicted"
            self.forget(key)
        return f"evicted {len(victims)}"

    def map(self, key: Key, pick: int) -> str:
        """A pod maps a file, without a lease."""
        path, data = sorted(self.on.truth[key].items())[pick % len(self.on.truth[key])]
        file = self.on.store / "models" / f"hf--acme--{key[0]}" / key[1] / path
        if len(self.mapped) >= 3 or self.is_hurt(key) or not file.exists():
            return "none"
        fd = os.open(file, os.O_RDONLY)
        facts = os.fstat(fd)
        self.mapped.append(Mapped(mmap.mmap(fd, 0, access=mmap.ACCESS_READ), fd, stamp(facts), data))
        return path

    def unmap(self) -> str:
        """The pod reads what it mapped, wherever the model is by now, and ends."""
        if not self.mapped:
            return "none"
        one = self.mapped.pop(0)
        try:
            if stamp(os.fstat(one.fd)) == one.stamp:
                assert one.map[:] == one.due, "a mapped file changed"
        finally:
            one.map.close()
            os.close(one.fd)
        return "read"

    def unmap_all(self) -> None:
        """All pods end."""
        while self.mapped:
            one = self.mapped.pop()
            one.map.close()
            os.close(one.fd)

    # -- the world

    def source(self, *, down: bool) -> str:
        """The Hub fails, or is there again."""
        self.on.down(really=down)
        self.down = down
        return "down" if down else "up"

    def push(self, name: str, *, forget: bool) -> str:
        """Main moves on, and where `forget` the Hub has nothing else any more."""
        self.on.push(name)
        if forget:
            self.on.forget_old(name)
        return self.on.repo(name).commit[:7]

    def fill_up(self, megabytes: int | None) -> None:
        """Somebody else takes the disk but for so much, or gives all of it back."""
        self.on.tidy()
        if megabytes is not None:
            self.on.fill_up(megabytes * MB)

    # -- the node

    def declare(self, models: dict[str, bool]) -> None:
        """Other models are declared from now on; name → pinned."""
        tables = [f'[[models]]\nref = "acme/{name}"\npin = {str(pinned).lower()}\n' for name, pinned in models.items()]
        self.on.config.write_text("\n".join(tables))
        self.declared = {name: pinned and self.declared.get(name, True) for name, pinned in models.items()}
        self.on.hup()
        self.declared = dict(models)

    def restart(self, *, kindly: bool) -> str:
        """Stop it in order, or not; then begin again. What was acknowledged is there."""
        before = {key for key in self.ready if not self.is_hurt(key)}
        filled = self.disk.used() > 0.9 * LIMIT
        if kindly:
            assert self.on.daemon.stop() == 0, self.on.daemon.last_words()
        self.begin_anew()
        if not filled:
            assert before <= self.told().keys(), f"lost: {before - self.told().keys()}"
        return "again"

    def begin_anew(self) -> None:
        """Look at what is left, start, and see that it is what was."""
        live = {name for name, lease in self.leases.items() if lease.kept and lease.until > time.time() + 5}
        self.on.die()
        self.planned = set(self.disk.entries("ingest/plans"))
        self.check_the_dead()
        before = time.time()
        self.on.start()
        told = {lease["lease"]: lease for lease in self.on.ask("GET", "/v1/leases")["leases"]}
        for name in live:
            key = self.leases[name].key
            assert name in told or key == self.target, f"the lease {name} on {key} is lost"
        assert not self.released & told.keys(), "what was released is held again"
        for name, lease in told.items():
            mine = self.leases.setdefault(name, Lease(key_of(lease["entry"]), GRACE, 0))
            mine.until = max(min(mine.until, before + mine.ttl) if mine.kept else 0, before + GRACE)
        self.leases = {name: lease for name, lease in self.leases.items() if name in told}
        if self.target in self.ready:
            self.ready[self.target] = self.disk.pinned(*self.target)

    def die_at(self, nth: int, what: str, *arguments: object, **named: object) -> str:
        """Do it, and be killed at the `nth` change of the disk from now on, if it comes to so many."""
        self.on.faults.kill(f"{self.on.store}/*", self.on.pid, nth=nth)
        try:
            done = str(getattr(self, what)(*arguments, **named))
        except Problem as problem:
            if problem.code != "daemon-unreachable":
                raise
            done = "died"
        finally:
            self.on.faults.lift()
        if not self.on.died():
            return f"lived: {done}"
        last = self.on.faults.calls()[nth - 1]
        self.begin_anew()
        return f"{done}, at {last.name} {last.path.removeprefix(str(self.on.store))}"

    def check_the_dead(self) -> None:
        """What pods see on the disk while nobody serves it: whole and right, or not there."""
        for view, name, commit in self.disk.views():
            self._check_view(view, (name, commit))
        assert not self.disk.dangling()
        for key in self.disk.entries("manifests"):
            for sha256 in self.disk.expected(*key).values():
                assert sha256 in self.hurt or self.disk.blob(sha256).exists(), f"{key} has a manifest, and not all of its blobs"

    def _check_view(self, view: Path, key: Key) -> None:
        for path, sha256, found in self.disk.wrong(view, *key):
            forgiven = (key, path) in self.cut if found is None else found in self.rot
            assert forgiven, f"{view} shows {'nothing' if found is None else 'wrong bytes'} as {path} ({sha256})"

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[object], None]]:
        """Keeps the trail, for whoever has to understand it."""
        began = time.monotonic()
        said: list[str] = []
        try:
            yield lambda text: said.append(str(text))
        except Problem as problem:
            said.append(str(problem))
            if problem.code != "unknown-model" or self.target is None or self.held(self.target):
                raise
            self.forget(self.target)  # what goes on by itself took its room
        except BaseException as error:
            said.append(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.trail.append(f"{what}: {' '.join(said)} ({time.monotonic() - began:.1f} s)")
