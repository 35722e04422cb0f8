"""What a real daemon and its workers log: one JSON object a line, with the model and the job that it is about."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.conftest import repo, weights
from tests.support.daemon import DaemonProcess
from tests.support.faults import Kind
from tests.support.hub import HubServer

FILES = {"model.safetensors": weights(1, 3_000_000), "config.json": b"{}"}
OTHERS = {"model.safetensors": weights(2, 3_000_000), "config.json": b"{}"}


def test_every_line_is_json_and_names_model_and_job() -> None:
    repos = {"acme/m": repo(FILES), "acme/o": repo(OTHERS)}
    with HubServer(repos) as hub, tempfile.TemporaryDirectory(prefix="nv-") as place:
        with DaemonProcess(Path(place), hub.url, workers=1, log_format="json", log_level="debug") as daemon:
            hub.faults.add("model.safetensors", Kind.FLIP, after=1000, times=1)  # the engine tries again
            assert daemon.cli("warm", "acme/m").returncode == 0
            hub.faults.add("model.safetensors", Kind.BUSY, times=1, seconds=0)  # a worker does
            assert daemon.cli("warm", "acme/o").returncode == 0
            assert daemon.cli("warm", "acme/gone").returncode != 0
            daemon.wait_for_log("of hf://acme/gone failed")
        lines: list[dict[str, Any]] = [json.loads(line) for line in daemon.last_words(None).splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)

    def one(words: str) -> dict[str, Any]:
        found = [line for line in lines if words in line["message"]]
        assert found, f"nobody says {words!r}: {[line['message'] for line in lines]}"
        return found[0]

    filled, again, waits, failed = one("filled:"), one("trying model.safetensors again"), one("trying again in"), one("failed:")
    assert filled["model"].startswith("hf--acme--m@")
    assert (again["model"], again["code"], again["job"]) == ("hf--acme--m", "digest-mismatch", filled["job"])
    assert (waits["logger"], waits["model"]) == ("nvcache.sources.ranges", "hf--acme--o")
    assert waits["job"] not in (None, filled["job"])
    assert (failed["model"], failed["code"], failed["level"]) == ("hf--acme--gone", "repository-not-found", "error")
    assert failed["job"] not in (filled["job"], waits["job"])
