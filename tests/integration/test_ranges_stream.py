"""Servers that ignore Range: the one body is shared, so that a file is fetched about once however many lanes read it."""

import random

import pytest

from nvcache.errors import Code, IntegrityError, Interrupted, SourceError
from tests.support.hub import HubServer, Kind, Repo
from tests.support.lanes import KIB, Lanes, remote

WEIGHTS = random.Random(4).randbytes(3 * 1024 * KIB + 5)
SIZE = len(WEIGHTS)
CHUNKS = -(-SIZE // (64 * KIB))


@pytest.fixture(scope="module")
def server():
    with HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS})}) as hub:
        yield hub


@pytest.mark.parametrize("kind", [Kind.CHUNKED, Kind.IGNORE_RANGE])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_the_file_is_fetched_once_by_any_number_of_lanes(hub, kind, lanes):
    hub.faults.add("*", kind, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        assert readers.fetch(lanes=lanes) == WEIGHTS
    assert len(hub.seen("m.safetensors", origin="cdn")) == 1
    assert hub.bytes_sent() == SIZE


def test_a_resume_reads_through_the_holes_of_one_body(hub):
    hub.faults.add("*", Kind.CHUNKED, times=None)
    there = frozenset(range(CHUNKS)) - {3, 4, 20, 41}
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        got = readers.fetch(skip=there)
    for number in (3, 4, 20, 41):
        assert got[number * 64 * KIB : (number + 1) * 64 * KIB] == WEIGHTS[number * 64 * KIB : (number + 1) * 64 * KIB]
    assert len(hub.seen("m.safetensors", origin="cdn")) == 1


@pytest.mark.parametrize("order", ["backwards", "strided"])
def test_no_order_of_claims_is_a_deadlock(hub, order):
    orders = {"backwards": lambda n: list(range(n))[::-1], "strided": lambda n: [i for start in range(4) for i in range(start, n, 4)]}
    hub.faults.add("*", Kind.IGNORE_RANGE, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        assert readers.fetch(lanes=4, chunk=1024 * KIB, order=orders[order]) == WEIGHTS
    assert hub.bytes_sent() <= 4 * SIZE


@pytest.mark.parametrize("kind", [Kind.TRUNCATE, Kind.RESET, Kind.STALL])
def test_a_stream_that_breaks_is_opened_again_and_read_through(hub, kind):
    broken = hub.faults.add("*", kind, after=1_000_000, whole=True)
    hub.faults.add("*", Kind.CHUNKED, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        assert readers.fetch() == WEIGHTS
    assert broken.hits == 1
    assert len(hub.seen("m.safetensors", origin="cdn")) == 2


def test_a_stream_that_always_breaks_at_the_same_byte_ends_at_the_deadline(hub):
    hub.faults.add("*", Kind.TRUNCATE, after=1_000_000, whole=True, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE), deadline=1.5) as readers, pytest.raises(SourceError) as caught:
        readers.fetch()
    assert caught.value.code is Code.SOURCE_UNREACHABLE


def test_after_a_stream_ranges_get_another_chance(hub):
    hub.faults.add("*", Kind.IGNORE_RANGE)
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        assert readers.fetch() == WEIGHTS
        assert readers.read(SIZE - 10) == WEIGHTS[-10:]
    assert [request.status for request in hub.seen("m.safetensors", origin="cdn")] == [200, 206]


def test_one_whole_file_from_a_server_that_honours_ranges_is_a_slip(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        reader, into = readers.reader(), memoryview(bytearray(10))
        reader.read(0, into)
        hub.faults.add("*", Kind.IGNORE_RANGE)
        reader.read(SIZE - 10, into)
        assert bytes(into) == WEIGHTS[-10:]
    assert [request.status for request in hub.seen("m.safetensors", origin="cdn")] == [206, 200, 206]


def test_a_server_that_stops_honouring_ranges_is_streamed_from(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        reader, into = readers.reader(), memoryview(bytearray(10))
        reader.read(0, into)
        hub.faults.add("*", Kind.IGNORE_RANGE, times=None)
        reader.read(SIZE - 10, into)
        assert bytes(into) == WEIGHTS[-10:]


@pytest.mark.parametrize("lie", [SIZE + 1, SIZE + 10 * KIB])
def test_a_chunked_body_that_ends_early_is_another_file(hub, lie):
    hub.faults.add("*", Kind.CHUNKED, times=None)
    with Lanes(remote(hub, "m.safetensors", lie)) as readers, pytest.raises(IntegrityError, match=f"has {SIZE:,}") as caught:
        readers.fetch()
    assert caught.value.code is Code.SIZE_MISMATCH


def test_a_chunked_pointer_is_named(hub):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
    hub.repos["acme/p"] = Repo({"m.safetensors": pointer})
    hub.faults.add("*", Kind.CHUNKED, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE, repo="acme/p")) as readers, pytest.raises(IntegrityError) as caught:
        readers.fetch(lanes=2)
    assert caught.value.code is Code.POINTER_FILE


def test_a_stream_that_always_stalls_is_given_up_by_all_lanes(hub):
    hub.faults.add("*", Kind.STALL, after=1000, whole=True, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE), stall_timeout=0.3, deadline=1.0) as readers, pytest.raises(SourceError) as caught:
        readers.fetch()
    assert caught.value.code is Code.SOURCE_STALLED


def test_an_abort_of_one_lane_does_not_stop_the_others(hub):
    hub.faults.add("*", Kind.IGNORE_RANGE, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE)) as readers:
        first = readers.reader()
        first.read(0, memoryview(bytearray(64 * KIB)))
        first.abort()
        assert readers.read(64 * KIB) == WEIGHTS[64 * KIB :]
        with pytest.raises(Interrupted):
            first.read(0, memoryview(bytearray(1)))
