"""Spans of a job on its own: what becomes of many files, of what is told late, and what switches it all on."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nvcache.core.timeline import Event, Kind
from nvcache.engine import otel
from nvcache.engine.otel import Spans, spans_from_environment
from nvcache.errors import ConfigError
from nvcache.settings import traces_wanted

SLUG = "hf--acme--m"
URL = "http://127.0.0.1:9"


@pytest.fixture
def kept() -> InMemorySpanExporter:
    """Where spans end up."""
    return InMemorySpanExporter()


@pytest.fixture
def spans(kept: InMemorySpanExporter) -> Spans:
    """What tells it at once."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return Spans(provider)


def named(kept: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in kept.get_finished_spans() if span.name == name]


def test_of_many_files_those_that_took_longest_are_told(spans: Spans, kept: InMemorySpanExporter) -> None:
    job = spans.job("fill")
    for number in range(otel.FILES + 50):
        job.file(Event(1000.0, Kind.FETCHED, float(number), number, source="hub", what=f"{number}.bin"))
    job.heard(SLUG, Event(1000.0, Kind.FETCHED, 5.0, source="hub", job="j"))
    job.heard(SLUG, Event(2000.0, Kind.READY, 1000.0, job="j"))
    seconds = sorted(((span.end_time or 0) - (span.start_time or 0)) / 1e9 for span in named(kept, "fetch file"))
    assert seconds == [float(number) for number in range(50, otel.FILES + 50)]
    (fetch,) = named(kept, "fetch")
    assert fetch.end_time == (1000 + otel.FILES + 49) * 10**9, "it lasts until its last file is there"


def test_files_belong_to_the_phase_of_their_source(spans: Spans, kept: InMemorySpanExporter) -> None:
    job = spans.job("fill")
    for source in ("hub", "mirror near", None):
        kind = Kind.FETCHED if source else Kind.PROVEN
        job.file(Event(1000.0, kind, 1.0, source=source, what=f"from {source}"))
        job.heard(SLUG, Event(1000.0, kind, 1.0, source=source, job="j"))
    job.heard(SLUG, Event(1001.0, Kind.READY, 1.0, job="j"))
    parents = {span.context.span_id: span for span in kept.get_finished_spans() if span.context is not None}
    for span in [*named(kept, "fetch file"), *named(kept, "prove file")]:
        assert span.parent is not None
        assert (span.attributes or {}).get("nvcache.source") == (parents[span.parent.span_id].attributes or {}).get("nvcache.source")
    assert (len(named(kept, "fetch")), len(named(kept, "prove")), len(named(kept, "fetch file"))) == (2, 1, 2)


def test_what_is_told_after_the_end_makes_no_second_trace(spans: Spans, kept: InMemorySpanExporter) -> None:
    job = spans.job("fill")
    job.heard(SLUG, Event(1001.0, Kind.INTERRUPTED, 1.0, code="no-stripe", job="j"))
    job.heard(SLUG, Event(1000.0, Kind.FETCHED, 2.0, source="hub", job="j"))
    (fill,) = kept.get_finished_spans()
    assert (fill.name, (fill.attributes or {})["error.type"], fill.parent) == ("fill", "no-stripe", None)


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": URL}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": URL}, False),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_EXPORTER_OTLP_ENDPOINT": URL}, False),
        ({"OTEL_SDK_DISABLED": "True", "OTEL_EXPORTER_OTLP_ENDPOINT": URL}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_only_the_standard_variables_switch_it_on(environ: dict[str, str], wanted: bool) -> None:
    assert traces_wanted(environ) is wanted


def test_another_protocol_is_told_and_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with pytest.raises(ConfigError, match="http/protobuf"):
        traces_wanted(environ)
    assert spans_from_environment(None, environ) is None
    assert "no traces are sent" in caplog.text
    assert "the protocol is grpc" in caplog.text


def test_a_variable_that_the_sdk_cannot_read_is_told_and_nothing_is_sent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "-1")
    assert spans_from_environment(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": URL}) is None
    assert "no traces are sent" in caplog.text
