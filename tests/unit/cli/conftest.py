"""Runs the command line in this process against a scripted daemon."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvcache.__main__ import main
from tests.support.stub_daemon import StubDaemon

REVISION = "0123456789abcdef0123456789abcdef01234567"
ENTRY = f"hf--org--name@{REVISION}"


@dataclass
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDaemon]:
    """A scripted daemon that commands find through NVCACHE_SOCKET; its path is short, as Unix sockets need it."""
    for name in ("NVCACHE_URL", "NVCACHE_TOKEN_FILE", "NVCACHE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="nvc-") as place, StubDaemon(Path(place) / "s.sock") as daemon:
        monkeypatch.setenv("NVCACHE_SOCKET", str(daemon.socket))
        yield daemon


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `nvcache ARGS…` and returns its exit code and what it printed."""

    def command(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return Ran(int(code), out, err)

    return command


def model(**changed: Any) -> dict[str, Any]:
    """A ready model as the API gives it."""
    base = {
        "entry": ENTRY,
        "ref": f"hf://org/name@{REVISION}",
        "revision": REVISION,
        "state": "ready",
        "path": f"/store/models/hf--org--name/{REVISION}",
        "hub_cache": "/store/hub",
        "hub_id": "org/name",
        "files": 7,
        "bytes": 90_900_000,
        "pinned": False,
        "leases": 0,
        "in_use": False,
        "verified_at": "2025-01-02T03:04:05Z",
        "checked_at": None,
        "last_used": None,
        "warnings": [],
        "unproven": 0,
        "progress": None,
        "job": None,
        "error": None,
        "fetched_bytes": 0,
        "seconds": 0.0,
        "note": None,
    }
    assert changed.keys() <= base.keys()
    return {**base, **changed}


def job(state: str = "fetching", done: int = 0, **changed: Any) -> dict[str, Any]:
    """A job as the API gives it."""
    progress = {"bytes_total": 100_000_000, "bytes_done": done, "bytes_fetched": done, "files_total": 7, "files_done": 0, "rate": 5e6, "eta_s": 12.0}
    base = {
        "id": "j1",
        "kind": "fill",
        "ref": "hf://org/name",
        "entry": ENTRY,
        "state": state,
        "created_at": "2025-01-02T03:04:05.000Z",
        "ended_at": None,
        "progress": progress,
        "error": None,
        "seconds": 1.0,
        "repaired_chunks": 0,
        "bad_files": [],
        "cached_before": None,
        "cached_after": None,
        "note": None,
    }
    assert changed.keys() <= base.keys()
    return {**base, **changed}
