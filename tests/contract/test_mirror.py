"""Mirrors against what every reader of bytes promises, and what is promised of mirrors alone: the first failure is the last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from nvcache.core.plan import RemoteFile
from nvcache.core.ref import parse_ref
from nvcache.errors import Code, IntegrityError, Interrupted, SourceError
from nvcache.sources.base import Reader
from nvcache.sources.http import Transport
from nvcache.sources.mirrors import Mirror, impatient
from nvcache.sources.open import open_remote
from nvcache.sources.ranges import Throttle, Watchdog
from tests.support.faults import Kind
from tests.support.mirror import MirrorServer
from tests.support.repo import Repo

REF = parse_ref(f"hf://acme/m@{'c' * 40}")
PATIENT = Transport(connect_timeout=1.0, stall_timeout=1.0, deadline=600.0)
CONTENT = os.urandom(9_000_001)


@pytest.fixture
def mirror() -> Iterator[MirrorServer]:
    """A mirror with one file."""
    with MirrorServer({"acme/m": Repo({"w.safetensors": CONTENT})}) as serving:
        yield serving


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watching = Watchdog()
    yield watching
    watching.close()


@pytest.fixture(params=["by_digest", "by_name"])
def reader(request: pytest.FixtureRequest, mirror: MirrorServer, watchdog: Watchdog) -> Iterator[Reader]:
    """A reader as the worker makes it."""
    file = RemoteFile("w.safetensors", len(CONTENT), "t")
    sha256 = next(blob.sha256 for blob in mirror.repos["acme/m"].commits[mirror.repos["acme/m"].commit].values())
    assert sha256
    remote = Mirror("near", getattr(mirror, request.param)).locate(REF, file, sha256)
    made = open_remote(remote, impatient(PATIENT), Throttle(), watchdog)()
    yield made
    made.close()


def read(reader: Reader, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    with memoryview(buffer) as view:
        reader.read(start, view)
    return bytes(buffer)


def test_bytes_are_right_at_odd_offsets(reader: Reader) -> None:
    size = len(CONTENT)
    for start, stop in [(0, size), (1, 8), (size - 1, size), (size // 3 | 1, size - 2), (5, 5)]:
        assert read(reader, start, stop) == CONTENT[start:stop], (start, stop)


def test_an_aborted_reader_reads_no_more(reader: Reader) -> None:
    reader.abort()
    with pytest.raises(Interrupted):
        read(reader, 0, 10)
    reader.close()


def test_a_stalled_read_ends_at_once_when_it_is_aborted(mirror: MirrorServer, reader: Reader) -> None:
    mirror.faults.add("*", Kind.STALL, after=0)
    aborting = threading.Timer(0.2, reader.abort)
    aborting.start()
    with pytest.raises((Interrupted, SourceError)):
        read(reader, 0, 10)
    aborting.join()


@pytest.mark.parametrize(
    ("kind", "options", "code"),
    [
        (Kind.STATUS, {"status": 500}, Code.SOURCE_FAILED),
        (Kind.STATUS, {"status": 404}, Code.FILE_NOT_FOUND),
        (Kind.STATUS, {"status": 403}, Code.SOURCE_FORBIDDEN),
        (Kind.THROTTLE, {"seconds": 1}, Code.SOURCE_BUSY),
        (Kind.RESET, {"after": 5_000_000}, Code.SOURCE_UNREACHABLE),
        (Kind.TRUNCATE, {"after": 5_000_000}, Code.SOURCE_UNREACHABLE),
        (Kind.STALL, {"after": 5_000_000}, Code.SOURCE_STALLED),
        (Kind.STALL, {"after": 5_000_000, "whole": True}, Code.SOURCE_STALLED),
        (Kind.TRICKLE, {"after": 60_000, "seconds": 0.1}, Code.SOURCE_STALLED),
        (Kind.WRONG_START, {}, Code.SOURCE_PROTOCOL),
        (Kind.MULTIPART, {}, Code.SOURCE_PROTOCOL),
    ],
)
def test_the_first_failure_is_the_last(mirror: MirrorServer, reader: Reader, kind: Kind, options: dict[str, object], code: Code) -> None:
    """One request: what a source is asked again for, however patient the operator is with sources, a mirror is not."""
    mirror.faults.add("*", kind, times=None, **options)
    with pytest.raises(SourceError) as caught:
        read(reader, 0, len(CONTENT))
    assert caught.value.code is code, caught.value
    assert len(mirror.requests) == 1


def test_crumbs_are_a_failure(mirror: MirrorServer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 206 may bring less than was asked for; who gives a byte at a time is asked once."""
    serve = MirrorServer.find

    def crumb(self: MirrorServer, path: str) -> object:
        self.requests[-1].headers["range"] = "bytes=0-0"
        return serve(self, path)

    monkeypatch.setattr(MirrorServer, "find", crumb)
    with pytest.raises(SourceError, match="1 bytes came of 9000001") as caught:
        read(reader, 0, len(CONTENT))
    assert caught.value.code is Code.SOURCE_PROTOCOL
    assert len(mirror.requests) == 1


def test_it_leads_nowhere_else(mirror: MirrorServer, reader: Reader) -> None:
    """Not even to another port of the same host: an answer must not make the node ask where the operator did not allow."""
    with MirrorServer(mirror.repos) as other:
        mirror.faults.add("*", Kind.STATUS, status=307, headers={"Location": f"{other.url}/files/acme/m/w.safetensors"})
        with pytest.raises(SourceError, match="redirects elsewhere"):
            read(reader, 0, 10)
        assert other.requests == []


def test_within_itself_it_may_redirect(mirror: MirrorServer, reader: Reader) -> None:
    mirror.faults.add("*", Kind.STATUS, status=307, headers={"Location": "/files/acme/m/w.safetensors"})
    assert read(reader, 3, 1000) == CONTENT[3:1000]


def test_another_size_is_another_file(mirror: MirrorServer, reader: Reader) -> None:
    mirror.faults.add("*", Kind.WRONG_TOTAL, times=None)
    with pytest.raises(IntegrityError) as caught:
        read(reader, 0, 10)
    assert caught.value.code is Code.SIZE_MISMATCH
