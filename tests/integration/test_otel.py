"""Traces of a real daemon at a real collector: what they tell, what they never tell, and that a bad collector costs traces and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache import client
from tests.engine.conftest import repo, weights
from tests.support.daemon import DaemonProcess
from tests.support.faults import Kind
from tests.support.hub import HubServer
from tests.support.otlp import Collector, Told

TOKEN = "hf_" + "s3cr3t" * 6
KEY = "the-collectors-own-key"
FILES = {"a.safetensors": weights(1, 3_000_000), "b.safetensors": weights(2, 2_000_000), "config.json": b"{}"}


@pytest.fixture
def place() -> Iterator[Path]:
    """A short one."""
    path = Path(tempfile.mkdtemp(prefix="nv-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with one model, that another is missing from."""
    with HubServer({"acme/m": repo(FILES)}) as serving:
        yield serving


def tracing(place: Path, hub: HubServer, url: str, **variables: str) -> DaemonProcess:
    """A daemon that is told of a collector as OpenTelemetry has it."""
    daemon = DaemonProcess(place, hub.url, workers=1)
    daemon.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "50", **variables}
    return daemon


def children(spans: list[Told], parent: Told) -> dict[str, list[Told]]:
    found: dict[str, list[Told]] = {}
    for span in spans:
        if span.parent == parent.id:
            found.setdefault(span.name, []).append(span)
    return found


def test_a_fill_is_one_trace_phase_by_phase_and_file_by_file(place: Path, hub: HubServer) -> None:
    hub.faults.add("a.safetensors", Kind.RESET, after=1000, times=1)
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": f"x-key={KEY}", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=tests", "HF_TOKEN": TOKEN}
    with Collector() as collector, tracing(place, hub, collector.url, **headers) as daemon:
        assert daemon.cli("warm", "acme/m").returncode == 0
        assert daemon.cli("warm", "acme/m").returncode == 0, "a hit, which is no trace"
        with client.Client(f"unix://{daemon.socket}").lease("acme/m", holder="the-test"):
            pass
        assert daemon.cli("warm", "acme/gone").returncode != 0
        spans = collector.wait_for("fill", 2)
        spans = collector.wait_for("lease")

        good, bad = (span for span in spans if span.name == "fill")
        assert (good.parent, good.failed) == (b"", None)
        assert good.facts["nvcache.model"].startswith("hf--acme--m@")
        assert (good.facts["nvcache.outcome"], good.facts["nvcache.bytes"]) == ("ready", sum(map(len, FILES.values())))
        assert good.facts["nvcache.job"]
        assert {"asked", "retried"} <= {name for name, _ in good.moments}
        assert dict(good.moments)["retried"]["error.type"] == "source-unreachable"
        phases = children(spans, good)
        assert {"resolve", "list", "fetch", "publish"} <= phases.keys()
        (fetch,) = phases["fetch"]
        files = children(spans, fetch)["fetch file"]
        assert {span.facts["nvcache.what"]: span.facts["nvcache.bytes"] for span in files} == {name: len(data) for name, data in FILES.items()}
        assert {span.facts["nvcache.source"] for span in files} == {hub.url}
        assert all(fetch.start <= span.start <= span.end <= fetch.end for span in files)
        assert all(span.trace == good.trace for each in phases.values() for span in [*each, *files])
        assert all(span.start <= span.end for span in spans)

        assert bad.facts["error.type"] == "repository-not-found"
        assert "acme/gone" in (bad.failed or "")
        assert bad.trace != good.trace
        (lease,) = (span for span in spans if span.name == "lease")
        assert (lease.facts["nvcache.outcome"], "the-test" in lease.facts["nvcache.who"]) == ("released", True)
        assert lease.facts["nvcache.model"] == good.facts["nvcache.model"]

        service = good.service
        assert (service["service.name"], service["deployment.environment"]) == ("nvcache", "tests")
        assert service["service.version"]
        assert {headers.get("x-key") for headers in collector.headers} == {KEY}
        assert not [body for body in collector.bodies if TOKEN.encode() in body or KEY.encode() in body]
    assert TOKEN not in daemon.last_words(None)


def test_what_is_queued_is_sent_when_the_daemon_stops(place: Path, hub: HubServer) -> None:
    with Collector() as collector:
        with tracing(place, hub, collector.url, OTEL_BSP_SCHEDULE_DELAY="3600000", OTEL_SERVICE_NAME="mine") as daemon:
            assert daemon.cli("warm", "acme/m").returncode == 0
            assert not collector.asked.is_set()
        (fill,) = (span for span in collector.wait_for("fill") if span.name == "fill")
        assert fill.service["service.name"] == "mine"


def test_a_collector_that_never_answers_holds_up_no_fill_and_no_end(place: Path, hub: HubServer) -> None:
    with Collector(silent=True) as collector:
        with tracing(place, hub, collector.url) as daemon:
            assert daemon.cli("warm", "acme/m").returncode == 0
            assert collector.asked.wait(30)
            hub.repos["acme/n"] = repo({"config.json": b'{"n": 1}'})
            assert daemon.cli("warm", "acme/n").returncode == 0
        assert "the last traces are lost" in daemon.last_words(None)  # and it ended by itself, with exit code 0


def test_without_the_extra_it_works_and_says_what_is_missing(place: Path, hub: HubServer) -> None:
    (place / "sitecustomize.py").write_text('import sys\nsys.modules["opentelemetry.sdk"] = None\n')  # as an import finds it that is not installed
    with tracing(place, hub, "http://127.0.0.1:9", PYTHONPATH=str(place)) as daemon:
        assert daemon.cli("warm", "acme/m").returncode == 0
    assert "pip install 'nvcache[otel]'" in daemon.last_words(None)
