"""The pump: whatever was recorded before, in whatever order chunks come, it proves every byte and fetches no more than it must."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvcache.core.digest import Algorithm, Digest, git_blob_header
from nvcache.engine.pump import Pump
from nvcache.errors import Code, Interrupted, SourceError
from nvcache.store.files import aligned_buffer
from nvcache.store.ingest import Ingest
from nvcache.store.root import Root

CHUNK = 8192


class MemoryReader:
    """A reader over bytes in memory; `asked` counts offsets, `fail` makes one chunk fail, `block` makes one wait for an abort."""

    def __init__(
        self, data: bytes, asked: list[int], *, fail: int | None = None, block: int | None = None, jitter: random.Random | None = None
    ) -> None:
        self._data, self._asked, self._fail, self._block, self._jitter = data, asked, fail, block, jitter
        self._aborted = threading.Event()
        self.received = 0

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`."""
        if offset == self._block:
            assert self._aborted.wait(30), "nobody aborted the reader"
            raise Interrupted(Code.CANCELLED, "cannot fetch: aborted")
        if offset == self._fail:
            raise SourceError(Code.SOURCE_FAILED, "cannot fetch: told to fail")
        if self._jitter:
            self._aborted.wait(self._jitter.random() * 0.002)
        into[:] = self._data[offset : offset + len(into)]
        self.received += len(into)
        self._asked.append(offset)

    def abort(self) -> None:
        """End a read that waits."""
        self._aborted.set()

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A store."""
    return Root.open(tmp_path_factory.mktemp("pump") / "store")


def record(ingest: Ingest, data: bytes, index: int, *, right: bool) -> None:
    """Leave chunk `index` as an earlier run would have, or as a disk that lies would."""
    piece = data[index * CHUNK : (index + 1) * CHUNK]
    with aligned_buffer(CHUNK) as memory, memoryview(memory) as buffer:
        buffer[: len(piece)] = piece if right else bytes(byte ^ 1 for byte in piece)
        ingest.write(index, buffer, len(piece), xxhash.xxh3_64_intdigest(piece))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 12 * CHUNK + 5),
    lanes=st.integers(1, 5),
    earlier=st.dictionaries(st.integers(0, 12), st.booleans()),
    seed=st.integers(0, 2**32),
    algorithm=st.sampled_from([None, Algorithm.GIT_SHA1, Algorithm.MD5]),
)
def test_any_history_ends_in_the_right_digests(
    root: Root, size: int, lanes: int, earlier: dict[int, bool], seed: int, algorithm: Algorithm | None
) -> None:
    data = random.Random(seed).randbytes(size)
    ingest = Ingest.open(root.layout, f"k{seed}-{size}", size, chunk_size=CHUNK)
    earlier = {index: right for index, right in earlier.items() if index < ingest.count}
    for index, right in earlier.items():
        record(ingest, data, index, right=right)
    asked: list[int] = []
    pump = Pump(ingest, lambda: MemoryReader(data, asked, jitter=random.Random(seed)), lanes, also=algorithm)
    done = pump.run()
    assert done.sha256 == hashlib.sha256(data).hexdigest()
    also = {Algorithm.GIT_SHA1: hashlib.sha1(git_blob_header(size) + data), Algorithm.MD5: hashlib.md5(data)}
    assert done.also == (Digest(algorithm, also[algorithm].hexdigest()) if algorithm else None)
    assert done.chunks == b"".join(xxhash.xxh3_64_intdigest(data[at : at + CHUNK]).to_bytes(8, "little") for at in range(0, size, CHUNK))
    missing = {index * CHUNK for index in range(ingest.count) if not earlier.get(index)}
    assert sorted(asked) == sorted(missing), "each missing or wrong chunk is fetched once"
    assert done.fetched == sum(min(CHUNK, size - offset) for offset in missing)
    assert pump.progress() == (size, done.fetched)
    ingest.commit(done.sha256)
    assert root.layout.blob(done.sha256).read_bytes() == data


@pytest.mark.parametrize("failing", [0, 3, 7])
def test_a_failure_stops_the_other_lanes_and_is_what_is_raised(root: Root, failing: int) -> None:
    data = bytes(8 * CHUNK)
    ingest = Ingest.open(root.layout, f"fail-{failing}", len(data), chunk_size=CHUNK)
    blocked = (failing + 1) % 8 * CHUNK
    pump = Pump(ingest, lambda: MemoryReader(data, [], fail=failing * CHUNK, block=blocked), 3)
    with pytest.raises(SourceError) as failed:
        pump.run()
    assert failed.value.code is Code.SOURCE_FAILED
    ingest.close()


def test_stop_ends_a_run_that_waits(root: Root) -> None:
    data = bytes(4 * CHUNK)
    ingest = Ingest.open(root.layout, "stop", len(data), chunk_size=CHUNK)
    pump = Pump(ingest, lambda: MemoryReader(data, [], block=0), 2)
    stopper = threading.Timer(0.05, pump.stop)
    stopper.start()
    with pytest.raises(Interrupted):
        pump.run()
    stopper.join()
    kept = ingest.recorded()
    ingest.close()
    again = Ingest.open(root.layout, "stop", len(data), chunk_size=CHUNK)
    assert again.recorded() == kept
    again.close()


def test_a_pump_stopped_before_it_runs_does_nothing(root: Root, tmp_path: Path) -> None:
    ingest = Ingest.open(root.layout, "early", 3 * CHUNK, chunk_size=CHUNK)
    asked: list[int] = []
    pump = Pump(ingest, lambda: MemoryReader(bytes(3 * CHUNK), asked), 2)
    pump.stop()
    with pytest.raises(Interrupted):
        pump.run()
    assert asked == []
    ingest.close()
