"""A collector on loopback that takes traces by OTLP over HTTP, as the specification has it, and keeps them. It can also answer nothing.

https://opentelemetry.io/docs/specs/otlp/#otlphttp: `POST /v1/traces`, an ExportTraceServiceRequest in protobuf, answered with its response.
"""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.serving import LoopbackServer


@dataclass(frozen=True)
class Told:
    """One span that came; times are nanoseconds."""

    name: str
    trace: bytes
    id: bytes
    parent: bytes
    start: int
    end: int
    facts: dict[str, Any]
    moments: tuple[tuple[str, dict[str, Any]], ...]
    failed: str | None  # the description of an error
    service: dict[str, Any]  # the resource's attributes


class Collector:
    """Keeps what it is sent. A context manager. With `silent` it takes connections and answers no request until the end."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.asked = threading.Event()
        self.ended = threading.Event()
        self._came = threading.Condition()
        self._spans: list[Told] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        self._server.start("collector")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        self._server.stop()

    def keep(self, body: bytes, headers: dict[str, str]) -> None:
        """One request. Raises what protobuf raises for anything else."""
        request = ExportTraceServiceRequest.FromString(body)
        with self._came:
            self.bodies.append(body)
            self.headers.append(headers)
            for group in request.resource_spans:
                service = _plain(group.resource.attributes)
                self._spans += [_told(span, service) for scope in group.scope_spans for span in scope.spans]
            self._came.notify_all()

    def wait_for(self, name: str, count: int = 1, seconds: float = 30) -> list[Told]:
        """All spans that came, once `count` of that name are among them. Raises AssertionError when they do not come."""
        with self._came:
            there = self._came.wait_for(lambda: sum(span.name == name for span in self._spans) >= count, seconds)
            assert there, f"no {count} spans {name!r} among {[span.name for span in self._spans]}"
            return list(self._spans)


class _Server(LoopbackServer):
    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        super().__init__(("127.0.0.1", 0), _Handler, None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        collector = self.server.collector
        body = self.rfile.read(int(self.headers["Content-Length"]))
        collector.asked.set()
        if collector.silent:
            collector.ended.wait(60)
            self.close_connection = True
            return
        if self.path != "/v1/traces" or self.headers["Content-Type"] != "application/x-protobuf":
            self.send_error(404)
            return
        collector.keep(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body, dict(self.headers.items()))
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


def _told(span: Span, service: dict[str, Any]) -> Told:
    moments = tuple((event.name, _plain(event.attributes)) for event in span.events)
    failed = span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else None
    start, end, facts = span.start_time_unix_nano, span.end_time_unix_nano, _plain(span.attributes)
    return Told(span.name, span.trace_id, span.span_id, span.parent_span_id, start, end, facts, moments, failed, service)


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
