"""Runs the daemon: sockets, engine, uvicorn, signals, and their end in reverse. What the engine does is not its business.

The first SIGTERM or SIGINT stops gracefully and the process exits 0 within `EXIT_SECONDS`, whatever a request, a fill or a thread is stuck in; the
second one exits at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
from asyncio import TimerHandle
from collections.abc import Callable, Coroutine, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from nvcache import __version__
from nvcache.api.app import create_app
from nvcache.api.limits import ABORT
from nvcache.api.routes.blobs import HAND_OVER
from nvcache.api.scope import PEER, Peer
from nvcache.api.sockets import Listener, listen_tcp, listen_unix
from nvcache.engine.blocking import owned
from nvcache.engine.engine import Engine
from nvcache.engine.links import stripe_link
from nvcache.engine.otel import spans_from_environment
from nvcache.engine.reload import Reloader
from nvcache.errors import Code, ConfigError
from nvcache.settings import Given, Settings

EXIT_SECONDS = 9.0
ENGINE_STOP_SECONDS = 5.0
BESIDE_STOP_SECONDS = 1.0
SETTLE_SECONDS = 5.0  # after the start, when also what is loaded in the background is there
GRACE_SECONDS = 2  # for requests in flight; `limits` ends them after one
HEAD_SECONDS = 10.0
HEAD_BYTES = 32 * 1024
KEEP_ALIVE_SECONDS = 30
CONNECTIONS = 1024  # by one socket, and by TCP, at most
DESCRIPTORS = 65536  # as many as this process allows itself where it may: shells and container runtimes often begin with 1024

Beside = Callable[[Engine], Coroutine[Any, Any, None]]
log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, which besides knows its peer and bounds a request's head.

    uvicorn copies `app_state` into the `state` of every request's scope; giving each connection its own is how the peer's credentials, taken from the
    transport's socket, reach the application.
    """

    _head: TimerHandle | None = None
    _head_bytes = 0
    came_by: str | None = None  # the Unix socket, None for TCP
    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ask the kernel once who is there."""
        super().connection_made(transport)
        peer = Peer.of(transport.get_extra_info("socket"))
        self.app_state = {**self.app_state, PEER: peer, ABORT: transport.abort}
        self.came_by, self.since = peer.path, self.loop.time()
        self._make_room()
        self._await_head()

    def _make_room(self) -> None:
        """Drop the oldest of too many that came the same way: descriptors are for the store and for the other ways first."""
        if len(self.connections) <= _most_connections():
            return  # nor can they be too many one way
        same = [
            each for each in self.connections if isinstance(each, Connection) and each.came_by == self.came_by and not each.transport.is_closing()
        ]
        if len(same) > _most_connections():
            min(same, key=lambda each: each.since).transport.abort()

    async def _hand_over(self, cycle: RequestResponseCycle, write: Callable[[socket.socket], Coroutine[Any, Any, None]], count: int) -> None:
        """Let `write` put the `count` bytes of an answer's body on the wire by itself, by a duplicate of the socket that it closes.

        It begins when all that was written before is sent, and nothing else is written until it ends. Raises `ConnectionError` when nobody is there.
        """
        self.transport.set_write_buffer_limits(0)  # writing is paused as long as anything waits
        await self.flow.drain()
        if self.transport.is_closing():
            raise ConnectionAbortedError("the caller is gone")
        await write(self.transport.get_extra_info("socket").dup())
        self.transport.set_write_buffer_limits()
        cycle.expected_content_length -= count

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._got_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins: its head must be complete soon."""
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete; from here `limits` bounds the request."""
        self._got_head()
        super().on_headers_complete()
        if getattr(self.cycle, "scope", None) is self.scope:  # else it is no request that is answered
            self.scope["state"][HAND_OVER] = partial(self._hand_over, self.cycle)

    def _await_head(self) -> None:
        self._got_head()
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _got_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _count(self, length: int) -> None:
        self._head_bytes += length
        if self._head_bytes > HEAD_BYTES:
            raise ValueError("the request's head is too large")  # the parser wraps it, uvicorn answers 400 and closes


def _most_connections() -> int:
    """How many may come one way, a socket or TCP: an eighth of the descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else min(CONNECTIONS, soft // 8)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handling, since `_Signals` decides when to stop; `ready` is called once it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


class _Signals:
    """SIGTERM and SIGINT as an event, with the process's end guaranteed by a timer that no stuck thread or loop can hold up.

    SIGHUP is another where there is a file to read again; elsewhere it does what it does to any process.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, again: bool = False) -> None:
        self.stop, self.again = asyncio.Event(), asyncio.Event()
        if again:
            signal.signal(signal.SIGHUP, lambda _number, _frame: loop.call_soon_threadsafe(self.again.set))
        self._asked_before = False
        self._loop = loop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        if self._asked_before:
            os._exit(128 + number)
        self._asked_before = True
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, EXIT_SECONDS)
        self._loop.call_soon_threadsafe(self.stop.set)


def _give_up(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"nvcache: something did not stop in time; exiting anyway, the store is safe to reopen\n")
    os._exit(0)


def run(settings: Settings, given: Given | None = None, beside: Beside | None = None) -> int:
    """Serve until told to stop, then return exit code 0. For the main thread of a process of its own.

    The file of `given`, if it has one, is followed; `beside` is run while the engine lives. Serving does not depend on either.
    Raises `ConfigError` when the sockets or a store in a directory cannot be had; anything else that is wrong is told by /readyz.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    asyncio.run(_serve(settings, given if given is not None and given.followed else None, beside))
    return 0


async def _serve(settings: Settings, given: Given | None, beside: Beside | None) -> None:
    signals = _Signals(asyncio.get_running_loop(), again=given is not None)
    with ExitStack() as stack:
        listeners = _listen(settings, stack)
        async with stripe_link(settings) as link:
            spans = spans_from_environment(settings.node_name)
            engine = Engine(settings, link, spans)
            await engine.start()
            company = [owned(beside(engine), "beside")] if beside is not None else []
            if given is not None:
                company.append(owned(Reloader(engine, given, signals.again).run(), "reload"))
            try:
                app = create_app(engine)
                company.append(owned(_settle_down(), "settle-down"))
                await answer(app, listeners, signals.stop, lambda: _announce(engine, listeners))
            finally:
                stack.close()  # nobody new finds us while the engine stops
                for task in company:  # before the engine: nobody must take an engine that stops for one that lost everything
                    task.cancel()
                if company:
                    await asyncio.wait(company, timeout=BESIDE_STOP_SECONDS)
                await _stop(engine)
                if spans is not None:
                    await spans.close()


async def _settle_down() -> None:
    """Once what a daemon needs is loaded, take it out of what is looked through for garbage, which held answers up for a tenth of a second."""
    await asyncio.sleep(SETTLE_SECONDS)
    gc.collect()
    gc.freeze()


async def answer(app: FastAPI, listeners: list[Listener], stop: asyncio.Event, ready: Callable[[], None]) -> None:
    """Answer on `listeners` until `stop` is set, then end what is in flight; that takes at most about `GRACE_SECONDS`. `ready` is called once."""
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config, ready)
    serving = asyncio.create_task(server.serve([listener.sock for listener in listeners]), name="api-server")
    asked = asyncio.create_task(stop.wait(), name="api-stop")
    await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping: %s", "told to" if stop.is_set() else "the server ended by itself")
    asked.cancel()
    app.state.lifecycle.stop()
    server.should_exit = True
    await serving


