"""The handover between two processes, in two small files. It decides nothing and trusts neither file further than it must.

::

    <run_directory>/stripe.json         written by the disks process (root): the state of the stripe
    <run_directory>/../serve.json       written by the daemon (anybody): the generation it let go of, and when it met a failing disk

Both are JSON objects, replaced by rename. The daemon may be hostile to the disks process, which therefore follows no link, waits for no pipe, reads
no more than `ANSWER_BYTES` and takes nothing from it but numbers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.handover import StripeState, StripeStatus
from nvcache.engine.rundirectory import make_run_directory
from nvcache.errors import Code, DiskError

log = logging.getLogger(__name__)
STRIPE_BYTES = 1024 * 1024  # the most that is read of stripe.json
ANSWER_BYTES = 64 * 1024  # the most that is read of serve.json
POLL = 0.5  # seconds between two looks of the daemon
ANSWER_POLL = 0.1  # seconds between two looks of the disks process that waits for an answer
READ_SECONDS = 5.0  # a look that takes longer is a failed one


def stripe_file(run_directory: Path) -> Path:
    """Where the disks process writes."""
    return run_directory / "stripe.json"


def answer_file(run_directory: Path) -> Path:
    """Where the daemon answers: a directory above, for it may not write below `run_directory`."""
    return run_directory.parent / "serve.json"


class StripeFiles:
    """The disks process's side, with the calls that `LocalStripe` has for it. One thread uses it."""

    def __init__(self, run_directory: Path, group: int | None = None) -> None:
        """`group`: the daemon's, which must write beside the run directory; None where it can already."""
        self._directory = run_directory
        self._group = group
        self._published: StripeState | None = None
        self._doubt: object = None

    def make_directory(self) -> None:
        """Have the run directory, before anybody locks or writes something in it. Raises `DiskError` (disk-io)."""
        with self._publishing():
            make_run_directory(self._directory, self._group)

    def next_generation(self) -> int:
        """A generation larger than any published from here before, also when the file is gone: they begin at the unix time in seconds."""
        with suppress(OSError, ValueError):
            return max(state_from(read_object(stripe_file(self._directory), STRIPE_BYTES)).generation + 1, int(clock.unix()))
        return int(clock.unix())

    def publish(self, state: StripeState) -> None:
        """Replace stripe.json, readable by everybody; one that is there and says the same gets a new time. Raises `DiskError` (disk-io)."""
        file = stripe_file(self._directory)
        with self._publishing():
            if state == self._published:
                with suppress(FileNotFoundError):  # somebody emptied /run
                    os.utime(file, follow_symlinks=False)
                    return
            make_run_directory(self._directory, self._group)
            replace_file(file, asdict(state), 0o644)
        self._published = state

    def wait_acknowledged(self, generation: int, seconds: float) -> bool:
        """Wait at most `seconds` until the daemon has let go since `generation`; whether it has."""
        until, never = clock.monotonic() + seconds, threading.Event()
        while not (done := _number(self._answer(), "acknowledged") == generation) and clock.monotonic() < until:
            never.wait(ANSWER_POLL)
        return done

    def take_doubt(self) -> bool:
        """Whether the daemon met a failing disk of what is published now, since the last call."""
        answer = self._answer()
        doubt = (_number(answer, "doubted"), _number(answer, "doubted_at"))
        fresh = self._published is not None and doubt[0] == self._published.generation and doubt != self._doubt
        self._doubt = doubt
        return fresh

    def _answer(self) -> Mapping[str, Any]:
        try:
            return read_object(answer_file(self._directory), ANSWER_BYTES)
        except (OSError, ValueError):
            return {}  # no daemon, or one that says nothing sensible: it has not let go

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(Code.DISK_IO, f"cannot publish the state of the stripe in {self._directory}: {error.strerror or error}") from error


