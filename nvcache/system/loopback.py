"""Whose a TCP connection within this machine is, as the kernel says. It opens and closes none, and knows nothing of connections from elsewhere.

The rows of /proc/net/tcp and tcp6 (proc_net_tcp in the kernel's documentation): local and remote address as hexadecimal words in the machine's own
byte order, the state, and the user of the socket that the row is about. The other end of a connection has a row of its own.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

ESTABLISHED = "01"  # a socket that its process has closed belongs to nobody, which is written as 0
MAPPED = bytes(10) + b"\xff\xff"  # how a socket of IPv6 has an address of IPv4 (RFC 4291 §2.5.5.2)


def owner(theirs: tuple[str, int], ours: tuple[str, int], proc: Path = Path("/proc/net")) -> int | None:
    """The uid of who connected from `theirs` to `ours` (IPv4 addresses and ports), None where that cannot be told. Raises OSError."""
    for table, prefix in (("tcp", b""), ("tcp6", MAPPED)):
        wanted = [_written(prefix, *theirs), _written(prefix, *ours), ESTABLISHED]
        path = proc / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            row = line.split()
            if row[1:4] == wanted:
                return int(row[7])
    return None


def _written(prefix: bytes, address: str, port: int) -> str:
    words = prefix + socket.inet_aton(address)
    return f"{''.join(f'{word:08X}' for (word,) in struct.iter_unpack('=I', words))}:{port:04X}"
