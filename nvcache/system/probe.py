"""The two witnesses of what is on a disk, blkid and its own bytes, and the one way to erase it. It decides nothing: what is found is reported.

Every call on a disk is bounded: a disk that does not answer is an error (disk-stalled), and its thread is left behind.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

from nvcache.core.content import CLAIM, ENDS, Content, Kind, claim, never_mounted, recognise
from nvcache.core.disks import Blkid, Probe
from nvcache.errors import Code, DiskError
from nvcache.system.flock import take_lock
from nvcache.system.patience import within
from nvcache.system.run import Finished, Tools, printable

PATIENCE = 10.0  # seconds for reads and opens of one disk
BLOCK = 4096
_IDENTITY = {Kind.MD: 4096}  # where the block is that says whose the disk is; at 0 for all others
_BLKID = {0: Blkid.FOUND, 2: Blkid.NOTHING, 8: Blkid.AMBIVALENT}
_ESCAPED = re.compile(r"\\(.)")


def blkid(tools: Tools, node: str) -> Probe:
    """What `blkid -p` (which reads the disk, never a cache) says of `node`, by its exit status.

    Anything unexpected is `FAILED` with the reason. Raises `DiskError`: tool-missing, tool-stalled, disk-stalled.
    """
    try:
        # A device that cannot be opened has status 2 as well, like one with nothing on it, and no complaint: so it is opened here.
        fd = _opened(node, os.O_RDONLY, PATIENCE)
    except OSError as error:
        return Probe(Blkid.FAILED, why=str(_failed(f"open {node}", error)))
    try:
        return parse_blkid(tools.run("blkid", "-p", "-o", "export", node, accept=range(256), quiet=True, timeout=PATIENCE))
    except DiskError as error:
        if error.code is Code.TOOL_FAILED:
            return Probe(Blkid.FAILED, why=str(error))
        raise
    finally:
        os.close(fd)


def parse_blkid(done: Finished) -> Probe:
    """blkid's answer, believed only where its parts agree; never raises."""
    result = _BLKID.get(done.status, Blkid.FAILED)
    found = dict(line.split("=", 1) for line in done.out.split("\n") if "=" in line)
    values = {name: _ESCAPED.sub(r"\1", printable(value)) or None for name, value in found.items()}
    if result is Blkid.FOUND and not (values.get("TYPE") or values.get("PTTYPE")):
        return Probe(Blkid.FAILED, why=f"blkid found something and names nothing: {done.said or 'no output'}")
    if result is Blkid.NOTHING and (done.out.strip() or done.err.strip()):
        return Probe(Blkid.FAILED, why=f"blkid found nothing, and says: {done.said}")
    if result is Blkid.FAILED:
        return Probe(result, why=f"blkid ended with status {done.status}{f': {done.said}' if done.said else ''}")
    if result is Blkid.FOUND:
        return Probe(result, values.get("TYPE"), values.get("PTTYPE"), values.get("LABEL"), values.get("UUID"))
    return Probe(result, why=done.said)


@contextmanager
def held(nodes: Sequence[str], *, timeout: float = PATIENCE) -> Iterator[Mapping[str, int | None]]:
    """Descriptors of all the nodes, opened exclusively for reading; None for one that the kernel or a program holds.

    The kernel's own claims (mounts in any namespace, md, dm, swap) count, a program's plain open does not. Raises `DiskError`: disk-io, disk-stalled.
    """
    with ExitStack() as opened:
        fds: dict[str, int | None] = {}
        for node in nodes:
            try:
                fds[node] = fd = _opened(node, os.O_RDONLY | os.O_EXCL, timeout)
                opened.callback(os.close, fd)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise _failed(f"open {node}", error) from error
                fds[node] = None
        yield fds


