"""Gives the bytes of ready models to other nodes, by SHA-256: whether one may have a blob, and how it gets to their socket. It knows no HTTP.

Bytes go from the file to the socket inside the kernel, on threads of their own: neither a slow disk nor a slow node holds up an answer to a pod.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import threading
from pathlib import Path

from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.context import Context
from nvcache.errors import Code, RequestError
from nvcache.store.files import disk_errors

PIECE = 2**20  # bytes handed to the kernel at a time: how soon a stop is seen
STALL_S = 20.0  # how long the other side may take next to nothing
LEAST = 256 * 1024  # bytes that are more than that: crumbs must not keep a thread
LOOK_S = 0.25
DISK = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA, errno.ENXIO, errno.ENODEV})  # anything else is the socket's


class Share:
    """What one store shares. `threads` send; each has one answer at a time, and more of them wait."""

    def __init__(self, context: Context, threads: DaemonExecutor) -> None:
        self._do = context
        self._threads = threads

    async def size_of(self, sha256: str) -> int:
        """The size in bytes of a blob that a ready model shows. Raises `RequestError` (unknown-blob), `DiskError`."""
        ready = (each for each in self._do.shelf.entries.values() if each.broken is None and not each.removing)
        size = next((entry.manifest.blobs[sha256] for entry in ready if sha256 in entry.manifest.blobs), None)
        if size is None or not await self._do.disk.call(self._do.blobs.has, sha256, size):
            raise RequestError(Code.UNKNOWN_BLOB, f"cannot share blob {sha256[:12]}…: no model that is ready here has it")
        return size

    async def send(self, sha256: str, sock: socket.socket, offset: int, count: int) -> None:
        """Send bytes of a blob to `sock`, which is non-blocking and is closed at the end, whatever happens.

        Raises `DiskError`, `ConnectionError` when the other side is gone or takes less than `LEAST` in `STALL_S` seconds. Cancelled, it ends soon.
        """
        stop = threading.Event()
        try:
            sending = self._threads.submit(_send, self._do.layout.blob(sha256), sock, offset, count, stop)
        except BaseException:
            sock.close()
            raise
        sending.add_done_callback(lambda _: sock.close())
        try:
            await asyncio.wrap_future(sending)
        finally:
            stop.set()


def _send(path: Path, sock: socket.socket, offset: int, count: int, stop: threading.Event) -> None:
    with disk_errors(f"read blob {path.name}"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(fd, offset, count, os.POSIX_FADV_SEQUENTIAL)
        ready = select.poll()
        ready.register(sock, select.POLLOUT)
        until, taken = clock.monotonic() + STALL_S, 0
        while count > 0 and not stop.is_set():
            sent = _piece(path.name, sock, fd, offset, min(PIECE, count))
            offset, count, taken = offset + sent, count - sent, taken + sent
            if taken >= LEAST:
                until, taken = clock.monotonic() + STALL_S, 0
            elif count > 0 and clock.monotonic() >= until:
                raise ConnectionAbortedError(errno.ETIMEDOUT, "too little is taken")
            elif not sent:
                ready.poll(LOOK_S * 1000)
    finally:
        os.close(fd)


def _piece(name: str, sock: socket.socket, fd: int, offset: int, count: int) -> int:
    """Bytes that the socket took; 0: none just now."""
    try:
        sent = os.sendfile(sock.fileno(), fd, offset, count)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno not in DISK:
            raise ConnectionAbortedError(error.errno, error.strerror) from error
        with disk_errors(f"read blob {name}"):
            raise
    if sent == 0:
        with disk_errors(f"read blob {name}"):
            raise OSError(errno.EIO, "it is shorter than it was")
    return sent
