"""What the loopback servers in this process share: a thread each, a thread a connection, connections that can be dropped. It answers nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.tls import Tls


class LoopbackServer(ThreadingHTTPServer):
    """A server between `start` and `stop`, which closes its connections and joins all of its threads. It listens as soon as it is made."""

    daemon_threads = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], tls: Tls | None) -> None:
        self.accepted = 0  # connections, ever
        self._context = tls.context() if tls else None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._thread: threading.Thread | None = None
        super().__init__(address, handler)

    def start(self, name: str) -> None:
        """Serve, in a thread of this name."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name=name)
        self._thread.start()

    def stop(self) -> None:
        """Serve no more."""
        self.shutdown()
        self.drop_connections()
        self.server_close()
        if self._thread is not None:
            self._thread.join(10)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = self.socket.accept()
        self.accepted += 1
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context:  # the handshake happens at the first read, in the connection's own thread
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Close every open connection, as a restart would."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # the peer was faster
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no error
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def reset(connection: socket.socket) -> None:
    """Close a connection so that the peer sees a reset, not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
