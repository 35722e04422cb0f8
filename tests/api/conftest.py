"""Fixtures of the API's tests: a small model in a directory, settings, a running daemon."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvcache.settings import Settings, load
from tests.api.harness import Daemon

TOKEN = "correct-horse"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name: a Unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="nv-"))
    yield path
    shutil.rmtree(path)


def make_model(path: Path, *, fill: int = 0) -> Path:
    """A model's directory: one tensor, a config."""
    path.mkdir(parents=True)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes([fill]) * 1024)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "old.bin").write_bytes(b"left out")
    return path


@pytest.fixture
def model(place: Path) -> str:
    """The reference of a model in a directory."""
    return f"file://{make_model(place / 'origin' / 'tiny')}"


@pytest.fixture
def settings_of(place: Path) -> Callable[..., Settings]:
    """Makes settings for a daemon in `place`; keyword arguments are flags."""

    def make(**flags: object) -> Settings:
        defaults: dict[str, object] = {"store": place / "store", "socket": place / "s" / "nvcache.sock", "workers": 1, "lanes": 1, "resolve_ttl": 0.0}
        return load(flags=defaults | flags, environ={"HOME": str(place)})

    return make


@pytest.fixture
def daemon(settings_of: Callable[..., Settings]) -> Iterator[Daemon]:
    """A daemon with one socket: this test's user may do everything."""
    with Daemon(settings_of()) as running:
        yield running


@pytest.fixture
def guarded(settings_of: Callable[..., Settings], place: Path) -> Iterator[Daemon]:
    """A daemon with a pods' socket, an admin socket and a read-only TCP port; pods may warm what lies in `origin`."""
    (place / "token").write_text(TOKEN + "\n")
    settings = settings_of(
        admin_socket=place / "s" / "admin.sock",
        listen="127.0.0.1:0",
        listen_token_file=place / "token",
        allow=(f"file://{place}/origin/*",),
    )
    with Daemon(settings) as running:
        yield running
