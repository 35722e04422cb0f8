"""The metrics of a real daemon, by what was done with it: what operators watch moves when it should, and by how much."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nvcache import client
from tests.api.harness import UnixConnection, ask
from tests.engine.conftest import repo, weights
from tests.support.daemon import DaemonProcess
from tests.support.faults import Kind
from tests.support.hub import HubServer

FILES = {"model.safetensors": weights(1, 3_000_000), "config.json": b"{}"}
SIZE = sum(map(len, FILES.values()))


class Metrics:
    """What a scrape says, and what changed since the one before."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._before = self.now()

    def now(self) -> dict[str, float]:
        """Every sample, by its name with its labels."""
        text = ask(UnixConnection(self._daemon.socket), "GET", "/metrics").data.decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value for sample in samples}

    def grown(self) -> dict[str, float]:
        """Counters that grew since the last call, and by how much."""
        now, before = self.now(), self._before
        self._before = now
        counters = {name: value for name, value in now.items() if "_total" in name.partition(" ")[0] or name.startswith("nvcache_fill_seconds_count")}
        return {name: value - before.get(name, 0.0) for name, value in counters.items() if value != before.get(name, 0.0)}


@contextmanager
def running() -> Iterator[tuple[HubServer, DaemonProcess]]:
    with (
        HubServer({"acme/m": repo(FILES)}) as hub,
        tempfile.TemporaryDirectory(prefix="nv-") as place,
        DaemonProcess(Path(place), hub.url, workers=1, max_bytes="100MB") as daemon,
    ):
        yield hub, daemon


def test_what_is_done_is_counted() -> None:
    with running() as (hub, daemon):
        metrics = Metrics(daemon)
        assert metrics.now()["nvcache_model_bytes state=ready"] == 0
        hub.faults.add("model.safetensors", Kind.BUSY, times=1, seconds=0)
        assert daemon.cli("warm", "acme/m").returncode == 0
        grown = metrics.grown()
        assert grown.pop("nvcache_fetched_bytes_total") == grown.pop("nvcache_source_bytes_total source=hf") == SIZE
        assert grown.pop("nvcache_throttled_seconds_total", 0.0) >= 0
        assert grown == {
            "nvcache_misses_total": 1,
            "nvcache_fills_total": 1,
            "nvcache_fill_seconds_count": 1,
            "nvcache_source_errors_total code=source-busy source=hf": 1,
        }
        now = metrics.now()
        assert (now["nvcache_model_bytes state=ready"], now["nvcache_models state=ready"]) == (SIZE, 1)
        assert now["nvcache_store_used_bytes"] >= SIZE
        assert now["nvcache_store_reserved_bytes"] == 0
        took = now["nvcache_fill_seconds_sum"]
        assert took > 0
        within = {bound: now[f"nvcache_fill_seconds_bucket le={bound:.1f}"] for bound in (1, 2.5, 10, 3600)}
        assert within == {bound: float(took <= bound) for bound in within}
        assert now["nvcache_fill_seconds_bucket le=+Inf"] == 1

        assert daemon.cli("warm", "acme/m").returncode == 0
        assert metrics.grown() == {"nvcache_hits_total": 1}

        with client.Client(f"unix://{daemon.socket}").lease("acme/m", holder="the-test"):
            assert metrics.now()["nvcache_leases"] == 1
            assert metrics.grown().get("nvcache_leases_taken_total") == 1
        assert metrics.now()["nvcache_leases"] == 0

        shown = json.loads(daemon.cli("show", "acme/m", "--json").stdout)
        with (Path(shown["path"]) / "model.safetensors").open("rb+") as file:
            file.seek(1_000_000)
            file.write(b"\xff\x00\xff")
        assert daemon.cli("verify", "acme/m").returncode == 0
        grown = metrics.grown()
        repaired = {name: grown.get(f"nvcache_{name}_total") for name in ("verify_failures", "repairs", "repaired_chunks")}
        assert repaired == {"verify_failures": 1, "repairs": 1, "repaired_chunks": 1}
        assert metrics.now()["nvcache_store_quarantined_bytes"] > 0

        assert daemon.cli("warm", "acme/gone").returncode != 0
        grown = metrics.grown()
        assert grown["nvcache_fill_failures_total code=repository-not-found"] == 1
        assert grown["nvcache_source_errors_total code=repository-not-found source=hf"] == 1

        assert daemon.cli("evict", "--need", "98MB").returncode == 0
        grown = metrics.grown()
        assert grown["nvcache_evictions_total"] == 1
        assert grown["nvcache_evicted_bytes_total"] >= SIZE
        assert metrics.now()["nvcache_models state=ready"] == 0
