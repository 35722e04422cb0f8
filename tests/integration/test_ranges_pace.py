"""The bandwidth limit at work: readers of one source share it, it may change under them, and waiting for it is no stall and heeds an abort."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.ranges import Pace
from tests.support.hub import HubServer, Kind, Repo
from tests.support.lanes import KIB, Lanes, remote

WEIGHTS = os.urandom(1024 * KIB)
SIZE = len(WEIGHTS)
WAIT_S = 20


@pytest.fixture(scope="module")
def server():
    with HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS})}) as hub:
        yield hub


@pytest.mark.parametrize("lanes", [1, 4])
def test_all_readers_together_keep_the_pace(hub, lanes):
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=Pace(2 * SIZE)) as readers:
        began = time.monotonic()
        assert readers.fetch(lanes=lanes) == WEIGHTS
        took = time.monotonic() - began
    assert 0.2 < took < 1.9  # half a second but for what a span makes up for


def test_files_of_one_source_share_the_pace(hub):
    pace = Pace(4 * SIZE)
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=pace) as first, Lanes(remote(hub, "m.safetensors", SIZE), pace=pace) as second:
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            assert [done.result(WAIT_S) for done in [pool.submit(lanes.fetch) for lanes in (first, second)]] == [WEIGHTS, WEIGHTS]
        assert time.monotonic() - began > 0.2


def test_a_stream_keeps_the_pace_as_well(hub):
    hub.faults.add("*", Kind.CHUNKED, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=Pace(2 * SIZE)) as readers:
        began = time.monotonic()
        assert readers.fetch(lanes=4) == WEIGHTS
        assert time.monotonic() - began > 0.2


def test_waiting_for_the_pace_is_no_stall(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=Pace(8 * KIB), stall_timeout=0.2) as lanes:
        assert lanes.read(0, 16 * KIB) == WEIGHTS[: 16 * KIB]  # in pieces of 4 KiB, each half a second after the other
    assert len(hub.seen("m.safetensors", origin="cdn")) == 1


def test_a_stall_under_a_pace_is_still_cut(hub):
    hub.faults.add("*", Kind.STALL, after=100 * KIB)
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=Pace(2 * SIZE), stall_timeout=0.3) as lanes:
        assert lanes.read() == WEIGHTS
    assert len(hub.seen("m.safetensors", origin="cdn")) == 2


def under_way(lanes):
    """A reader that waits for its turn, its thread, and where its error will be."""
    reader, raised = lanes.reader(), []

    def work():
        try:
            reader.read(0, memoryview(bytearray(SIZE)))
        except (SourceError, Interrupted) as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    limit = time.monotonic() + WAIT_S
    while not reader.received and time.monotonic() < limit:
        thread.join(0.01)
    return reader, thread, raised


def test_a_new_pace_counts_for_a_body_under_way(hub):
    pace = Pace(4 * KIB)  # which would take minutes
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=pace) as lanes:
        reader, thread, raised = under_way(lanes)
        pace.set(None)
        thread.join(5)
        assert not thread.is_alive()
        assert (reader.received, raised) == (SIZE, [])


def test_an_abort_of_who_waits_for_the_pace(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=Pace(100)) as lanes:
        reader, thread, raised = under_way(lanes)
        began = time.monotonic()
        reader.abort()
        thread.join(5)
        assert time.monotonic() - began < 4
    assert isinstance(raised[0], Interrupted)


def test_who_is_aborted_gives_its_turn_to_the_others(hub):
    pace = Pace(8 * KIB)
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=pace) as lanes:
        waiting = [under_way(lanes) for _ in range(3)]
        for reader, thread, _ in waiting:
            reader.abort()
            thread.join(5)
        _, turn = pace.book(1)
    assert pace.wait(turn) < 0.6  # the three had booked half a second each


def test_a_pace_that_lets_nothing_through_until_the_deadline_is_named(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE), pace=Pace(50), deadline=0.5) as lanes, pytest.raises(SourceError) as caught:
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_BUSY, True)
    assert "bandwidth limit (50 bytes/s) let nothing through in 0.5 s" in str(caught.value)
