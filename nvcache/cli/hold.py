"""`nvcache hold`: keeps leases while a pod lives, as its sidecar. It makes no model ready, and it does not end before it is told to.

Whatever happens to the daemon, the disks or the model, it says so and goes on trying: a sidecar that ends would take its pod out of service, whose
engine may need none of them any more.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from nvcache.cli import complete, output
from nvcache.cli.daemon import Daemon, connected, daemon
from nvcache.cli.exits import Exit
from nvcache.client import Lease, Problem
from nvcache.core.ref import parse_name, shown
from nvcache.errors import Code, NvcacheError

TOLD = (signal.SIGTERM, signal.SIGINT)
RELEASE_SECONDS = 0.9  # for letting go at the end; a daemon that is slower lets the leases run out
LOOK_SECONDS = 1.0  # between two looks whether the thread is there still
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between tries while something is in the way
REMIND_SECONDS = 600.0  # between two lines about the same obstacle
TTL = (1, 86400)  # seconds, the daemon's bounds
GONE = (404, 409)  # statuses of a renewal: neither the lease nor what it held is there


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...", shell_complete=complete.refs)
@click.option(
    "--ttl",
    type=output.Seconds(between=TTL),
    metavar="SECONDS",
    help="how long the leases outlive a pod that dies; renewed every third of it  [default: the daemon's]",
)
@connected
def hold(refs: tuple[str, ...], *, ttl: float | None) -> int:
    """Hold models until SIGTERM.

    For a pod's sidecar: takes over the leases that `warm --lease` left under the same holder (NVCACHE_HOLDER, else POD_NAMESPACE/POD_NAME), or takes
    them as soon as the models are ready, renews them, and releases them at the end, within a second. It fetches nothing. While the daemon is away or
    a model is not ready it says why and waits: it ends with 0 on a signal, and in no other way once its options are right.
    """
    holder = Holder([Held(daemon(), ref, ttl) for ref in refs])
    with _blocked():  # before the thread begins, which inherits it
        thread = threading.Thread(target=holder.run, name="nvcache-hold", daemon=True)
        thread.start()
        while (told := signal.sigtimedwait(TOLD, LOOK_SECONDS)) is None and thread.is_alive():
            pass
        holder.stop()
        thread.join(RELEASE_SECONDS)
    if thread.is_alive():
        output.say("the daemon does not answer: the leases are not released, they run out by themselves")
    return Exit.INTERNAL if told is None else Exit.OK  # a defect, whose trace was shown: a sidecar that is started again holds better than a dead one


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait until they are asked for: no handler runs in the midst of something, and the first process of a container gets them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Holder:
    """Keeps several models held on one thread, until `stop`."""

    def __init__(self, models: Sequence[Held]) -> None:
        self._models = models
        self._ended = threading.Event()

    def run(self) -> None:
        """Take, renew, and at the end release."""
        while not self._ended.is_set():
            due = min(model.step() for model in self._models)
            self._ended.wait(max(0.0, due - time.monotonic()))
        for model in self._models:
            model.release()

    def stop(self) -> None:
        """Let `run` come to its end."""
        self._ended.set()


class Held:
    """One model: its lease, when something is to be done about it, and what was last said of it."""

    def __init__(self, asked: Daemon, ref: str, ttl: float | None, say: Callable[[str], None] = output.say) -> None:
        self._asked, self._ref, self._ttl, self._say = asked, ref, ttl, say
        self._lease: Lease | None = None
        self._due = 0.0
        self._pause = FIRST_PAUSE
        self._told, self._told_at = "", float("-inf")

    def step(self) -> float:
        """Do what is due; returns when the next thing is, by the monotonic clock. Raises nothing that can be expected."""
        if time.monotonic() >= self._due:
            try:
                wait = self._keep()
                self._pause = FIRST_PAUSE
            except (Problem, NvcacheError) as error:
                self._tell(error.code, f"cannot hold {shown(self._ref)} just now: {error}")
                wait, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
            self._due = time.monotonic() + wait
        return self._due

    def release(self) -> None:
        """Let go, if there is something to let go of."""
        if self._lease is not None:
            try:
                self._lease.release()
                self._say(f"released {shown(self._ref)}")
            except Problem as problem:
                self._say(f"cannot release {shown(self._ref)}, its lease runs out by itself: {problem}")

    def _keep(self) -> float:
        """Hold the model, for the first time or for longer; returns when to do so again, in seconds."""
        name = parse_name(self._ref)
        if self._lease is not None:
            try:
                self._lease.renew()
            except Problem as problem:
                if problem.status not in GONE:  # nobody answered, or not now: the lease is still there
                    raise
                self._lease = None
        if self._lease is None:
            entry = str(self._asked.model(self._ref)["entry"])
            self._lease = (self._left(entry.rpartition("@")[0]) if name.revision is None else None) or self._taken(entry)
        state = str(self._asked.model(self._lease.entry)["state"])
        said = f"holding {shown(self._ref)} as {self._lease.holder}: {self._lease.path}"
        self._tell(state, said if state == "ready" else f"{said}; it is {state}: what is open stays so, the daemon brings it back")
        return self._lease.renew_in

    def _left(self, slug: str) -> Lease | None:
        """The lease that an earlier container of the pod left, of the revision that it was given, whatever the name means by now."""
        try:
            return self._taken(slug)
        except Problem as problem:
            if problem.code != Code.UNKNOWN_LEASE:
                raise
            return None

    def _taken(self, entry: str) -> Lease:
        lease = self._asked.lease(entry, ttl=self._ttl)
        lease.take()
        return lease

    def _tell(self, what: str, text: str) -> None:
        """One line when things change, and now and then while there is an obstacle."""
        now = time.monotonic()
        if what != self._told or (what != "ready" and now - self._told_at >= REMIND_SECONDS):
            self._told, self._told_at = what, now
            self._say(text)
