"""One disk of the guest, served to QEMU over NBD from a sparse image, with a speed and with faults that can be set while it serves.

The speed is a simple model: one request at a time, each taking 0.1 ms + size / rate. (QEMU's own throttle is a token bucket that hides latency.)
Protocol: NBD, old-style negotiation (NetworkBlockDevice/nbd doc/proto.md).
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LATENCY = 0.0001
SECTOR = 512
BLOCK = 65536
_READ, _WRITE, _END, _FLUSH = 0, 1, 2, 3
_HAS_FLAGS, _SEND_FLUSH = 1, 4
EVERYTHING = (0, 1 << 62)
NOTHING = (0, 0)
Witness = Callable[[int, bytes | None], None]  # called before each write with (offset, data), before each flush with (0, None)


class NbdDisk:
    """Serves the image at `path` to one client, on a thread of its own, until the client goes. `address` is an abstract Unix socket's name."""

    def __init__(self, path: Path, *, rate: int = 0, witness: Witness = lambda at, data: None) -> None:
        self._witness = witness
        self.rate = rate  # bytes a second; 0: as fast as it goes
        self.dead = False  # every request fails
        self.unreadable = NOTHING  # byte range that cannot be read
        self._flowing = threading.Event()
        self._flowing.set()
        self._file = os.open(path, os.O_RDWR)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # the kernel chooses a free name; a path could be too long
        self._listener.listen(1)
        self.address = self._listener.getsockname()[1:].decode()
        self._thread = threading.Thread(target=self._serve, name=f"nbd {path.name}")
        self._thread.start()

    def stall(self) -> None:
        """Answer nothing until `heal`."""
        self._flowing.clear()

    def heal(self) -> None:
        """Work again: no error, no stall."""
        self.dead, self.unreadable = False, NOTHING
        self._flowing.set()

    def close(self) -> None:
        """End the thread; QEMU must have gone, or never have come."""
        self._flowing.set()
        with suppress(OSError):  # it was closed by the thread's end
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes an accept
        self._thread.join(30)
        assert not self._thread.is_alive(), f"{self._thread.name} does not end"
        os.close(self._file)

    def _serve(self) -> None:
        try:
            with self._listener:
                connection = self._listener.accept()[0]
            with connection:
                connection.sendall(b"NBDMAGIC" + struct.pack(">QQI124x", 0x420281861253, os.fstat(self._file).st_size, _HAS_FLAGS | _SEND_FLUSH))
                self._answer(connection)
        except OSError:
            pass  # QEMU was killed: a power cut

    def _answer(self, connection: socket.socket) -> None:
        free = 0.0  # when the disk has finished what it has taken on
        queued = False
        while len(head := connection.recv(28, socket.MSG_WAITALL)) == 28:
            _, _, kind, handle, start, size = struct.unpack(">IHHQQI", head)
            came = time.monotonic()
            data = connection.recv(size, socket.MSG_WAITALL) if kind == _WRITE else b""
            if kind == _END:
                return
            self._flowing.wait()
            if self.rate and kind in (_READ, _WRITE):
                free = (max(free, came - 0.05) if queued else came) + LATENCY + size / self.rate
                time.sleep(max(0.0, free - time.monotonic()))  # this is the disk being slow
            error = self.dead or (kind == _READ and start < self.unreadable[1] and start + size > self.unreadable[0])
            if not error and kind in (_WRITE, _FLUSH):
                self._witness(start, data if kind == _WRITE else None)
            if not error and kind == _WRITE:
                os.pwrite(self._file, data, start)
            found = os.pread(self._file, size, start) if kind == _READ and not error else b""
            connection.sendall(struct.pack(">IIQ", 0x67446698, 5 if error else 0, handle) + found)
            queued = bool(select.select([connection], [], [], 0)[0])


def digest(path: Path) -> str:
    """The digest of an image's content: of all blocks that are not zero and where they are, so that a hole equals zeros."""
    found = hashlib.blake2b(digest_size=16)
    zeros = bytes(BLOCK)
    with path.open("rb", buffering=0) as image:
        at, end = 0, os.fstat(image.fileno()).st_size
        found.update(end.to_bytes(8, "little"))
        while at < end:
            try:
                at = os.lseek(image.fileno(), at, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:  # ENXIO: no data from here on
                break
            block = os.pread(image.fileno(), BLOCK, at)
            if block != zeros[: len(block)]:
                found.update(at.to_bytes(8, "little") + block)
            at += BLOCK
    return found.hexdigest()
