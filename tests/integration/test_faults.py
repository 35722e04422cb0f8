"""Every write the daemon makes fails once, and a disk that is full or broken from there on: told kindly, nothing wrong is served, nothing is lost.

`tests.support.faultfs` makes the calls fail in a real daemon and its worker. A first, clean run tells which calls there are; then one after another
fails, with ENOSPC and EIO. By default one of each sort, so that it fits into a minute; with FAULTS=all every single one.
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import pytest

from nvcache.client import Client, Problem
from tests.engine.conftest import weights
from tests.support.daemon import DaemonProcess
from tests.support.faultfs import Call, FaultFs, Kind
from tests.support.hub import HubServer
from tests.support.repo import Repo

SECONDS = 30  # what nothing may exceed: it is there to end a test that hangs
EVERY = os.environ.get("FAULTS") == "all"
SHARED = weights(1, 300_000)
LETTING_GO = {"unlink", "rmdir", "fchmod", "chmod", "utime"}
T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """Which call fails, and how."""

    nth: int
    error: int
    times: int | None  # None: that one and all that follow
    call: str  # which call that was in the clean run

    @property
    def kinds(self) -> Kind:
        """A full disk still lets go of what it has."""
        return Kind.ROOM if self.error == errno.ENOSPC else Kind.CHANGES

    @property
    def litters(self) -> bool:
        """Whether something could not be removed."""
        return self.error == errno.EIO and (self.times is None or self.call.startswith(("unlink", "rmdir")))

    def __str__(self) -> str:
        return f"{errno.errorcode[self.error]} at call {self.nth} ({self.call}), {'once' if self.times else 'from there on'}"


class Node:
    """A daemon whose calls can be made to fail, the Hub it fetches from, and what is true of all models."""

    def __init__(self, place: Path, hub: HubServer, faults: FaultFs) -> None:
        self.hub, self.faults = hub, faults
        self.daemon = DaemonProcess(place, hub.url, workers=1, lanes=1, resolve_ttl=0)
        self.daemon.environment |= faults.environment
        self.below = f"{self.daemon.store}/*"
        self.truth: dict[str, dict[str, bytes]] = {}
        self.good = ""
        self._numbers = count(1)
        self._litter: set[str] = set()
        self._read = 0

    @property
    def client(self) -> Client:
        return Client(f"unix://{self.daemon.socket}")

    def new(self, size: int = 200_000) -> str:
        """A reference to a model of two shards, one of `size` bytes, and small files, on the Hub only; one file is every model's."""
        number = next(self._numbers)
        files = {
            "a.safetensors": weights(number, size, name=f"a{number}"),
            "b.safetensors": weights(number, 200_000, name=f"b{number}"),
            "shared.safetensors": SHARED,
            "config.json": b'{"number": %d}' % number,
            "sub/tokenizer.json": b"{}",
        }
        self.truth[f"acme/m{number}"] = files
        self.hub.repos[f"acme/m{number}"] = Repo(files)
        return f"acme/m{number}"

    def has(self) -> str:
        """A reference to a new small model that is ready."""
        ref = self.new()
        self.is_ready(ref)
        return ref

    def is_ready(self, ref: str) -> None:
        """Make it ready, and look that every byte is right."""
        self.client.ensure(ref, timeout=SECONDS)
        holds(lambda: self.state(ref) == "ready", lambda: f"{ref} is {self.state(ref)}")
        assert shown(Path(self.ask("GET", f"/v1/models?ref={ref}")["path"])) == self.truth[ref]

    def state(self, ref: str) -> str:
        """What the node says of it; `unknown` is one whose disk was not quick enough to be looked at."""
        return str(self.ask("GET", f"/v1/models?ref={ref}")["state"])

    def ask(self, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        """Any call of the API, patiently."""
        return self.client.request(method, path, body, timeout=SECONDS)

    def remove(self, ref: str) -> None:
        self.ask("DELETE", model_path(ref))

    def check(self) -> None:
        """Whatever view is shown is whole and right."""
        for ref, files in self.truth.items():
            slug = ref.replace("/", "--")
            for view in (*self.daemon.store.glob(f"models/hf--{slug}/*"), *self.daemon.store.glob(f"hub/models--{slug}/snapshots/*")):
                assert shown(view) == files, f"{view} is not whole"

    def is_tidy(self, fault: Fault | None = None) -> None:
        """Nothing is left of what failed: no promise, no half-made file, no descriptor. What is cleaned up behind an answer may take a moment.

        What the disk would not let go may lie about until the next start, which is given no `fault`.
        """
        if fault is None:
            self._litter = set()
        if fault is not None and fault.litters:
            self._litter = self._left()
        holds(lambda: self._left() <= self._litter, lambda: f"left behind: {sorted(self._left() - self._litter)}")

    def _left(self) -> set[str]:
        store = self.daemon.store
        reserved = self.ask("GET", "/v1/space")["reserved"]
        found = {f"{reserved} bytes promised"} if reserved else set()
        found |= {str(path.relative_to(store)) for path in store.glob("tmp/*") if path.name != "xet"}
        found |= {str(path.relative_to(store)) for path in store.glob("ingest/*") if path.name not in ("plans", "receipts")}
        found |= {
            str(path.relative_to(store)) for path in store.glob("ingest/plans/*")
        }  # a receipt without a plan is some bytes until the next start
        found |= {f"open: {path}" for pid in self._processes() for path in open_below(pid, store)}
        return found | {f"shown nowhere: {path.name}" for path in store.glob("blobs/sha256/*/*") if links(path) == 1}

    def spoke_kindly(self) -> None:
        """No defect was met since it was asked last: a failed disk is told in a line."""
        log = self.daemon.last_words(None)
        said, self._read = log[self._read :], len(log)
        assert "Traceback" not in said, said

    def endures(
        self,
        prepare: Callable[[], T],
        act: Callable[[T], object],
        settled: Callable[[T, Problem | None], None],
        *,
        damaged: bool = False,
        stride: int = 1,
    ) -> None:
        """Do `act` with what `prepare` made, once in peace and then with every fault; `settled` looks afterwards, with what it was refused with.

        Meanwhile and afterwards another model is ready, no view is wrong, nothing is left behind, and no defect was met. Views that are `damaged`
        on purpose cannot be taken away from a disk that fails; only a full one must still let them go. Unless all faults are wanted, each `stride`-th
        sort of call is enough.
        """
        subject = prepare()
        self.faults.watch(self.below)
        act(subject)
        self.faults.lift()
        faults = sweep(self.faults.calls(), self.daemon.store)[:: 1 if EVERY else stride]
        settled(subject, None)
        met = 0
        for fault in faults:
            try:
                subject = prepare()
                with self.faults.failing(self.below, fault.error, kinds=fault.kinds, nth=fault.nth, times=fault.times):
                    refused = problem(lambda subject=subject: act(subject))  # type: ignore[misc]
                    holds(lambda: self.state(self.good) == "ready", lambda: f"another model is {self.state(self.good)}")
                    failed = bool(self.faults.failed)
                met += failed
                if not damaged or fault.error == errno.ENOSPC:
                    self.check()
                if refused is not None:
                    assert failed, refused
                    assert refused.code in ({"disk-io"} if fault.error == errno.EIO else {"disk-full", "full"}), refused
                settled(subject, refused)
                self.check()
                self.is_tidy(fault)
                self.spoke_kindly()
            except BaseException as error:
                error.add_note(f"{fault}; the daemon said:\n{self.daemon.last_words(3000)}")
                raise
        assert met * 4 >= len(faults) * 3, "most calls come again in the same place"

    def _processes(self) -> Iterator[int]:
        assert self.daemon.process is not None
        pid = self.daemon.process.pid
        yield pid
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                yield from map(int, (task / "children").read_text().split())


def shown(view: Path) -> dict[str, bytes]:
    """The files of a view by their paths in it."""
    return {str(path.relative_to(view)): path.read_bytes() for path in view.rglob("*") if path.is_file()}


def links(path: Path) -> int:
    """How many names the file has; none when it is gone by now."""
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


def open_below(pid: int, store: Path) -> list[str]:
    """The files below `store` that a process has open, but for its lock."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(os.readlink(link))
    return [path for path in found if path.startswith(f"{store}/") and not path.endswith("/.lock")]


def holds(good: Callable[[], bool], why: Callable[[], object]) -> None:
    """Return when `good` does; fail with `why` when it does not come."""
    until = monotonic() + SECONDS
    while not good():
        assert monotonic() < until, why()
        select.select([], [], [], 0.02)


def sort(call: Call, store: str) -> str:
    """What a call is for: its path below the store, without what differs from one model to the next."""
    path = call.path.removeprefix(f"{store}/")
    for what, name in (
        (r"[0-9a-f]{32,64}(-\d+)?", "X"),
        (r"(\.tmp|view|gone)-[0-9a-f]+", "T"),
        (r"sha256/..(?![\w])", "sha256/X"),
        (r"acme--m\d+", "M"),
    ):
        path = re.sub(what, name, path)
    return f"{call.name} {path}"


def sweep(calls: list[Call], store: object) -> list[Fault]:
    """The faults to try: of each sort of call the first, in turn in one of four ways; or every call in every way. Letting go needs no room."""
    any_way = [(errno.ENOSPC, None), (errno.EIO, 1), (errno.ENOSPC, 1), (errno.EIO, None)]
    found: list[Fault] = []
    seen: Counter[str] = Counter()
    needing_room = 0
    for number, call in enumerate(calls, 1):
        roomy = call.name not in LETTING_GO
        needing_room += roomy
        ways = [Fault(needing_room if error == errno.ENOSPC else number, error, times, sort(call, str(store))) for error, times in any_way]
        ways = ways if roomy else [fault for fault in ways if fault.error == errno.EIO]
        name = ways[0].call
        if EVERY or not seen[name]:
            found += ways if EVERY else [ways[len(seen) % len(ways)]]
        seen[name] += 1
    return found


def problem(ask: Callable[[], object]) -> Problem | None:
    """What it is refused with."""
    try:
        ask()
    except Problem as refused:
        return refused
    return None


def model_path(ref: str, more: str = "") -> str:
    """The path of a model of the Hub in the API."""
    return f"/v1/models/hf--{ref.replace('/', '--')}{more}"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One daemon for many faults: what one leaves behind, the next would meet."""
    place = tmp_path_factory.mktemp("faults")
    with HubServer({}) as hub:
        node = Node(place, hub, FaultFs(place))
        with node.daemon:
            node.good = node.has()
            yield node


@pytest.mark.slow
def test_a_fill(node: Node) -> None:
    def settled(ref: str, _: Problem | None) -> None:
        node.is_ready(ref)
        node.remove(ref)

    node.endures(lambda: node.new(17_000_000), lambda ref: node.client.ensure(ref, timeout=SECONDS), settled)


@pytest.mark.slow
def test_a_removal(node: Node) -> None:
    def settled(ref: str, refused: Problem | None) -> None:
        if refused is not None:
            node.is_ready(ref)
            node.remove(ref)
        gone = problem(lambda: node.client.model(ref))
        assert gone is not None
        assert gone.code == "unknown-model"
        left = [path for path in node.daemon.store.glob(f"**/*{ref.replace('/', '--')}*") if path.parent.name != "timelines"]
        assert not left

    node.endures(node.has, node.remove, settled)


@pytest.mark.slow
def test_a_pin(node: Node) -> None:
    def settled(ref: str, refused: Problem | None) -> None:
        model = node.ask("GET", f"/v1/models?ref={ref}")
        assert model["pinned"] is (refused is None)
        node.ask("PUT", model_path(ref, "/pin"))
        kept = problem(lambda: node.remove(ref))
        assert kept is not None
        assert kept.code == "pinned"
        node.ask("DELETE", model_path(ref, "/pin"))
        node.remove(ref)

    node.endures(node.has, lambda ref: node.ask("PUT", model_path(ref, "/pin")), settled)


@pytest.mark.slow
def test_a_lease(node: Node) -> None:
    """Taken, renewed and released: what was refused is not held, and what is held is."""

    def act(_: None) -> None:
        path = f"/v1/models/{node.client.model(node.good).entry}/leases"
        lease = node.ask("POST", path, {"holder": "test", "ttl_s": 60})["lease"]
        node.ask("PUT", f"{path}/{lease}", {"ttl_s": 90})
        node.ask("DELETE", f"{path}/{lease}")

    def settled(_: None, refused: Problem | None) -> None:
        held = node.ask("GET", "/v1/leases")["leases"]
        if refused is None:
            assert held == []
        for lease in held:
            node.ask("DELETE", f"/v1/models/{lease['entry']}/leases/{lease['lease']}")
        act(None)
        assert node.ask("GET", "/v1/leases")["leases"] == []

    node.endures(lambda: None, act, settled)


@pytest.mark.slow
def test_a_repair(node: Node) -> None:
    """A byte is flipped and the model verified: whatever fails meanwhile, it is never shown with that byte, and comes back."""

    def damaged() -> str:
        ref = node.has()
        blob = node.daemon.store / "blobs" / "sha256" / (digest := sha256(node.truth[ref]["b.safetensors"]).hexdigest())[:2] / digest
        blob.chmod(0o644)
        with blob.open("r+b") as file:
            file.seek(1000)
            file.write(bytes([node.truth[ref]["b.safetensors"][1000] ^ 255]))
        return ref

    def verify(ref: str) -> None:
        job = node.ask("POST", model_path(ref, "/verify"))["job"]
        while job["state"] not in ("done", "failed"):
            select.select([], [], [], 0.02)
            job = node.ask("GET", f"/v1/jobs/{job['id']}")
        if job["error"]:
            raise Problem.of(job["error"])

    def settled(ref: str, _: Problem | None) -> None:
        node.is_ready(ref)
        verify(ref)
        node.remove(ref)

    node.endures(damaged, verify, settled, damaged=True, stride=3)  # half of it is a fill


@pytest.mark.slow
def test_a_start(node: Node) -> None:
    """A daemon that cannot start says why and ends; one that starts has everything it had. It runs last: it tidies up after all others."""
    pinned = node.has()
    node.ask("PUT", model_path(pinned, "/pin"))
    entry = node.client.model(node.good).entry
    lease = node.ask("POST", f"/v1/models/{entry}/leases", {"holder": "test", "ttl_s": 3600})["lease"]
    node.daemon.stop()
    node.faults.watch(node.below)
    node.daemon.start()
    node.faults.lift()
    faults = sweep(node.faults.calls(), node.daemon.store)
    for fault in faults if EVERY else faults[::5]:  # each costs two starts
        node.daemon.stop()
        try:
            with node.faults.failing(node.below, fault.error, kinds=fault.kinds, nth=fault.nth, times=fault.times):
                started = starts(node.daemon)
                if started:
                    node.client.model(node.good)
            node.check()
            if not started:
                assert "cannot " in node.daemon.last_words(600)
                node.daemon.start()
            node.is_ready(node.good)
            node.is_ready(pinned)
            assert node.ask("GET", f"/v1/models?ref={pinned}")["pinned"]
            assert lease in [held["lease"] for held in node.ask("GET", "/v1/leases")["leases"]]
            node.spoke_kindly()
        except BaseException as error:
            error.add_note(f"{fault}; the daemon said:\n{node.daemon.last_words(3000)}")
            raise
    node.daemon.stop()
    node.daemon.start()
    node.is_tidy()


def starts(daemon: DaemonProcess) -> bool:
    """Whether it does."""
    try:
        daemon.start()
    except AssertionError:
        return False
    return True
