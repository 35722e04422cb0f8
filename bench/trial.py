"""The least that fetches, hashes and writes: what this machine can do. It resumes nothing, retries nothing and survives nothing.

``python -m bench.trial LIST`` where each line of LIST is a URL, a target path and the SHA-256 to expect: a process a core, two range requests
in flight for each file, SHA-256 in order, O_DIRECT writes from page-aligned buffers. Exits 1 when a digest differs.
"""

from __future__ import annotations

import hashlib
import http.client
import mmap
import os
import ssl
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

CHUNK = 16 * 2**20
LANES = 2
BLOCK = 4096


def connect(url: str) -> http.client.HTTPConnection:
    """A connection to the origin of `url`; https trusts SSL_CERT_FILE."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.netloc, timeout=60, context=ssl.create_default_context())
    return http.client.HTTPConnection(parts.netloc, timeout=60)


def locate(url: str) -> tuple[str, int]:
    """Follow at most one redirect; the final URL and the file's size."""
    for _ in range(2):
        connection = connect(url)
        connection.request("GET", url[url.index("/", 8) :], headers={"Range": "bytes=0-0"})
        response = connection.getresponse()
        connection.close()
        if response.status == 206:
            return url, int(response.headers["Content-Range"].rpartition("/")[2])
        url = response.headers["Location"]
    raise ConnectionError(f"cannot fetch {urlsplit(url).path}: it answered {response.status}")


def fetch(url: str, path: str) -> str:
    """Fetch one file to `path`; its SHA-256 in hex."""
    url, size = locate(url)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
    os.posix_fallocate(file, 0, size)
    digest, turn, hashed = hashlib.sha256(), threading.Condition(), [0]

    def lane(first: int) -> None:
        connection, buffer = connect(url), memoryview(mmap.mmap(-1, CHUNK))
        for offset in range(first * CHUNK, size, LANES * CHUNK):
            length = min(CHUNK, size - offset)
            connection.request("GET", url[url.index("/", 8) :], headers={"Range": f"bytes={offset}-{offset + length - 1}"})
            response, got = connection.getresponse(), 0
            while got < length and (more := response.readinto(buffer[got:length])):
                got += more
            response.read()
            os.pwrite(file, buffer[: -(-length // BLOCK) * BLOCK], offset)
            with turn:
                turn.wait_for(lambda: hashed[0] == offset, 60)  # noqa: B023 - called before the loop goes on
            digest.update(buffer[:length])
            with turn:
                hashed[0] += length
                turn.notify_all()

    with ThreadPoolExecutor(LANES) as lanes:
        list(lanes.map(lane, range(LANES)))
    os.ftruncate(file, size)
    os.fsync(file)
    return digest.hexdigest()


if __name__ == "__main__":
    wanted = [line.split() for line in Path(sys.argv[1]).read_text().splitlines()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        got = pool.map(fetch, [row[0] for row in wanted], [row[1] for row in wanted])
        sys.exit(int([row[2] for row in wanted] != list(got)))
