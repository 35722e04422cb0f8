"""Runs the API in a thread on real sockets, over the real engine or an application of a test's own, and asks it. It fakes nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import FastAPI

from nvcache.api.app import create_app
from nvcache.api.serve import answer
from nvcache.api.sockets import Listener, listen_tcp, listen_unix
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeLink
from nvcache.settings import Settings

WAIT = 20.0
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.data)

    @property
    def code(self) -> str:
        """The code of a problem; fails for anything else."""
        assert self.headers["content-type"] == "application/problem+json", self
        document = self.json
        assert document["status"] == self.status
        assert document["type"] == f"urn:nvcache:error:{document['code']}"
        assert document["detail"].startswith("cannot "), document
        assert document["hint"]
        assert document["title"]
        return str(document["code"])


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path | str) -> None:
        super().__init__("test", timeout=WAIT)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(WAIT)
        self.sock.connect(self.path)


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
    """One request; `body` is sent as JSON, or as it is when it is bytes."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
    try:
        connection.request(method, path, data, sent)
        with connection.getresponse() as response:
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


@dataclass
class Hosted:
    """An application on a Unix socket, in a thread with a loop of its own, under the daemon's own server."""

    socket: Path
    build: Callable[[], Awaitable[FastAPI]]
    finish: Callable[[], Awaitable[None]] | None = None
    more: Callable[[], list[Listener]] = field(default=list)
    listeners: list[Listener] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="api-under-test")
        self._thread.start()
        assert self._ready.wait(WAIT), "the server did not start"
        if self._error is not None:
            self._thread.join(WAIT)
            raise self._error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the server did not stop"

    def ask(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask on the first socket."""
        return ask(UnixConnection(self.socket), method, path, body, headers)

    def call(self, coroutine: Awaitable[T]) -> T:
        """Await something on the server's loop."""

        async def run() -> T:
            return await coroutine

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(WAIT)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self._error = error
        self._ready.set()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        app = await self.build()
        self.listeners = [listen_unix(self.socket, 0o660), *self.more()]
        try:
            await answer(app, self.listeners, self.stop, self._ready.set)
        finally:
            for listener in self.listeners:
                listener.remove()
            if self.finish:
                await self.finish()


class Daemon(Hosted):
    """The whole daemon but for its signals: the real engine over `settings`, on every socket they name, following `link` if given."""

    def __init__(self, settings: Settings, link: StripeLink | None = None) -> None:
        super().__init__(settings.socket, self._start, self._end, self._more)
        self.settings = settings
        self.link = link

    async def _start(self) -> FastAPI:
        self.engine = Engine(self.settings, self.link)
        await self.engine.start()
        self.app = create_app(self.engine)
        return self.app

    async def _end(self) -> None:
        await self.engine.stop()

    def _more(self) -> list[Listener]:
        extra = [listen_unix(self.settings.admin_socket, 0o600)] if self.settings.admin_socket else []
        return [*extra, *([listen_tcp(self.settings.listen)] if self.settings.listen else [])]

    def admin(self, method: str, path: str, body: object = None) -> Answer:
        """Ask on the admin socket."""
        assert self.settings.admin_socket
        return ask(UnixConnection(self.settings.admin_socket), method, path, body)

    def tcp(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask over TCP."""
        host, port = self.listeners[-1].sock.getsockname()[:2]
        return ask(http.client.HTTPConnection(host, port, timeout=WAIT), method, path, body, headers)

    def ready(self, ref: str, **wish: object) -> dict[str, Any]:
        """Make `ref` ready through the API and return the model."""
        job = self.ask("POST", "/v1/models", {"ref": ref, **wish})
        if job.status == 202:
            entry = self._follow(job.json["job"]["id"])
            return dict(self.ask("GET", f"/v1/models/{entry}").json)
        assert job.status == 200, job
        return dict(job.json)

    def _follow(self, job: str) -> str:
        """Wait for a job's end on the engine's loop."""

        async def until_ended() -> str:
            async with asyncio.timeout(WAIT):
                while not (status := self.engine.job(job)).state.ended:
                    await asyncio.sleep(0.02)
            assert status.error is None, status.error
            assert status.entry is not None
            return status.entry

        return self.call(until_ended())
