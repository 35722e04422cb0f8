"""A crowd of clients of one daemon, each a process of its own, as pods are. It says how long every answer took and judges nothing.

`python -m bench.crowd CROWD RESULTS` (`Crowd` as JSON, a new file) forks the clients, each of which connects; then it says "ready" and waits for a
line. From then on every client asks `rate` times a second for `seconds`, at times of its own or all of them at the same moments. Each leaves a line
in RESULTS: its samples and its errors, as JSON.

A client asks over a connection that it keeps, what `MIX` says; leases it takes and gives back with `nvcache.client`, which opens a connection for
each request.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from bench.connection import UnixConnection
from nvcache.client import Client, Problem

MIX = {"resolve": 12, "show": 3, "ready": 2, "ls": 2, "lease": 1}  # of 20 questions; a lease is taken and given back: two answers
LEAD = 0.5  # seconds from the word to the first question: until then every process has woken up
T = TypeVar("T")
MOMENT = struct.Struct("d")  # unix seconds


@dataclass(frozen=True)
class Crowd:
    """Who asks what: each of `clients` asks `rate` times a second for `seconds`; `together`: all at the same moments."""

    socket: str
    ref: str
    entry: str
    clients: int
    rate: float
    seconds: float
    together: bool


class Asker:
    """One client. `samples` are (kind, sent at in unix seconds, seconds to the whole answer, seconds since it was due)."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self._crowd = crowd
        self._kept = UnixConnection(Path(crowd.socket))
        self._client = Client(f"unix://{crowd.socket}")
        self._dice = random.Random(number)
        one = f"/v1/models?ref={quote(crowd.ref, safe='')}"
        self._paths = {"resolve": one, "show": f"/v1/models/{crowd.entry}", "ready": "/readyz", "ls": "/v1/models"}
        self.samples: list[tuple[str, float, float, float]] = []
        self.errors: list[str] = []

    def live(self, begin: float) -> None:
        """Ask on schedule, from `begin` (unix seconds) on."""
        crowd = self._crowd
        due = begin if crowd.together else begin + self._dice.random() / crowd.rate
        with closing(self._kept):
            while due < begin + crowd.seconds:
                time.sleep(max(0.0, due - time.time()))
                (kind,) = self._dice.choices(list(MIX), list(MIX.values()))
                try:
                    self._ask(kind, due)
                except (OSError, ValueError, http.client.HTTPException, Problem) as error:
                    self.errors.append(f"{kind}: {type(error).__name__}: {error}")
                    self._kept.close()
                due += 1 / crowd.rate

    def connect(self) -> None:
        """Open the connection that is kept, and ask everything once: what a new process does for the first time is no matter of the daemon's."""
        self._kept.connect()
        for path in self._paths.values():
            self._get(path)
        with self._client.lease_of(self._crowd.entry):
            pass

    def _ask(self, kind: str, due: float) -> None:
        if kind != "lease":
            answer = self._timed(kind, due, lambda: self._get(self._paths[kind]))
            if kind in ("resolve", "show") and b'"state":"ready"' not in answer:
                raise ValueError(f"it says {answer[:200]!r}")
            return
        lease = self._client.lease_of(self._crowd.entry)
        self._timed("lease", due, lease.take)
        self._timed("release", time.time(), lease.release)

    def _timed(self, kind: str, due: float, call: Callable[[], T]) -> T:
        at, began = time.time(), time.perf_counter()
        answer = call()
        took = time.perf_counter() - began
        self.samples.append((kind, at, took, at - due + took))
        return answer

    def _get(self, path: str) -> bytes:
        self._kept.request("GET", path)
        answer = self._kept.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ValueError(f"{path}: {answer.status} {body[:200]!r}")
        return body


def run(crowd: Crowd, results: Path) -> None:
    """Fork the clients, have them begin at the same moment, and wait for them."""
    gc.collect()
    gc.disable()  # a collection in a client would be counted as the daemon's time
    gc.freeze()  # the clients share these pages
    there, said = os.pipe()
    word, given = os.pipe()
    for number in range(crowd.clients):
        if not os.fork():
            asker = Asker(crowd, number)
            asker.connect()
            os.write(said, b".")
            asker.live(*MOMENT.unpack(os.read(word, MOMENT.size)))
            with results.open("ab", buffering=0) as file:
                file.write(json.dumps([asker.samples, asker.errors]).encode() + b"\n")  # in one piece: O_APPEND keeps lines apart
            os._exit(0)
    for _ in range(crowd.clients):
        os.read(there, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    os.write(given, MOMENT.pack(time.time() + LEAD) * crowd.clients)
    for _ in range(crowd.clients):
        os.wait()


if __name__ == "__main__":
    run(Crowd(**json.loads(sys.argv[1])), Path(sys.argv[2]))
