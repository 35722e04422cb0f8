"""Tells an OpenTelemetry collector where the time of jobs and leases went, as spans. It measures nothing itself, and nothing waits for it.

A job is one trace, made when the job is over out of what its timeline was told, texts masked as there. The SDK queues spans, drops what its queue has
no room for, and sends them from a thread of its own. Its OTEL_* variables alone say whether, whereto and which:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nvcache import __version__
from nvcache.core.ref import EntryId
from nvcache.core.timeline import ENDS, PHASES, Event, Kind
from nvcache.engine.blocking import DaemonExecutor
from nvcache.errors import Code, ConfigError, Interrupted
from nvcache.settings import traces_wanted

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)
FILES = 256  # of one job that get a span, those that took longest
LAST = 1.0  # seconds that the last spans of a daemon may take to be sent
NAMES = {
    Kind.RESOLVED: "resolve",
    Kind.LISTED: "list",
    Kind.WAITED: "wait",
    Kind.FETCHED: "fetch",
    Kind.PROVEN: "prove",
    Kind.CHECKED: "check",
    Kind.PUBLISHED: "publish",
    Kind.READ: "read",
}
FACTS = ("bytes", "count", "source", "what", "who")  # of an event, kept as attributes


class Spans:
    """What one daemon tells. Belongs to the event loop; `provider` is its own, nothing else in the process is traced by it."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nvcache", __version__)

    def job(self, kind: str) -> JobSpans:
        """What will be told of one job."""
        return JobSpans(self, kind)

    def lease(self, about: EntryId, ended: Event) -> None:
        """A lease is over; one that was taken before the daemon started is not told."""
        if ended.seconds is not None:
            began = ended.at - ended.seconds
            self.put("lease", began, ended.at, {"nvcache.model": str(about), "nvcache.outcome": str(ended.kind), **attributes(ended)})

    def put(
        self, name: str, began: float, ended: float, facts: Mapping[str, str | int], *, parent: Span | None = None, moments: Sequence[Event] = ()
    ) -> Span:
        """One span that is over, from `began` to `ended` (unix seconds), with what happened at some moment of it."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        context = None if parent is None else set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=facts, start_time=_ns(began))
        for event in moments:
            span.add_event(str(event.kind), attributes(event), _ns(event.at))
        if "error.type" in facts:
            span.set_status(Status(StatusCode.ERROR, str(facts.get("nvcache.what", ""))))
        span.end(_ns(ended))
        return span

    async def close(self) -> None:
        """Send what is queued, for a second at most."""
        thread = DaemonExecutor("spans", 1)
        try:
            async with asyncio.timeout(LAST):
                await thread.call(self._provider.shutdown)
        except TimeoutError:
            log.warning("the last traces are lost: the collector takes too long")
        finally:
            thread.close(lambda: Interrupted(Code.STOPPING, "cannot send traces: the daemon is stopping"))


class JobSpans:
    """What one job tells, until it ends."""

    def __init__(self, spans: Spans, kind: str) -> None:
        self._spans = spans
        self._kind = kind
        self._events: list[Event] = []
        self._files: list[Event] = []

    def file(self, event: Event) -> None:
        """One try of a file; `what` is its path."""
        self._files.append(event)

    def heard(self, slug: str, event: Event) -> None:
        """One event of the job, of the model `slug`. The one that ends it makes spans of all."""
        self._events.append(event)
        if event.kind in ENDS:
            self._tell(slug, event)
            self._events, self._files = [], []

    def _tell(self, slug: str, end: Event) -> None:
        about = {"nvcache.model": slug if end.revision is None else f"{slug}@{end.revision}", "nvcache.job": end.job or ""}
        moments = [event for event in self._events if event.kind not in PHASES and event is not end]
        began = end.at - (end.seconds or 0.0)
        root = self._spans.put(self._kind, began, end.at, {**about, "nvcache.outcome": str(end.kind), **attributes(end)}, moments=moments)
        slowest = sorted(self._files, key=lambda file: file.seconds or 0.0, reverse=True)[:FILES]
        for phase in self._events:
            if phase.kind not in PHASES:
                continue
            files = [file for file in slowest if (file.kind, file.source) == (phase.kind, phase.source)]
            over = max([_over(phase), *map(_over, files)])  # the phase's own seconds leave out when its files waited for lanes
            span = self._spans.put(NAMES[phase.kind], phase.at, over, attributes(phase), parent=root)
            for file in files:
                self._spans.put(f"{NAMES[file.kind]} file", file.at, _over(file), attributes(file), parent=span)


def spans_from_environment(node: str | None, environ: Mapping[str, str] | None = None) -> Spans | None:
    """What the OTEL_* variables ask for; None where they ask for nothing. What stands in the way is logged: a cache without traces is a cache.

    `node` is the Kubernetes node's name, where it is known.
    """
    try:
        return Spans(_provider(node)) if traces_wanted(environ) else None
    except (ConfigError, ValueError) as error:  # ValueError: a variable that the SDK cannot read
        log.warning("no traces are sent: %s", error, extra={"facts": {"code": Code.BAD_CONFIG}})
        return None


def _provider(node: str | None) -> TracerProvider:
    """The SDK as its variables set it up. Raises `ConfigError` (bad-config) where it is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        why = f"cannot export traces, which OTEL_* variables ask for: {error}"
        raise ConfigError(Code.BAD_CONFIG, f"{why}; install the extra: pip install 'nvcache[otel]'") from error
    own = {"service.name": "nvcache", "service.version": __version__, **({"k8s.node.name": node} if node else {})}
    said = OTELResourceDetector().detect().attributes
    provider = TracerProvider(resource=Resource.create({name: value for name, value in own.items() if name not in said}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def attributes(event: Event) -> dict[str, str | int]:
    """What an event says, by the names of docs/observability.md."""
    found = {f"nvcache.{name}": value for name in FACTS if (value := getattr(event, name)) is not None}
    return found if event.code is None else found | {"error.type": event.code}


def _over(event: Event) -> float:
    """When a phase or a file ended, in unix seconds."""
    return event.at + (event.seconds or 0.0)


def _ns(unix: float) -> int:
    return round(unix * 1e9)