def _listen(settings: Settings, stack: ExitStack) -> list[Listener]:
    listeners: list[Listener] = []

    def keep(listener: Listener) -> None:
        listeners.append(listener)
        stack.callback(listener.remove)

    keep(listen_unix(settings.socket, 0o660))
    if settings.admin_socket:
        keep(listen_unix(settings.admin_socket, 0o600))
    if settings.listen:
        if settings.listen_scope != "metrics":
            _check_token(settings.listen_token_file)
        keep(listen_tcp(settings.listen))
    return listeners


def _check_token(path: Path | None) -> None:
    """A daemon that listens on TCP but can let nobody in is a mistake worth telling at once."""
    try:
        if path is not None and path.read_text().strip():
            return
        why = "it holds no token"
    except (OSError, UnicodeDecodeError) as error:
        why = str(error)
    raise ConfigError(Code.BAD_CONFIG, f"cannot use setting listen_token_file {path}: {why}")


def _announce(engine: Engine, listeners: list[Listener]) -> None:
    """One line on stdout for whoever waits for it, the addresses in the log."""
    for listener in listeners:
        log.info("listening on %s", listener.url)
    count, problems = len(engine.models()), engine.problems()
    store = f"no store yet: {'; '.join(problems)}" if problems else f"store {engine.settings.store} ({count} model{'' if count == 1 else 's'})"
    where = ", ".join(listener.url for listener in listeners if listener.path != engine.settings.admin_socket or listener.path is None)
    print(f"nvcache {__version__} ready on {where}; {store}", flush=True)  # noqa: T201 - the interface scripts wait for


async def _stop(engine: Engine) -> None:
    try:
        async with asyncio.timeout(ENGINE_STOP_SECONDS):
            await engine.stop()
    except TimeoutError:
        log.warning("the engine did not stop in time; its fills resume at the next start")
