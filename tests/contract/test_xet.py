"""Reading Xet storage with the real hf_xet, from a storage in a folder that hf_xet itself filled; no network."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.base import Reader, XetRemote
from nvcache.sources.http import Transport
from nvcache.sources.open import open_remote
from nvcache.sources.ranges import Throttle, Watchdog

SIZE = 5_000_011
QUICK = Transport(connect_timeout=1.0, stall_timeout=2.0, deadline=3.0)
CONTENT = os.urandom(SIZE)
SECRET = "xetSecretNeverToBePrinted"


@pytest.fixture(scope="module", autouse=True)
def _no_litter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """hf_xet's working files go where the tests' own files go."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_XET_CACHE", str(tmp_path_factory.mktemp("xet")))
        yield


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> XetRemote:
    """A file in a `local://` storage, put there by hf_xet."""
    import hf_xet  # opens its log at once, in HF_XET_CACHE

    place = f"local://{tmp_path_factory.mktemp('cas')}"
    commit = hf_xet.XetSession().new_upload_commit(endpoint=place)
    commit.start_upload_bytes(CONTENT, name="model.safetensors")
    (upload,) = commit.wait_to_finish().uploads.values()
    info = upload.xet_info
    return XetRemote(info.hash, info.file_size, endpoint=place, name="model.safetensors")


def readers(remote: XetRemote) -> Callable[[], Reader]:
    """As a worker opens them."""
    return open_remote(remote, QUICK, Throttle(), Watchdog())


def read(reader: Reader, start: int, stop: int) -> bytes:
    """One range."""
    into = bytearray(stop - start)
    reader.read(start, memoryview(into))
    return bytes(into)


def test_bytes_are_right_at_odd_offsets(remote: XetRemote) -> None:
    """The whole file and pieces of it, forwards and backwards, by one reader."""
    reader = readers(remote)()
    for start, stop in [(0, SIZE), (1, 8), (SIZE - 1, SIZE), (1_234_567, 4_000_001), (5, 5)]:
        assert read(reader, start, stop) == CONTENT[start:stop]
    reader.close()
    reader.close()


def test_lanes_read_at_once(remote: XetRemote) -> None:
    """Readers of one factory in four threads."""
    make = readers(remote)

    def lane(number: int) -> list[bool]:
        with closing(make()) as reader:
            starts = range(number * 100_000, SIZE, 400_000)
            return [read(reader, start, min(SIZE, start + 100_000)) == CONTENT[start : start + 100_000] for start in starts]

    with ThreadPoolExecutor(4) as pool:
        assert all(right for lane_right in pool.map(lane, range(4)) for right in lane_right)


def test_what_the_storage_does_not_have(remote: XetRemote) -> None:
    """A hash it never saw is an error, not an empty file."""
    unknown = XetRemote("0" * 64, 100, endpoint=remote.endpoint, name="gone.safetensors")
    with pytest.raises(SourceError, match=r"gone\.safetensors"):
        read(readers(unknown)(), 0, 100)


def test_a_storage_that_is_not_there() -> None:
    """Bounded, retryable, without the token in any text."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    away = XetRemote("a" * 64, 100, endpoint=url, token=SECRET, token_expiry=int(time.time()) + 600, name="w")
    began = time.monotonic()
    with pytest.raises(SourceError) as caught:
        read(readers(away)(), 0, 100)
    assert caught.value.code in (Code.SOURCE_UNREACHABLE, Code.SOURCE_FAILED)  # hf_xet now and then ends the stream without a reason
    assert caught.value.retryable
    assert SECRET not in f"{caught.value!r} {away!r}"
    assert time.monotonic() - began < 15


def test_abort_ends_a_read_that_waits() -> None:
    """A storage that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        silent = XetRemote("a" * 64, 100, endpoint=url, token=SECRET, token_expiry=int(time.time()) + 600, name="w")
        reader = readers(silent)()
        outcome: list[BaseException] = []

        def wait() -> None:
            try:
                read(reader, 0, 100)
            except (Interrupted, SourceError) as error:
                outcome.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        server.settimeout(10)
        with server.accept()[0]:  # the request is on its way
            reader.abort()
            thread.join(5)
    assert not thread.is_alive()
    assert [type(error) for error in outcome] == [Interrupted]
