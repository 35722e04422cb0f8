"""Fixtures of the page's tests: one browser for all of them, a scripted node, the bridge to it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from nvcache.cli.bridge import Bridge
from tests.support import page_node
from tests.support.browser import WAIT_MS, Tab, chromium, tab
from tests.support.stub_daemon import StubDaemon


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name: a Unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="nv-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="package")  # not the session's: while it runs, playwright's event loop does, and no test of ours could run its own
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with chromium() as running:
        yield running


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, each with no cookies; they are closed at the end."""
    with ExitStack() as stack:

        def opened(**options: Any) -> Tab:
            return stack.enter_context(tab(browser, **options))

        yield opened


@pytest.fixture
def stub(place: Path) -> Iterator[StubDaemon]:
    """A scripted daemon that tells of a node with something in every state."""
    with StubDaemon(place / "stub.sock") as daemon:
        page_node.tell(daemon)
        yield daemon


@pytest.fixture
def bridge(stub: StubDaemon) -> Iterator[Bridge]:
    """The way from a browser to it."""
    with Bridge(f"unix://{stub.socket}") as running:
        yield running
