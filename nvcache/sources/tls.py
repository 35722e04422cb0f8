"""A TLS client connection for bulk reading, shaped like the socket that `http.client` wants. What is verified is its context's matter.

`ssl.SSLSocket` makes two receive calls and runs three Python frames for every record of 16 KiB (RFC 8446 §5.1). Here the ciphertext is received in
large pieces into a memory BIO and decrypted from there straight into the caller's memory: a quarter to a third less processor time a byte
(`python -m bench.tls`).
"""

from __future__ import annotations

import io
import socket
import ssl
from typing import cast

PIECE = 256 * 1024  # ciphertext received at once


class TlsConnection:
    """TLS over a connected socket, which the caller keeps: shutting that one down from another thread ends every wait here."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._piece = memoryview(bytearray(PIECE))
        self._files = 0
        self._closing = False

    def do_handshake(self) -> None:
        """Shake hands and verify the certificate, within the socket's timeout. Raises ssl.SSLError, OSError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._receive():
                    raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection was closed during the handshake") from None
            except ssl.SSLError:
                self._flush()  # the alert that tells the other end why
                raise
            else:
                self._flush()
                return

    def sendall(self, data: bytes) -> None:
        """Encrypt and send all of `data`."""
        self._tls.write(data)
        self._flush()

    def readinto(self, view: memoryview) -> int:
        """Decrypt into `view`: at least a byte, as much as there is without waiting again; 0 when the other end closed, cleanly or not."""
        filled = 0
        while filled < len(view):
            try:
                got = cast("int", self._tls.read(len(view) - filled, view[filled:]))  # typeshed knows only the form without a buffer
            except ssl.SSLWantReadError:
                if filled:
                    break
                self._flush()  # an answer to a key update, if there was one
                if not self._receive():
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            else:
                if got == 0:
                    break
                filled += got
        return filled

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` reads from; only `rb`."""
        if mode != "rb":
            raise ValueError(f"cannot make a file with mode {mode!r}")
        self._files += 1
        return io.BufferedReader(_Raw(self), 16 * 1024)

    def close(self) -> None:
        """Close the socket once the files made of it are closed, as sockets do: `http.client` lets go of it before the body is read."""
        self._closing = True
        if self._files == 0:
            self._sock.close()

    def file_closed(self) -> None:
        """One file fewer."""
        self._files -= 1
        if self._closing:
            self.close()

    def _receive(self) -> int:
        got = self._sock.recv_into(self._piece)
        if got:
            self._incoming.write(self._piece[:got])
        else:
            self._incoming.write_eof()
        return got

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._sock.sendall(self._outgoing.read())


class _Raw(io.RawIOBase):
    """The connection as a raw stream."""

    def __init__(self, connection: TlsConnection) -> None:
        self._connection = connection

    def close(self) -> None:
        """Let the connection close, if it waits for that. Safe to call twice."""
        if not self.closed:
            super().close()
            self._connection.file_closed()

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io passes memoryviews
        """See `TlsConnection.readinto`."""
        return self._connection.readinto(memoryview(buffer))