@contextmanager
def locked(nodes: Sequence[str], *, patience: float = 3.0) -> Iterator[None]:
    """The exclusive lock of each disk, which keeps udevd (which probes a disk under the shared lock) and other nvcaches away from it.

    udevd's probes are short, so a taken lock is tried again for `patience` seconds. Raises `DiskError`: disks-busy, disk-io, disk-stalled.
    """
    until = monotonic() + patience
    with ExitStack() as opened:
        for node in nodes:
            try:
                fd = _opened(node, os.O_RDONLY, PATIENCE)
                opened.callback(os.close, fd)
                if not take_lock(fd, until=until):
                    raise DiskError(Code.DISKS_BUSY, f"cannot lock {node}: another nvcache or udev works on it")
            except OSError as error:
                raise _failed(f"lock {node}", error) from error
        yield


def read_content(node: str | int, *, timeout: float = PATIENCE) -> Content:
    """What the first and the last `ENDS` bytes of a disk say, read around the page cache. `node` may be an open descriptor.

    Raises `DiskError`: disk-io, disk-stalled.
    """
    path = f"/proc/self/fd/{node}" if isinstance(node, int) else node
    what = f"read the ends of {os.readlink(path) if isinstance(node, int) else node}"  # noqa: PTH115 - of a link that is no path

    def read() -> Content:
        with _direct(path, os.O_RDONLY) as (fd, size):
            return recognise(*_ends(fd, size))

    try:
        return within(timeout, what, read)
    except OSError as error:
        raise _failed(what, error) from error


def unused(node: str) -> bool:
    """Whether an ext4 file system that was never mounted is on `node`. Raises `DiskError`: disk-io, disk-stalled."""

    def read() -> bool:
        with _direct(node, os.O_RDONLY) as (fd, _):
            return never_mounted(_read(fd, 0, BLOCK))

    try:
        return within(PATIENCE, f"read the superblock of {node}", read)
    except OSError as error:
        raise _failed(f"read the superblock of {node}", error) from error


def read_block(node: str, offset: int) -> None:
    """Read one block at `offset` around the page cache, only to see that the disk does. Not bounded by itself. Raises `DiskError` (disk-io)."""
    try:
        with _direct(node, os.O_RDONLY) as (fd, _):
            _read(fd, offset, offset + BLOCK)
    except OSError as error:
        raise _failed(f"read {node} at {offset}", error) from error


def clear(node: str, expected: Content, *, head: int = ENDS, timeout: float = 60.0) -> None:
    """Erase the first `head` and the last `ENDS` bytes of a disk that holds exactly `expected`. This is the only thing in nvcache that erases.

    The block that tells whose the disk is goes last, after a flush: a crash leaves the disk recognisable, or blank. Raises `DiskError`:
    disks-refused when something else is on it, or somebody uses it; disk-io; disk-stalled.
    """
    until = monotonic() + timeout

    def erase() -> None:
        with _direct(node, os.O_RDWR | os.O_EXCL) as (fd, size):
            if size < 2 * ENDS:
                raise DiskError(Code.DISKS_REFUSED, f"cannot clear {node}: it is smaller than {2 * ENDS} bytes")
            if recognise(*_ends(fd, size)) != expected:
                raise DiskError(Code.DISKS_REFUSED, f"cannot clear {node}: it no longer holds what it held when that was decided")
            if monotonic() >= until:  # the caller has given up, and may have decided otherwise since
                raise DiskError(Code.DISK_STALLED, f"cannot clear {node}: reading it took too long")
            identity = size - ENDS if expected.kind is Kind.CLAIM else _IDENTITY.get(expected.kind, 0)
            for start, end in ((0, head), (size - ENDS, size)):
                _zero(fd, start, min(end, identity))
                _zero(fd, max(start, identity + BLOCK), end)
            os.fsync(fd)
            _zero(fd, identity, identity + BLOCK)
            os.fsync(fd)
            if any(part.count(0) != len(part) for part in _ends(fd, size)):
                raise OSError(errno.EIO, "it reads back other bytes than were written")

    try:
        within(timeout, f"clear {node}", erase)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DiskError(Code.DISKS_REFUSED, f"cannot clear {node}: somebody uses it") from error
        raise _failed(f"clear {node}", error) from error


