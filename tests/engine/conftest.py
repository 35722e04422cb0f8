"""An engine in this process over a real store, real worker processes and a Hub on loopback."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nvcache import settings
from nvcache.core.manifest import Selection
from nvcache.core.ref import parse_ref
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeLink, StripeState, StripeStatus
from nvcache.engine.status import EnsureRequest, JobStatus, ModelStatus
from nvcache.engine.stripefile import FollowedFile, StripeFiles
from tests.support.hub import HubServer
from tests.support.repo import Repo

T = TypeVar("T")
BOUND = 60  # seconds no step of a test may exceed


class Bed:
    """A place for engines over one store. `engine(**settings)` starts one and stops it."""

    def __init__(self, place: Path, hub: HubServer) -> None:
        self.place, self.hub, self.store = place, hub, place / "store"

    @asynccontextmanager
    async def engine(self, link: StripeLink | None = None, **given: Any) -> AsyncIterator[Engine]:
        """A running engine, following `link` if given; small timeouts, so that what goes wrong goes wrong quickly."""
        flags = {"workers": 1, "stall_timeout": 1.0, "fetch_deadline": 3.0, "connect_timeout": 1.0, "resolve_ttl": 0.0, **given}
        flags = {"store": self.store, "socket": self.place / "s.sock", "hf_endpoint": self.hub.url, **flags}
        engine = Engine(settings.load(flags=flags, environ={}, uid=1000), link)
        await engine.start()
        try:
            yield engine
        finally:
            async with asyncio.timeout(10):
                await engine.stop()

    def shown(self) -> dict[str, bytes]:
        """Every file any view shows, by its path below the store."""
        found = [*self.store.glob("models/*/*/**/*"), *self.store.glob("hub/models--*/snapshots/*/**/*")]
        return {str(path.relative_to(self.store)): path.read_bytes() for path in found if path.is_file()}


class DisksPart:
    """Plays the disks process: says in stripe.json what the stripe is, and looks for the answer. Each call that speaks returns the generation."""

    def __init__(self, place: Path) -> None:
        self.directory = place / "run" / "disks"
        self.files = StripeFiles(self.directory)
        self.link = FollowedFile(self.directory)
        self.generation = self.files.next_generation()

    def say(self, state: StripeStatus, code: str | None = None, reason: str = "", **more: Any) -> int:
        """Publish a state."""
        self.generation += 1
        self.files.publish(StripeState(self.generation, state, code, reason, **more))
        return self.generation

    def mounted(self, store: Path, fs_uuid: str, **details: object) -> int:
        """The stripe is there; `store` is made as formatting makes it."""
        for folder in ("models", "hub"):
            (store / folder).mkdir(parents=True, exist_ok=True)
        return self.say(StripeStatus.MOUNTED, reason="our stripe is mounted", fs_uuid=fs_uuid, store=str(store), details=details)

    async def acknowledged(self, seconds: float) -> float:
        """Wait for the answer to the last word; how long it took."""
        began = time.monotonic()
        assert await asyncio.to_thread(self.files.wait_acknowledged, self.generation, seconds), "the engine did not let go"
        return time.monotonic() - began


@pytest.fixture
def disks(tmp_path: Path) -> DisksPart:
    """The other side of a followed stripe."""
    return DisksPart(tmp_path)


@pytest.fixture
def bed(tmp_path: Path) -> Any:
    """A place with an empty Hub."""
    with HubServer({}) as hub:
        yield Bed(tmp_path, hub)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(BOUND):
            await work

    asyncio.run(bounded())


def wish(ref: str, **given: Any) -> EnsureRequest:
    """A request for `ref`."""
    selection = Selection(tuple(given.pop("include", ())), tuple(given.pop("exclude", ())))
    return EnsureRequest(parse_ref(ref), selection, **given)


async def end_of(engine: Engine, job: JobStatus | ModelStatus) -> JobStatus:
    """The job's last status."""
    assert isinstance(job, JobStatus), f"expected a job, got {job}"
    return await until(lambda: engine.job(job.id), lambda status: status.state.ended)


async def ready(engine: Engine, ref: str, **given: Any) -> ModelStatus:
    """Make `ref` ready and return it."""
    answer = await engine.ensure(wish(ref, **given))
    if isinstance(answer, JobStatus):
        ended = await end_of(engine, answer)
        assert ended.state == "done", ended.error
        return await engine.model(ended.entry or ref)
    return answer


async def until(look: Callable[[], T], good: Callable[[T], bool]) -> T:
    """Look again and again until it is good; the test's own bound ends it otherwise."""
    while not good(seen := look()):
        await asyncio.sleep(0.01)
    return seen


def weights(seed: int, size: int, *, name: str = "w") -> bytes:
    """A safetensors file with one U8 tensor of `size` bytes."""
    header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    block = bytes((seed + i * 7) % 251 for i in range(4096))
    return struct.pack("<Q", len(header)) + header + (block * (size // 4096 + 1))[:size]


def repo(files: Mapping[str, bytes] | None = None, **given: Any) -> Repo:
    """A small repository: one 40 MB file of weights in LFS, and a config."""
    return Repo(dict(files) if files is not None else {"model.safetensors": weights(1, 40_000_000), "config.json": b"{}"}, **given)
