"""The one door for processes. It starts them with an argv list, a given environment and no shell; it does not interpret what they say."""

from __future__ import annotations

import asyncio
import logging
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from nvcache.errors import Code, DiskError

OUTPUT = 1 << 20  # bytes kept of each stream; what writes more is not the program we think it is
REAP = 2.0  # seconds a killed program has to be gone
_READ = 1 << 16
_PACKAGES = {
    "blkid": "util-linux",
    "lvm": "lvm2",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "modprobe": "kmod",
    "udevadm": "udev",
    "umount": "mount",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that ended: its exit status (a signal's is negative) and what it wrote, with bytes that are no UTF-8 replaced."""

    argv: tuple[str, ...]
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The first lines of its complaint, or else of its output, made printable and one line; empty when it said nothing."""
        return printable(self.err) or printable(self.out)


def printable(text: str) -> str:
    """The first three lines of `text` that say something, as one line of at most 300 characters without control characters."""
    lines = ["".join(letter if letter.isprintable() else "?" for letter in line).strip() for line in text[:4096].splitlines()]
    return "; ".join([line for line in lines if line][:3])[:300]


class Tools:
    """The external programs, found in a fixed search path. One object serves a whole process, from any thread; every run is bounded in time."""

    def __init__(self, path: str = "/usr/sbin:/usr/bin:/sbin:/bin") -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stuck: dict[str, _Child] = {}  # killed but not gone: they hang in the kernel
        self.last = "no program was run"  # the last one that was to change something, and how it ended

    def have(self, program: str) -> bool:
        """Whether the program is installed."""
        return shutil.which(program, path=self._path) is not None

    def run(
        self,
        program: str,
        *args: str,
        timeout: float = 30.0,
        accept: Container[int] = (0,),
        env: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> Finished:
        """Run `program` to its end, in the C locale and a session of its own; nothing it left behind in that session lives on.

        `env` is added to its environment; `quiet` logs at debug level. Raises `DiskError`: tool-missing; tool-failed when it cannot be started, its
        status is not in `accept`, or it wrote more than `OUTPUT`; tool-stalled when it did not end within `timeout` seconds, and at once, without
        starting another, while an earlier run of it hangs in the kernel.
        """
        extra = dict(env or {})
        line = shlex.join([*(f"{name}={value}" for name, value in extra.items()), program, *args])
        child = self._start(program, args, {"PATH": self._path, "LC_ALL": "C", "LANG": "C", **extra}, line)
        begun = monotonic()
        try:
            in_time = child.follow(begun + timeout)
        finally:
            if not child.end():
                with self._lock:
                    self._stuck[program] = child
        done = Finished((program, *args), child.status, child.out.text(), child.err.text())
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "ran `%s`: %s after %.2f s",
            line,
            f"status {done.status}" if in_time else "did not end, killed",
            monotonic() - begun,
        )
        if not quiet:
            self.last = f"`{line}`, status {done.status}{f': {done.said}' if done.said else ''}"
        if not in_time:
            raise DiskError(Code.TOOL_STALLED, f"cannot finish `{line}`: it did not end within {timeout:g} s", facts={"program": program})
        if child.out.overflow or child.err.overflow:
            raise DiskError(Code.TOOL_FAILED, f"cannot use the answer of `{line}`: it wrote more than {OUTPUT >> 20} MiB", facts={"program": program})
        if done.status not in accept:
            how = f"signal {-done.status}" if done.status < 0 else f"exit status {done.status}"
            raise DiskError(
                Code.TOOL_FAILED,
                f"cannot finish `{line}`: {how}{f': {done.said}' if done.said else ''}",
                facts={"program": program, "status": done.status},
            )
        return done

    def _start(self, program: str, args: Sequence[str], env: Mapping[str, str], line: str) -> _Child:
        found = shutil.which(program, path=self._path)
        if found is None:
            package = _PACKAGES.get(program, program)
            raise DiskError(Code.TOOL_MISSING, f"cannot run {program}: it is not installed (Debian package {package})", facts={"program": program})
        with self._lock:
            stuck = self._stuck.get(program)
            if stuck is not None and not stuck.gone():
                raise DiskError(
                    Code.TOOL_STALLED, f"cannot run {program}: an earlier one (pid {stuck.pid}) hangs in the kernel", facts={"program": program}
                )
            self._stuck.pop(program, None)
        try:
            return _Child([found, *args], env)
        except OSError as error:
            raise DiskError(Code.TOOL_FAILED, f"cannot run `{line}`: {error.strerror}", facts={"program": program}) from error


@dataclass(slots=True)
class _Output:
    """What came through one pipe, up to `OUTPUT` bytes."""

    kept: bytearray = field(default_factory=bytearray)
    overflow: bool = False

    def take(self, fd: int) -> bool:
        """Read once; False at the end of the stream."""
        with suppress(BlockingIOError):
            data = os.read(fd, _READ)
            room = OUTPUT - len(self.kept)
            self.kept += data[:room]
            self.overflow |= len(data) > room
            return bool(data)
        return True

    def text(self) -> str:
        return self.kept.decode("utf-8", "replace")


class _Child:
    """One running program and the pipes from it. Raises OSError when it cannot be started."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.out = _Output()
        self.err = _Output()
        self._process = subprocess.Popen(  # noqa: S603 - an argv list, never a shell
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(env), start_new_session=True
        )
        self.pid = self._process.pid

    @property
    def status(self) -> int:
        return self._process.returncode or 0

    def gone(self) -> bool:
        return self._process.poll() is not None

    def follow(self, until: float) -> bool:
        """Take what it writes until it ends; False when it has not ended at `until`. A pipe that a grandchild keeps open is not waited for."""
        alive = os.pidfd_open(self.pid)
        try:
            with selectors.DefaultSelector() as waiting:
                waiting.register(alive, selectors.EVENT_READ)
                for pipe, output in self._pipes():
                    os.set_blocking(pipe, False)
                    waiting.register(pipe, selectors.EVENT_READ, output)
                while (left := until - monotonic()) > 0:
                    for key, _ in waiting.select(left):
                        if key.data is None:
                            return True
                        if not key.data.take(key.fd):
                            waiting.unregister(key.fd)
            return False
        finally:
            os.close(alive)

    def end(self) -> bool:
        """Kill what is left of its session, reap it and take the rest of its output; False when it cannot be killed."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        try:
            self._process.wait(REAP)
        except subprocess.TimeoutExpired:
            return False
        finally:
            for pipe, output in self._pipes():
                for _ in range(OUTPUT // _READ):  # more than a pipe holds: a writer that escaped the session cannot keep us here
                    if not _ready(pipe) or not output.take(pipe):
                        break
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()
        return True

    def _pipes(self) -> list[tuple[int, _Output]]:
        streams = ((self._process.stdout, self.out), (self._process.stderr, self.err))
        return [(stream.fileno(), output) for stream, output in streams if stream is not None]


def _ready(fd: int) -> bool:
    with selectors.DefaultSelector() as waiting:
        waiting.register(fd, selectors.EVENT_READ)
        return bool(waiting.select(0))


async def start_service(argv: Sequence[str], *, control: socket.socket, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    """Start a long-lived child whose standard input is the socket `control` (the only descriptor it inherits besides stderr).

    The child learns of its parent's death by the end of that stream. Raises OSError when the program cannot be started.
    """
    return await asyncio.create_subprocess_exec(
        *argv, stdin=control.fileno(), stdout=asyncio.subprocess.DEVNULL, stderr=None, env=dict(env), close_fds=True, start_new_session=True
    )
