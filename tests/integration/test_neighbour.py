"""Two real daemons: one has a model, the other takes its bytes from it by SHA-256 and spares the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.api.harness import UnixConnection, ask
from tests.engine.conftest import repo, weights
from tests.support.daemon import DaemonProcess
from tests.support.faults import Kind
from tests.support.hub import HubServer

FILE = "model.safetensors"
SIZE = 120_000_000


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name, with a token."""
    path = Path(tempfile.mkdtemp(prefix="nv-"))
    (path / "token").write_text("between-us\n")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with one model."""
    with HubServer({"acme/m": repo({FILE: weights(1, SIZE), "config.json": b"{}"})}) as serving:
        yield serving


def sharing(place: Path, hub: HubServer) -> DaemonProcess:
    """The one that has it. Its TCP port is in its ready line."""
    home = place / "a"
    home.mkdir()
    return DaemonProcess(home, hub.url, listen="127.0.0.1:0", listen_token_file=place / "token", share_blobs="true", workers=1)


def config(place: Path, home: Path, near: DaemonProcess) -> Path:
    """A file that names `near` as mirror."""
    found = re.search(r"http://127\.0\.0\.1:\d+", near.ready_line)
    assert found, near.ready_line
    path = home / "nvcache.toml"
    path.write_text(f'[[mirrors]]\nname = "near"\nurl = "{found[0]}/v1/blobs/{{sha256}}"\ntoken_file = "{place}/token"\n')
    return path


@contextmanager
def borrowing(place: Path, hub: HubServer, near: DaemonProcess) -> Iterator[DaemonProcess]:
    """One that asks `near` first, which is up already."""
    home = _home(place)
    with DaemonProcess(home, hub.url, "--config", str(config(place, home, near)), workers=1) as daemon:
        yield daemon


def content(daemon: DaemonProcess) -> bytes:
    """The weights, as a pod of that node sees them."""
    shown = json.loads(daemon.cli("show", "acme/m", "--json").stdout)
    return (Path(shown["path"]) / FILE).read_bytes()


def lent(daemon: DaemonProcess) -> int:
    """Bytes that came from the neighbour, by the metric."""
    text = ask(UnixConnection(daemon.socket), "GET", "/metrics").data.decode()
    found = re.search(r'^nvcache_mirror_bytes_total\{mirror="near"\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def original(hub: HubServer) -> bytes:
    """The weights, as the Hub has them."""
    source = hub.repos["acme/m"]
    data = source.commits[source.commit][FILE].source
    assert isinstance(data, bytes)
    return data


def warm(daemon: DaemonProcess) -> None:
    """Make the model ready."""
    done = daemon.cli("warm", "acme/m")
    assert done.returncode == 0, f"{done.stderr}\n{daemon.last_words()}"


def test_a_model_comes_from_the_neighbour(place: Path, hub: HubServer) -> None:
    """Every byte of the weights goes from daemon to daemon; the Hub gives the listing and what has no published SHA-256."""
    with sharing(place, hub) as near, borrowing(place, hub, near) as far:
        warm(near)
        sent = hub.bytes_sent(FILE)
        warm(far)
        assert hub.bytes_sent(FILE) == sent
        assert content(far) == original(hub)
        assert lent(far) == len(original(hub))


def test_a_neighbour_that_lacks_it_or_refuses_is_no_worse_than_none(place: Path, hub: HubServer) -> None:
    with sharing(place, hub) as near, borrowing(place, hub, near) as far:
        warm(far)
        assert lent(far) == 0
        assert content(far) == original(hub)
        assert "left alone" not in far.last_words(None)
        far.cli("rm", "acme/m")
        os.truncate(place / "token", 0)
        warm(far)
        assert "mirror near is left alone" in far.last_words(None), "it has no token to show"


def test_a_neighbour_that_dies_half_way(place: Path, hub: HubServer) -> None:
    """What it had given is kept, the rest comes from the Hub."""
    with sharing(place, hub) as near, borrowing(place, hub, near) as far:
        warm(near)
        sent = hub.bytes_sent(FILE)
        far.cli("warm", "acme/m", "--no-wait")
        until = threading.Event()
        while lent_or_running(far) < 16 * 2**20:
            assert not until.wait(0.002)
        near.kill()
        warm(far)
        assert content(far) == original(hub)
        assert hub.bytes_sent(FILE) - sent <= len(original(hub))


def lent_or_running(daemon: DaemonProcess) -> int:
    """Bytes of the weights that are there, or were when the fill ended."""
    jobs = ask(UnixConnection(daemon.socket), "GET", "/v1/jobs").json["jobs"]
    return max((job["progress"]["bytes_done"] for job in jobs), default=0)


def test_with_the_hub_down_a_planned_fill_ends_by_the_neighbour(place: Path, hub: HubServer) -> None:
    """The far node was stopped in the middle of a fill and finds no Hub when it comes back; nobody asks it for anything."""
    with sharing(place, hub) as near:
        warm(near)
        far = DaemonProcess(_home(place), hub.url, workers=1, lanes=1)
        slow = hub.faults.add(FILE, Kind.TRICKLE, times=None, after=2**20, seconds=0.02)
        with far:
            far.cli("warm", "acme/m", "--no-wait")
            until = threading.Event()
            while not slow.hits:
                assert not until.wait(0.01)
        hub.faults.clear()
        sent = hub.bytes_sent(FILE)
        hub.faults.add("*", Kind.STATUS, status=503, times=None, origin="*", method="*")
        far.flags = ("--config", str(config(place, far.place, near)))
        with far:
            far.wait_for_log("filled")
            assert content(far) == original(hub)
            assert lent(far) > 0
        assert hub.bytes_sent(FILE) == sent < len(original(hub)) * 2


def _home(place: Path) -> Path:
    home = place / "b"
    home.mkdir()
    return home
