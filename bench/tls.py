"""What reading bulk over TLS costs in processor time: `ssl.SSLSocket` against `nvcache.sources.tls`, both under `http.client`. Nothing is written.

``python -m bench.tls`` serves one file by nginx over TLS on loopback and reads it in ranges of 16 MiB, in turn, with one and with four threads.
"""

from __future__ import annotations

import argparse
import http.client
import json
import mmap
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.fill import RESULTS, WORK
from bench.machine import describe
from bench.measure import ratios, rotated, spread
from nvcache.sources.tls import TlsConnection
from tests.support.nginx import NginxHub

CHUNK = 16 * 2**20
SIZE = 512 * 2**20
Connect = Callable[[str, int, ssl.SSLContext], http.client.HTTPConnection]


def with_sslsocket(host: str, port: int, context: ssl.SSLContext) -> http.client.HTTPConnection:
    """The standard library's own."""
    return http.client.HTTPSConnection(host, port, context=context)


def with_memory_bio(host: str, port: int, context: ssl.SSLContext) -> http.client.HTTPConnection:
    """As `sources.line` does it."""
    tls = TlsConnection(socket.create_connection((host, port)), context, host)
    tls.do_handshake()
    connection = http.client.HTTPConnection(host, port)
    connection.sock = tls
    return connection


WAYS: dict[str, Connect] = {"ssl.SSLSocket": with_sslsocket, "nvcache": with_memory_bio}


def read(way: Connect, url: str, context: ssl.SSLContext, threads: int) -> dict[str, float]:
    """Read the file once with `threads` threads; wall and processor seconds a gigabyte, of this process only."""
    parts = urlsplit(url)

    def lane(first: int) -> None:
        connection, view = way(parts.hostname or "", parts.port or 443, context), memoryview(mmap.mmap(-1, CHUNK))
        for offset in range(first * CHUNK, SIZE, threads * CHUNK):
            connection.request("GET", f"{parts.path}?{parts.query}", headers={"Range": f"bytes={offset}-{offset + CHUNK - 1}"})
            response, got = connection.getresponse(), 0
            while got < CHUNK and (more := response.readinto(view[got : got + 4 * 2**20])):
                got += more
            if got != CHUNK:
                raise ConnectionError(f"cannot read the range at {offset}: {got} bytes came")
            response.read()
        connection.close()

    began, cpu = time.monotonic(), time.process_time()
    lanes = [threading.Thread(target=lane, args=(number,)) for number in range(threads)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()
    return {"wall": (time.monotonic() - began) / (SIZE / 1e9), "cpu": (time.process_time() - cpu) / (SIZE / 1e9)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tls", description="Processor time of reading over TLS, two ways.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    work = WORK / "tls"
    (work / "repo").mkdir(parents=True, exist_ok=True)
    with (work / "repo" / "model.safetensors").open("wb") as file:
        for _ in range(SIZE // 2**24):
            file.write(os.urandom(2**24))
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    with NginxHub({"bench/tls": work / "repo"}, work / "nginx", tls=True) as hub:
        context = ssl.create_default_context(cafile=str(hub.ca_file))
        origin = urlsplit(hub.url)
        asking = http.client.HTTPSConnection(origin.hostname or "", origin.port, context=context)
        asking.request("GET", f"/bench/tls/resolve/{hub.commits['bench/tls']}/model.safetensors")
        url = asking.getresponse().headers["Location"]
        asking.close()
        for number in range(args.rounds):
            for threads in (1, 4):
                for name in rotated(list(WAYS), number):
                    runs.setdefault((name, threads), []).append(read(WAYS[name], url, context, threads))
    rows: list[dict[str, Any]] = []
    for (name, threads), found in runs.items():
        cpu = [run["cpu"] for run in found]
        base = [run["cpu"] for run in runs["ssl.SSLSocket", threads]]
        wall = [run["wall"] for run in found]
        rows.append({"way": name, "threads": threads, "cpu": spread(cpu), "wall": spread(wall), "ratio": ratios(cpu, base)})
    result = {"rounds": args.rounds, "bytes": SIZE, "rows": rows, "machine": describe(WORK)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tls.json").write_text(json.dumps(result, indent=1) + "\n")
    from bench.report import tls_table

    tls_table(result).show()


if __name__ == "__main__":
    main()
