"""What a walk is on: a small file system of its own, a Hub whose repositories share files, a daemon that dies at any call. It judges nothing."""

from __future__ import annotations

import json
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nvcache.client.transport import Problem, Transport
from tests.support.daemon import DaemonProcess
from tests.support.disks import mounted
from tests.support.faultfs import FaultFs
from tests.support.faults import Kind
from tests.support.hub import HubServer
from tests.support.repo import Repo

MB = 10**6
LIMIT = 72 * MB
MIN_FREE = 8 * MB
BOUND = 60.0  # seconds that anything may take at the very most, however busy the machine is
NAMES = ("pair", "cousin", "large", "small", "twin")
VERSIONS = 3


def weights(seed: int, size: int) -> bytes:
    """A safetensors file with one tensor of `size` bytes, a function of both."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    block = bytes((seed * 31 + i * 7) % 251 for i in range(4093))  # a prime: no chunk is like its neighbour
    return struct.pack("<Q", len(header)) + header + (block * (size // len(block) + 1))[:size]


def files_of(name: str, version: int) -> dict[str, bytes]:
    """The content of `acme/<name>`: a shard of two chunks is in `pair` and `cousin`, all of `small` is in `twin`, and a version changes one file."""
    config = {"config.json": json.dumps({"version": version}).encode()}
    shared = weights(1, 20 * MB)
    match name:
        case "pair":
            return {"a.safetensors": shared, "b.safetensors": weights(10 + version, 5 * MB), **config}
        case "cousin":
            return {"sub/a.safetensors": shared, "c.safetensors": weights(2, 8 * MB), **config}
        case "large":
            return {"model.safetensors": weights(3, 36 * MB), **config}
        case _:
            return {"model.safetensors": weights(4, 3 * MB), "config.json": b"{}", **({"notes.txt": b"%d" % version} if version else {})}


class Ground:
    """Everything that is outside of the daemon, and the daemon. A context manager; `start` and `die` may be repeated."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._stack = ExitStack()
        self.truth: dict[tuple[str, str], dict[str, bytes]] = {}  # name, commit → what its files hold
        self.versions = dict.fromkeys(NAMES, 0)

    def __enter__(self) -> Ground:
        with ExitStack() as stack:
            self.place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nvw-")))
            self.disk = stack.enter_context(mounted(self._kind, self.place, megabytes=320))
            self.hub = stack.enter_context(HubServer({f"acme/{name}": Repo(files_of(name, 0)) for name in NAMES}))
            for name in NAMES:
                self.truth[name, self.repo(name).commit] = files_of(name, 0)
            self.store, self.config = self.disk / "store", self.place / "nvcache.toml"
            self.config.write_text("")
            flags = ("--config", str(self.config), "--log-format", "json")
            settings = {
                "workers": 1,
                "lanes": 2,
                "resolve_ttl": 0,
                "stall_timeout": 5,
                "fetch_deadline": 20,
                "max_bytes": LIMIT,
                "min_free": MIN_FREE,
            }
            self.daemon = DaemonProcess(self.place, self.hub.url, *flags, store=self.store, **settings)
            self.faults = FaultFs(self.place)
            self.daemon.environment |= self.faults.environment
            self.foreign, self.read_of_log = self.disk / "foreign", 0
            stack.callback(self.daemon.stop)
            self.start()
            self.empty = self.taken()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- the daemon

    def start(self) -> None:
        """Begin to serve."""
        self.started = time.time()
        self.daemon.start()

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def die(self) -> None:
        """SIGKILL the daemon, or bury it if it died already. Its workers end by themselves."""
        self.daemon.kill()
        self.faults.lift()
        self.hub.faults.release()

    @property
    def dead(self) -> bool:
        """Whether it was killed."""
        return self.daemon.process is None or self.daemon.process.poll() is not None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request of its operator. Raises `Problem`, and AssertionError for a defect of the daemon's."""
        answer = self.tried(method, path, body)
        if isinstance(answer, Problem):
            raise answer
        return answer

    def tried(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | Problem:
        """The same, for what may be refused. Raises `Problem` only when the daemon was killed meanwhile, or the model was evicted."""
        try:
            return Transport(f"unix://{self.daemon.socket}").request(method, path, body, timeout=BOUND)
        except Problem as error:
            problem = error
        said = f"{method} {path}: {problem}"
        assert problem.code not in ("internal", "timeout"), said
        if problem.code == "daemon-unreachable":
            assert self.died(), f"{said}\n{self.daemon.last_words()}"
        if problem.code in ("daemon-unreachable", "unknown-model"):
            raise problem
        return problem

    def died(self) -> bool:
        """Whether it is dead or just about to be: the connection breaks a moment before the process is gone."""
        process = self.daemon.process
        if process is None:
            return True
        if self.faults.failed or self.dead:
            process.wait(BOUND)
        return self.dead

    def hup(self) -> None:
        """Have the daemon read its file again, and wait until it did."""
        said = self._read_again()
        os.kill(self.pid, signal.SIGHUP)
        until(lambda: self._read_again() > said, "the file is read again")

    def _read_again(self) -> int:
        return self.daemon.last_words(None).count("was read again")

    def news(self) -> str:
        """What the log says since the last call."""
        with self.daemon.log.open("rb") as file:
            file.seek(self.read_of_log)
            text = file.read()
        self.read_of_log += len(text)
        return text.decode(errors="replace")

    # -- the Hub

    def repo(self, name: str) -> Repo:
        """The repository of `acme/<name>`."""
        return self.hub.repos[f"acme/{name}"]

    def push(self, name: str) -> None:
        """A new commit on main; the first again after the last."""
        self.versions[name] = (self.versions[name] + 1) % VERSIONS
        files = files_of(name, self.versions[name])
        self.truth[name, self.repo(name).push(files)] = files

    def forget_old(self, name: str) -> None:
        """The Hub has only what main is."""
        repo = self.repo(name)
        repo.commits = {repo.commit: repo.commits[repo.commit]}

    def down(self, *, really: bool) -> None:
        """The Hub answers nothing but 500, or is itself again."""
        self.hub.faults.clear()
        if really:
            self.hub.faults.add("*", Kind.STATUS, times=None, origin="*", method="*", status=500)
            self.hub.drop_connections()

    # -- the disk

    def fill_up(self, leave: int) -> None:
        """A foreign file takes the file system but for some `leave` bytes."""
        room = os.statvfs(self.disk)
        size = max(0, room.f_bavail * room.f_frsize - leave)
        with self.foreign.open("wb") as file:
            end = 0
            while size >= room.f_frsize:
                try:
                    os.posix_fallocate(file.fileno(), end, size)
                except OSError:  # the file system needs some of it for itself
                    size //= 2
                else:
                    end += size
                    break

    def tidy(self) -> None:
        """The foreign file is gone."""
        self.foreign.unlink(missing_ok=True)

    def taken(self) -> int:
        """Bytes that the file system has given away, to whomever."""
        room = os.statvfs(self.disk)
        return (room.f_blocks - room.f_bfree) * room.f_frsize


def until(good: Callable[[], object], what: str, seconds: float = BOUND) -> None:
    """Look again and again until it is good. Raises AssertionError when that does not come."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not good():
        assert time.monotonic() < end, f"it does not come that {what}"
        pause.wait(0.03)
