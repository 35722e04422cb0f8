"""A blob on its way to another node, under an engine whose disk goes, fails, or is withdrawn."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.engine import share
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeStatus
from nvcache.errors import Code, DiskError, RequestError
from tests.engine.conftest import Bed, DisksPart, end_of, ready, repo, run, until, weights
from tests.engine.test_keep import flip
from tests.engine.test_withdraw import gone, open_on
from tests.support.faults import Kind

DATA = weights(1, 20_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection; the first does not block."""
    one, other = socket.socketpair()
    one.setblocking(False)
    with one, other:
        yield one, other


def is_open() -> bool:
    """Whether this process has the blob open."""
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return any(target.endswith(f"/{SHA256}") for target in targets)


def test_a_stripe_that_goes_does_not_wait_for_a_slow_node(bed: Bed, disks: DisksPart, ends: tuple[socket.socket, socket.socket]) -> None:
    """The other side takes nothing; the store is let go in time all the same, and whoever sent is told why."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": DATA})

    async def test() -> None:
        async with bed.engine(disks.link) as engine:
            disks.mounted(bed.store, "uuid-a")
            await open_on(engine)
            await ready(engine, "acme/m")

            async def send() -> None:
                async with engine.share(SHA256) as blob:
                    await blob.send(ends[0].dup(), 0, blob.size)

            sending = asyncio.create_task(send())
            await until(is_open, bool)
            disks.say(StripeStatus.WITHDRAWING, "R01", "nvme1n1 vanished")
            await gone(engine, bed.store, disks)
            with pytest.raises(DiskError) as caught:
                await sending
            assert caught.value.code is Code.NO_STRIPE

    run(test())


def test_whose_failure_it_is(bed: Bed, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is told to whoever keeps the disks; a network that does is not."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": DATA})

    def failing(number: int) -> None:
        def sendfile(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(share.os, "sendfile", sendfile)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            for number, kind in ((errno.EIO, DiskError), (errno.EHOSTUNREACH, ConnectionError), (errno.EPIPE, ConnectionError)):
                failing(number)
                with pytest.raises(kind):
                    async with engine.share(SHA256) as blob:
                        await blob.send(ends[0].dup(), 0, blob.size)
            monkeypatch.undo()
            assert not is_open()

    run(test())


def test_a_withdrawn_model_shares_nothing(bed: Bed) -> None:
    """One of its files went bad: the others are as good as before, and wait with it."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": DATA, "other.safetensors": weights(2, 100_000)})

    async def test() -> None:
        async with bed.engine() as engine:
            status = await ready(engine, "acme/m")
            bed.hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*", method="*")
            flip(Path(status.path or "") / "other.safetensors", 50_000)
            await end_of(engine, await engine.verify(status.entry))
            with pytest.raises(RequestError) as caught:
                async with engine.share(SHA256):
                    pass
            assert caught.value.code is Code.UNKNOWN_BLOB

    run(test())


def test_a_file_that_got_shorter_is_no_end_of_it(bed: Bed, ends: tuple[socket.socket, socket.socket]) -> None:
    """Somebody cut it behind our back: the answer breaks off, it does not wait for ever."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": DATA})

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            async with engine.share(SHA256) as blob:
                next(bed.store.glob(f"blobs/sha256/*/{SHA256}")).chmod(0o644)
                os.truncate(next(bed.store.glob(f"blobs/sha256/*/{SHA256}")), 1000)
                with pytest.raises(DiskError, match="shorter"):
                    await blob.send(ends[0].dup(), 0, blob.size)

    run(test())


def test_who_takes_crumbs_takes_nothing(bed: Bed, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each crumb in time, and a thread would be his for days."""
    bed.hub.repos["acme/m"] = repo({"model.safetensors": DATA})
    monkeypatch.setattr(share, "STALL_S", 0.0)
    monkeypatch.setattr(share, "PIECE", 1000)

    async def send(engine: Engine) -> None:
        async with engine.share(SHA256) as blob:
            await blob.send(ends[0].dup(), 0, 5000)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            with pytest.raises(ConnectionError, match="too little"):
                await send(engine)
            assert len(ends[1].recv(10_000)) == 1000
            monkeypatch.setattr(share, "LEAST", 1000)
            await send(engine)
            assert len(ends[1].recv(10_000)) == 5000

    run(test())
