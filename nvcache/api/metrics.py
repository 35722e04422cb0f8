"""The engine's counts and gauges in Prometheus' text format. It counts nothing itself and has no global registry: a scrape reads what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nvcache.core.scrub import known_right
from nvcache.core.states import ModelState
from nvcache.engine import clock
from nvcache.engine.handover import StripeStatus
from nvcache.engine.status import FILL_SECONDS

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
    "scrubs": "models that were read back by themselves",
    "scrubbed_bytes": "bytes that were read back slowly, by themselves or when asked for at a bandwidth",
    "scrub_failures": "models in which that found wrong bytes",
    "verify_failures": "files that were found bad, gone or short",
    "repairs": "models that were mended",
    "repaired_chunks": "chunks fetched again because the disk's copy was bad",
    "leases_taken": "leases given",
    "leases_expired": "leases that ran out and were not released",
    "retries": "files and listings that were begun anew; each request that failed counts among the source errors",
    "preemptions": "fetches that made way for one that somebody waits for",
    "throttled_seconds": "seconds spent waiting because a source asked to slow down",
    "worker_restarts": "worker processes that died and were started again",
    "evictions": "models removed to make room",
    "evicted_bytes": "bytes that their removal freed",
    "stripe_losses": "times the contents of the stripe were lost while they were served",
    "signal_failures": "calls to the Kubernetes API server that failed",
}
SPACE = {
    "limit": "most bytes the store may hold",
    "used": "bytes the store holds",
    "reserved": "bytes promised to running fills",
    "free": "bytes free on the store's file system",
    "total": "bytes of the store's file system",
    "quarantined": "bytes set aside because they went bad",
}


STRIPE_LABELS = ("backend", "case", "filesystem", "code", "fs_uuid")


class EngineCollector(Collector):
    """Reads one engine when scraped; from memory only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every metric family, afresh."""
        yield _gauge("nvcache_build_info", "the version that runs; always 1", [({"version": self._engine.version}, 1.0)])
        yield _gauge("nvcache_ready", "1 when models can be asked for", [({}, float(not self._engine.problems()))])
        failed = float(self._engine.config_failure is not None)
        yield _gauge("nvcache_config_reload_failed", "1 while the settings' file cannot be used and what it said before counts", [({}, failed)])
        yield from self._catalog()
        yield from self._stripe()
        yield from self._counts()
        space = self._engine.space()
        for name, text in SPACE.items():
            yield _gauge(f"nvcache_store_{name}_bytes", text, [({}, float(getattr(space, name)))])

    def _catalog(self) -> Iterator[Metric]:
        models = self._engine.models()
        states = Counter(model.state for model in models)
        yield _gauge("nvcache_models", "models by state", [({"state": state}, float(states[state])) for state in ModelState])
        sizes = Counter[ModelState]()
        for model in models:
            sizes[model.state] += model.bytes
        what = "bytes of models by state, of one that is being filled all it will have; what several share counts for each"
        yield _gauge("nvcache_model_bytes", what, [({"state": state}, float(sizes[state])) for state in ModelState])
        unproven = sum(model.unproven for model in models)
        yield _gauge("nvcache_unproven_files", "files whose source publishes no digest, accepted at first use", [({}, float(unproven))])
        yield _gauge("nvcache_leases", "leases held", [({}, float(len(self._engine.leases())))])
        jobs = Counter((job.kind, job.state) for job in self._engine.jobs() if not job.state.ended)
        under_way = GaugeMetricFamily("nvcache_jobs", "jobs under way", labels=["kind", "state"])
        for (kind, state), count in jobs.items():
            under_way.add_metric([kind, state], count)
        yield under_way
        now = clock.unix()
        right = [known_right(model.verified_at, model.checked_at, now=now) for model in models if model.state is ModelState.READY]
        oldest = "when the ready model was last known to be right for which that is longest ago, unix seconds; 0: there is none"
        yield _gauge("nvcache_verified_oldest_timestamp_seconds", oldest, [({}, min(right, default=0.0))])
        newest = "when a model was last read back or fetched, unix seconds; 0: there is none"
        yield _gauge("nvcache_verified_last_timestamp_seconds", newest, [({}, max(right, default=0.0))])
        running = [model.progress for model in models if model.progress and model.state is not ModelState.READY]
        yield _gauge("nvcache_fill_rate_bytes", "bytes per second arriving for all running fills", [({}, sum(p.rate for p in running))])

    def _stripe(self) -> Iterator[Metric]:
        told = self._engine.stripe()
        state, disks, members = told["state"], told.get("disks"), told.get("members")
        yield _gauge("nvcache_stripe_state", "1 for the state the stripe is in", [({"state": each}, float(each is state)) for each in StripeStatus])
        yield _gauge("nvcache_stripe_info", "what the stripe is; always 1", [({name: str(told.get(name) or "") for name in STRIPE_LABELS}, 1.0)])
        yield _gauge("nvcache_stripe_generation", "grows with every change of the state", [({}, float(str(told["generation"])))])
        yield _gauge("nvcache_stripe_members", "disks in the stripe", [({}, float(len(members)) if isinstance(members, list) else 0.0)])
        seen = [disk for disk in disks if isinstance(disk, dict)] if isinstance(disks, list) else []
        verdicts = GaugeMetricFamily("nvcache_disks", "NVMe namespaces of the node by verdict", labels=["verdict"])
        for verdict, count in Counter(str(disk.get("verdict")) for disk in seen).items():
            verdicts.add_metric([verdict], count)
        yield verdicts
        refused = GaugeMetricFamily("nvcache_disk_refused", "disks that are not touched although their model is allowed, by code", labels=["code"])
        for code, count in Counter(str(disk.get("code")) for disk in seen if disk.get("verdict") == "refused").items():
            refused.add_metric([code], count)
        yield refused

    def _counts(self) -> Iterator[Metric]:
        counters = self._engine.counters
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"nvcache_{name}", text, value=getattr(counters, name))
        came = CounterMetricFamily("nvcache_source_bytes", "bytes fetched, by scheme of the source, or mirror", labels=["source"])
        for source, size in counters.source_bytes.items():
            came.add_metric([source], size)
        yield came
        errors = CounterMetricFamily(
            "nvcache_source_errors", "requests that a source did not answer as it should, by scheme and error code", labels=["source", "code"]
        )
        for (source, code), count in counters.source_errors.items():
            errors.add_metric([source, code], count)
        yield errors
        failures = CounterMetricFamily("nvcache_fill_failures", "fills that failed, by error code", labels=["code"])
        for code, count in counters.fill_failures.items():
            failures.add_metric([code], count)
        yield failures
        lent = CounterMetricFamily("nvcache_mirror_bytes", "bytes that came from mirrors, part of the bytes fetched", labels=["mirror"])
        for mirror, size in counters.mirror_bytes.items():
            lent.add_metric([mirror], size)
        yield lent
        left = CounterMetricFamily("nvcache_mirror_failures", "times a mirror was left alone for a while, by error code", labels=["mirror", "code"])
        for (mirror, code), count in counters.mirror_failures.items():
            left.add_metric([mirror, code], count)
        yield left
        bounds = (*map(floatToGoString, FILL_SECONDS), "+Inf")
        within = list(zip(bounds, accumulate(counters.fill_seconds_up_to), strict=True))
        yield HistogramMetricFamily("nvcache_fill_seconds", "seconds from request to ready", within, counters.fill_seconds_sum)


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