class FollowedFile:
    """The daemon's side: a stripe that another process looks after. stripe.json must be root's or our own, and nobody else's to write."""

    def __init__(self, run_directory: Path) -> None:
        self._file = stripe_file(run_directory)
        self._answer = answer_file(run_directory)
        self._reads = DaemonExecutor("stripe", 1)
        self._writes = DaemonExecutor("answer", 1)
        self._said: dict[str, float | None] = {"acknowledged": None, "doubted": None, "doubted_at": None}
        self._state = self._absent("stripe.json was not read yet")

    def current(self) -> StripeState:
        """What the last look found."""
        return self._state

    async def changed(self, after: StripeState) -> StripeState:
        """Look twice a second until there is another word than `after`."""
        while True:
            state = await self._look()
            if state != after:
                return state
            await asyncio.sleep(POLL)

    async def acknowledge(self, generation: int) -> None:
        """Write it into serve.json. What cannot be written is said in the log; the disks process then waits in vain, for a while."""
        self._said["acknowledged"] = generation
        await self._writes.call(self._write, dict(self._said))

    def doubt(self, error: DiskError) -> None:
        """Write it into serve.json, without waiting."""
        later = int(self._said["doubted_at"] or 0) + 1  # two within a millisecond are two, and so is one after the clock was set back
        self._said |= {"doubted": self._state.generation, "doubted_at": max(int(clock.unix() * 1000), later)}
        self._writes.submit(self._write, dict(self._said))

    async def _look(self) -> StripeState:
        try:
            found = await self._reads.bounded(READ_SECONDS, f"read {self._file}", read_object, self._file, STRIPE_BYTES, (0, os.geteuid()))
            state = state_from(found)
            older = state.generation < self._state.generation
            state = self._absent(f"{self._file} went back to generation {state.generation}") if older else state
        except FileNotFoundError:  # whoever writes it next may begin anew
            state = replace(self._absent(f"{self._file} is not there; `nvcache disks watch` writes it"), generation=0)
        except (OSError, ValueError, DiskError) as error:
            state = self._absent(f"{self._file} is of no use: {getattr(error, 'strerror', None) or error}")
        self._state = state
        return state

    def _absent(self, reason: str) -> StripeState:
        before = getattr(self, "_state", None)
        return StripeState(before.generation if before else 0, StripeStatus.ABSENT, reason=reason)

    def _write(self, said: Mapping[str, float | None]) -> None:
        try:
            replace_file(self._answer, said, 0o644)
        except OSError as error:
            log.warning("cannot answer the disks process in %s: %s", self._answer, error.strerror or error)


def last_word(run_directory: Path) -> tuple[StripeState, float]:
    """What the disks process said, and when it last said so, in unix seconds. Raises `DiskError`: daemon-unreachable if it never did, disk-io."""
    file = stripe_file(run_directory)
    try:
        written = file.stat(follow_symlinks=False).st_mtime
        return state_from(read_object(file, STRIPE_BYTES, (0, os.geteuid()))), written
    except FileNotFoundError:
        hint = "start `nvcache disks watch`, or name its directory with --run-directory; on Kubernetes look at the node's nvcache-disks pod"
        raise DiskError(Code.DAEMON_UNREACHABLE, f"cannot tell the state of the stripe: {file} is not there", hint=hint) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        hint = f"restart `nvcache disks watch`, which alone writes {file}"
        raise DiskError(Code.DISK_IO, f"cannot tell the state of the stripe: {file} is of no use: {why}", hint=hint) from error


def state_from(raw: Mapping[str, Any]) -> StripeState:
    """The state that stripe.json tells. Raises ValueError: it is not one, or says mounted without saying where."""
    generation, details = _number(raw, "generation"), raw.get("details", {})
    texts = {name: raw.get(name) for name in ("code", "fs_uuid", "store")}
    if generation is None or generation < 0 or not isinstance(details, dict) or not isinstance(raw.get("reason", ""), str):
        raise ValueError("it holds no state of a stripe")
    if not all(value is None or isinstance(value, str) for value in texts.values()):
        raise ValueError("it holds no state of a stripe")
    state = StripeState(generation, StripeStatus(str(raw.get("state"))), reason=raw.get("reason", ""), details=details, **texts)
    if state.state is StripeStatus.MOUNTED and not (state.fs_uuid and state.store and Path(state.store).is_absolute()):
        raise ValueError("it says mounted, but not where")
    return state


def read_object(path: Path, limit: int, owners: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes; with `owners`, one that only they could have written. Follows no link, never waits.

    Raises OSError, ValueError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        if owners is not None and facts.st_uid not in owners:
            raise ValueError(f"it belongs to user {facts.st_uid}")
        if owners is not None and facts.st_mode & 0o022:
            raise ValueError("others may write it")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:  # ten thousand brackets are a recursion
        raise ValueError("it is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - of a file, not of an argument
    return found


def replace_file(path: Path, content: Mapping[str, object], mode: int) -> None:
    """Replace `path`, in a directory that is no link, by the JSON of `content`: at any moment it is the old file or the new one. Raises OSError.

    It is not synced: these files live on a memory file system and tell of processes that a power cut ends as well.
    """
    with _directory(path.parent) as home:
        temp = f".tmp-{path.name}-{secrets.token_hex(8)}"
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=home)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(json.dumps(content).encode())
                os.fchmod(fd, mode)
            os.rename(temp, path.name, src_dir_fd=home, dst_dir_fd=home)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                os.unlink(temp, dir_fd=home)
            raise


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _number(raw: Mapping[str, Any], name: str) -> int | None:
    """An integer of the object; None when it is anything else (JSON's true is not 1)."""
    value = raw.get(name)
    return value if type(value) is int else None