@contextmanager
def claimed(nodes: Mapping[str, str]) -> Iterator[None]:
    """Disks (node → serial number) that hold nothing are claimed while something is made on them; after a failure the claims stay.

    Raises `DiskError`: disks-refused, disk-io, disk-stalled.
    """
    for node, serial in nodes.items():
        _on_claim(node, f"claim {node}", serial, make=True)
    yield
    for node, serial in nodes.items():
        unclaim(node, serial)


def unclaim(node: str, serial: str) -> None:
    """Take the claim of the disk `serial` away, if it is there; that of another would be a part of some file.

    Raises `DiskError`: disks-refused, disk-io, disk-stalled.
    """
    _on_claim(node, f"unclaim {node}", serial, make=False)


def _on_claim(node: str, what: str, serial: str, *, make: bool) -> None:
    def write() -> None:
        with _direct(node, os.O_RDWR | os.O_EXCL) as (fd, size):
            if make and recognise(*_ends(fd, size)).kind is not Kind.BLANK:
                raise DiskError(Code.DISKS_REFUSED, f"cannot {what}: it is not blank")
            if make or _read(fd, size - ENDS, size - ENDS + CLAIM) == claim(serial):
                os.fsync(fd)  # what was made meanwhile must have reached the disk before the claim goes
                _write(fd, size - ENDS, claim(serial) if make else bytes(CLAIM))
                os.fsync(fd)

    try:
        within(PATIENCE, what, write)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DiskError(Code.DISKS_REFUSED, f"cannot {what}: somebody uses it") from error
        raise _failed(what, error) from error


def _opened(node: str, flags: int, timeout: float) -> int:
    """A descriptor; opening a disk may read its partition table, so that too can hang."""
    return within(timeout, f"open {node}", lambda: _open(node, flags), discard=os.close)


def _open(node: str, flags: int) -> int:
    fd = os.open(node, flags | os.O_CLOEXEC)
    if _stale(fd, node):
        os.close(fd)
        raise OSError(errno.ESTALE, "its node is that of another device")
    return fd


def _stale(fd: int, node: str) -> bool:
    """Whether the node leads to another device than the one of its name, as one that was not removed with its device may do."""
    number = os.fstat(fd).st_rdev
    try:
        named = Path("/sys/class/block", Path(node).resolve().name, "dev").read_text()
    except OSError:
        return False  # an alias, or no device
    return named.strip() != f"{os.major(number)}:{os.minor(number)}"


@contextmanager
def _direct(path: str, flags: int) -> Iterator[tuple[int, int]]:
    """A descriptor that goes around the page cache where that is possible, and the device's size in bytes."""
    try:
        fd = _open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = _open(path, flags)
    try:
        yield fd, os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _ends(fd: int, size: int) -> tuple[bytes, bytes]:
    if size < BLOCK:
        raise OSError(errno.ENODATA, "the device has no size")
    return _read(fd, 0, min(size, ENDS)), _read(fd, max(0, size - ENDS), size)


def _read(fd: int, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`; a short read is a failure."""
    with mmap.mmap(-1, end - start) as buffer:
        got = os.preadv(fd, [buffer], start)
        if got != end - start:
            raise OSError(errno.EIO, f"{got} bytes instead of {end - start}")
        return buffer[:]


def _zero(fd: int, start: int, end: int) -> None:
    """Write zeros from `start` to `end`."""
    if start < end:
        _write(fd, start, bytes(end - start))


def _write(fd: int, start: int, data: bytes) -> None:
    """Write all of `data` at `start`; a short write is a failure."""
    with mmap.mmap(-1, len(data)) as buffer:  # aligned, as going around the page cache asks for
        buffer[:] = data
        done = os.pwritev(fd, [buffer], start)
        if done != len(data):
            raise OSError(errno.EIO, f"{done} bytes written instead of {len(data)}")


def _failed(what: str, error: OSError) -> DiskError:
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return DiskError(Code.DISK_IO, f"cannot {what}: {error.strerror} ({name})", facts={"errno": name})
