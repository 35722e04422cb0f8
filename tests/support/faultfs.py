"""File system calls that fail by order: EIO, ENOSPC or any errno, in a daemon and the workers it starts, from the N-th call on, by kind and path.

`faultfs.c` beside this does it, preloaded into the daemon; this compiles it and says which calls, at any moment, by shared memory. Neither touches a
disk: what is there stays as it is. It cannot make a page fault of a mapped file fail.

::

    faults = FaultFs(tmp_path)
    daemon = DaemonProcess(tmp_path, hub.url)
    daemon.environment |= faults.environment
    with daemon, faults.failing(f"{daemon.store}/*", errno.ENOSPC, nth=7): …          # the 7th write below the store and all that follow
    faults.fail(f"{blob}", errno.EIO, kinds=Kind.READ, span=(CHUNK, 2 * CHUNK))       # chunk 1 cannot be read, until `lift`
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from pathlib import Path
from typing import NamedTuple

from nvcache.system.flock import take_lock

EVER = 2**64 - 1
_PATH, _TRACED = 512, 8192
_BOUND = 10.0  # seconds; a call is judged in microseconds, on a busy machine in some more


class Kind(IntFlag):
    """Kinds of calls, as in the C file."""

    WRITE = 1  # write, pwrite, writev, sendfile, copy_file_range, FICLONE
    SYNC = 2  # fsync, fdatasync
    CREATE = 4  # open(O_CREAT), mkdir, symlink
    NAME = 8  # link, rename
    ALLOCATE = 16  # fallocate, ftruncate
    REMOVE = 32  # unlink, rmdir
    MARK = 64  # chmod, utime
    READ = 128  # read, pread, preadv
    LOOK = 256  # stat
    ROOM = WRITE | SYNC | CREATE | NAME | ALLOCATE  # what a full disk refuses
    CHANGES = ROOM | REMOVE | MARK  # whatever changes the disk


class Call(NamedTuple):
    """One call that was counted."""

    name: str
    path: str


class _Traced(ctypes.Structure):
    _fields_ = (("call", ctypes.c_char * 16), ("path", ctypes.c_char * _PATH))


class _Control(ctypes.Structure):
    _fields_ = (
        ("kinds", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("victim", ctypes.c_int64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("stop", ctypes.c_uint64),
        ("seen", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("glob", ctypes.c_char * _PATH),
        ("trace", _Traced * _TRACED),
    )


class FaultFs:
    """The rule for every process started with `environment`. There is one rule at a time; at first none."""

    def __init__(self, place: Path) -> None:
        """Compile into `place`, a directory, with gcc."""
        library, control = place / "faultfs.so", place / "faultfs.control"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, source], check=True, timeout=60)
        control.write_bytes(bytes(ctypes.sizeof(_Control)))
        with control.open("r+b") as file:
            self._control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self._path = control
        self.environment = {"LD_PRELOAD": str(library), "FAULTFS": str(control)}

    def watch(self, glob: str, kinds: Kind = Kind.CHANGES) -> None:
        """Only count and note the calls on paths that match `glob` (absolute; `*` matches `/` too)."""
        self._say(glob, 0, kinds, 0, 0, (0, 0))

    def fail(
        self, glob: str, error: int, *, kinds: Kind = Kind.CHANGES, nth: int = 1, times: int | None = None, span: tuple[int, int] = (0, 0)
    ) -> None:
        """From the `nth` matching call from now on, fail `times` of them (None: all) with the errno `error`.

        `span`: only reads and writes that touch these bytes of the file (start, stop).
        """
        self._say(glob, error, kinds, nth, EVER if times is None else nth + times - 1, span)

    def kill(self, glob: str, pid: int, *, kinds: Kind = Kind.CHANGES, nth: int = 1) -> None:
        """Instead of the `nth` matching call from now on, SIGKILL for the daemon, `pid`, and for whoever makes the call, maybe a worker."""
        self._control.victim = pid
        self._say(glob, 0, kinds, nth, nth, (0, 0))

    @contextmanager
    def failing(
        self, glob: str, error: int, *, kinds: Kind = Kind.CHANGES, nth: int = 1, times: int | None = None, span: tuple[int, int] = (0, 0)
    ) -> Iterator[None]:
        """`fail` inside, `lift` after."""
        self.fail(glob, error, kinds=kinds, nth=nth, times=times, span=span)
        try:
            yield
        finally:
            self.lift()

    def lift(self) -> None:
        """No call fails or is counted any more, not even one that is being judged now; what was counted stays to be read."""
        with self._nobody_judges():
            """What was being judged is done, or dead."""

    @property
    def seen(self) -> int:
        """How many calls were counted since the last rule."""
        return int(self._control.seen)

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return int(self._control.failed)

    def calls(self) -> list[Call]:
        """The counted calls in order (the first 8192), whoever made them."""
        noted = (self._control.trace[index] for index in range(min(self.seen, _TRACED)))
        return [Call(one.call.decode(), one.path.decode()) for one in noted]

    def _say(self, glob: str, error: int, kinds: Kind, first: int, last: int, span: tuple[int, int]) -> None:
        with self._nobody_judges():
            control = self._control
            control.kinds, control.error, control.first, control.last = kinds, error, first, last
            control.start, control.stop = span
            control.seen = control.failed = 0
            control.glob = glob.encode()

    @contextmanager
    def _nobody_judges(self) -> Iterator[None]:
        """There is no rule; inside, no call is being judged by the last one either."""
        self._control.kinds = 0
        with self._path.open("rb") as file:
            assert take_lock(file.fileno(), until=time.monotonic() + _BOUND), "somebody judges a call for ever"
            yield
