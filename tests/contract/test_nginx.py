"""The shared reader against nginx as a CDN: URLs that expire while a file is read, throttling, and no token where none belongs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from nvcache.core.ref import parse_ref
from nvcache.sources.base import Reader
from nvcache.sources.huggingface import HuggingFace
from nvcache.sources.open import open_remote
from tests.contract.conftest import QUICK, TOKEN, Tools
from tests.support.nginx import NginxHub

REF = parse_ref("acme/m")
PIECE = 100_000


@contextmanager
def largest(hub: NginxHub, model: Path, tools: Tools) -> Iterator[tuple[Reader, bytes]]:
    """A reader of the largest file, and what it must read."""
    source = HuggingFace(hub.url, lambda: TOKEN, QUICK)
    resolved = source.resolve(REF)
    file = max(source.list(resolved), key=lambda file: file.size)
    with closing(open_remote(source.locate(resolved, file), QUICK, tools.throttle, tools.watchdog)()) as reader:
        yield reader, (model / file.path).read_bytes()


def read(reader: Reader, start: int, size: int) -> bytes:
    """One piece."""
    into = bytearray(size)
    reader.read(start, memoryview(into))
    return bytes(into)


def statuses(hub: NginxHub) -> list[int]:
    """What the CDN answered."""
    return [status for origin, status, _ in hub.requests() if origin == "cdn"]


def test_an_expired_url_is_replaced(model: Path, tmp_path: Path, tools: Tools) -> None:
    """Pieces of one file, until nginx has called its signed URL expired (410) and a fresh one has served."""
    with NginxHub({"acme/m": model}, tmp_path, url_life_s=1) as hub, largest(hub, model, tools) as (reader, content):
        deadline = time.monotonic() + 20
        pieces = 0
        while 410 not in statuses(hub) and time.monotonic() < deadline:
            start = pieces * PIECE % (len(content) - PIECE)
            assert read(reader, start, PIECE) == content[start : start + PIECE]
            pieces += 1
        assert read(reader, 1, PIECE) == content[1 : 1 + PIECE]
        found = statuses(hub)
    assert 410 in found
    assert found[-1] == 206


def test_throttling_is_waited_out(model: Path, tmp_path: Path, tools: Tools) -> None:
    """Two requests a second are allowed; what is refused with 429 and Retry-After comes in the end."""
    with NginxHub({"acme/m": model}, tmp_path, requests_per_s=2) as hub, largest(hub, model, tools) as (reader, content):
        for start in (0, PIECE, 2 * PIECE):
            assert read(reader, start, PIECE) == content[start : start + PIECE]
        found = statuses(hub)
    assert 429 in found
    assert found.count(206) == 3


@pytest.mark.parametrize("tls", [False, True])
def test_the_cdn_never_sees_the_token(model: Path, tmp_path: Path, tools: Tools, tls: bool) -> None:
    """nginx answers 400 to a CDN request with Authorization; a wrong signature would be 403."""
    with NginxHub({"acme/m": model}, tmp_path, tls=tls) as hub:
        transport = type(QUICK)(ca_file=str(hub.ca_file) if tls else None)
        source = HuggingFace(hub.url, lambda: TOKEN, transport)
        resolved = source.resolve(REF)
        for file in source.list(resolved):
            with closing(open_remote(source.locate(resolved, file), transport, tools.throttle, tools.watchdog)()) as reader:
                assert read(reader, 0, file.size) == (model / file.path).read_bytes()
        assert set(statuses(hub)) == {206}
