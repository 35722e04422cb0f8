"""The engine's counts and gauges in Prometheus' text format. It counts nothing itself and has no global registry: a scrape reads what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from nvcache.core.states import ModelState

if TYPE_CHECKING:
    from nvcache.engine.engine import Engine

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

COUNTERS = {
    "hits": "requests for a model that was ready",
    "misses": "requests for a model that had to be fetched",
    "joined": "requests that joined a fill already running",
    "fetched_bytes": "bytes that came over the network or from a source directory",
    "reused_bytes": "bytes that were already in the store, by digest",
    "fills": "fills that ended well",
    "verify_failures": "verifications that found bad bytes",
    "repaired_chunks": "chunks fetched again because the disk's copy was bad",
    "retries": "requests to a source that were tried again",
    "throttled_seconds": "seconds spent waiting because a source asked to slow down",
    "worker_restarts": "worker processes that died and were started again",
    "dropped_manifests": "manifests dropped at start because their blobs were gone",
}
SPACE = {
    "limit": "most bytes the store may hold",
    "used": "bytes the store holds",
    "reserved": "bytes promised to running fills",
    "free": "bytes free on the store's file system",
    "total": "bytes of the store's file system",
    "quarantined": "bytes set aside because they went bad",
}


class EngineCollector(Collector):
    """Reads one engine when scraped; from memory only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every metric family, afresh."""
        yield _gauge("nvcache_build_info", "the version that runs; always 1", [({"version": self._engine.version}, 1.0)])
        yield _gauge("nvcache_ready", "1 when models can be asked for", [({}, float(not self._engine.problems()))])
        yield from self._catalog()
        yield from self._counts()
        space = self._engine.space()
        for name, text in SPACE.items():
            yield _gauge(f"nvcache_store_{name}_bytes", text, [({}, float(getattr(space, name)))])

    def _catalog(self) -> Iterator[Metric]:
        models = self._engine.models()
        states = Counter(model.state for model in models)
        yield _gauge("nvcache_models", "models by state", [({"state": state}, float(states[state])) for state in ModelState])
        yield _gauge("nvcache_leases", "leases held", [({}, float(len(self._engine.leases())))])
        jobs = Counter((job.kind, job.state) for job in self._engine.jobs() if not job.state.ended)
        under_way = GaugeMetricFamily("nvcache_jobs", "jobs under way", labels=["kind", "state"])
        for (kind, state), count in jobs.items():
            under_way.add_metric([kind, state], count)
        yield under_way
        running = [model.progress for model in models if model.progress]
        yield _gauge("nvcache_fill_rate_bytes", "bytes per second arriving for all running fills", [({}, sum(p.rate for p in running))])

    def _counts(self) -> Iterator[Metric]:
        counters = self._engine.counters
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"nvcache_{name}", text, value=getattr(counters, name))
        failures = CounterMetricFamily("nvcache_fill_failures", "fills that failed, by error code", labels=["code"])
        for code, count in counters.fill_failures.items():
            failures.add_metric([code], count)
        yield failures
        yield SummaryMetricFamily(
            "nvcache_fill_seconds", "seconds from request to ready", count_value=counters.fills, sum_value=counters.fill_seconds_sum
        )


def registry(engine: Engine) -> CollectorRegistry:
    """A registry of its own for one engine."""
    own = CollectorRegistry(auto_describe=False)
    own.register(EngineCollector(engine))
    return own


def render(own: CollectorRegistry) -> bytes:
    """The text a scraper is answered with."""
    return generate_latest(own)


def _gauge(name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=list(samples[0][0]))
    for labels, value in samples:
        family.add_metric(list(labels.values()), value)
    return family
