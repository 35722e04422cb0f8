"""Reading a whole file as a worker does: some threads, each with a reader of its own, claiming chunks in ascending order. It writes nowhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from nvcache.sources.base import HttpRemote, Reader
from nvcache.sources.ranges import Pace, Throttle, Transport, Watchdog, http_readers
from tests.support.hub import HubServer

KIB = 1024
QUICK = {"connect_timeout": 2.0, "stall_timeout": 0.5, "deadline": 10.0}


def remote(hub: HubServer, path: str, size: int, *, repo: str = "acme/m", token: str | None = None, validator: str | None = None) -> HttpRemote:
    """The remote that the Hub source would give for a file of `repo`."""
    headers = (("Authorization", f"Bearer {token}"),) if token else ()
    url = f"{hub.url}/{repo}/resolve/{hub.repos[repo].commit}/{path}"
    return HttpRemote(url, size, headers, validator=validator, origin=hub.url, name=path)


class Lanes:
    """Readers of one remote and what goes with them in a worker process; a context manager that gives everything back."""

    def __init__(
        self, remote: HttpRemote, on_pause: Callable[[str, float], None] | None = None, *, pace: Pace | None = None, **transport: Any
    ) -> None:
        self.size = remote.size
        self.watchdog = Watchdog()
        self.throttle = Throttle(on_pause)
        self.make = http_readers(remote, Transport(**{**QUICK, **transport}), self.throttle, self.watchdog, pace)
        self._readers: list[Reader] = []

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.close()
        self.watchdog.close()

    def reader(self) -> Reader:
        """One more reader, closed at the end."""
        reader = self.make()
        self._readers.append(reader)
        return reader

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """One range by one new reader."""
        into = bytearray((self.size if stop is None else stop) - start)
        self.reader().read(start, memoryview(into))
        return bytes(into)

    def fetch(
        self, *, lanes: int = 4, chunk: int = 64 * KIB, order: Callable[[int], list[int]] | None = None, skip: frozenset[int] = frozenset()
    ) -> bytes:
        """The whole file by `lanes` threads; `order` permutes the chunk numbers, those in `skip` stay zero."""
        chunks = -(-self.size // chunk)
        claims = iter([number for number in (order(chunks) if order else range(chunks)) if number not in skip])
        lock, content = threading.Lock(), bytearray(self.size)
        view = memoryview(content)

        def lane() -> None:
            reader = self.reader()
            for _ in count():
                with lock:
                    number = next(claims, None)
                if number is None:
                    return
                reader.read(number * chunk, view[number * chunk : (number + 1) * chunk])

        with ThreadPoolExecutor(lanes) as pool:
            for future in [pool.submit(lane) for _ in range(lanes)]:
                future.result(60)
        return bytes(content)
