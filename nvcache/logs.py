"""Logging to stderr: JSON lines, or console lines on a terminal, with the context model, job and disk. It rotates nothing and ships nothing.

Whatever looks like a credential is masked here as a last line of defence; callers must not log secrets in the first place.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

_context: ContextVar[dict[str, str] | None] = ContextVar("nvcache_log_context", default=None)
_USERINFO = re.compile(r"""://[^/\s?#"'\\]*@""")
_SECRETS = re.compile(
    r"""(?ix)
      (?P<query> https?://[^\s?\#"'<>\\]*\?)[^\s"'<>\\]+          # all of a URL's query: signatures have many names
    | (?P<signed> [?&](?:sig|signature|policy|key-pair-id|x-(?:amz|goog)-[a-z-]+|(?:access_)?token)=)[^&\s"'\\]+
    | (?P<header> authorization["']?\s*[:=,]\s*["']?(?:(?:bearer|basic|token)\s+)?)[^\s"',\\]+
    | (?P<bearer> \bbearer\s+)[^\s"',\\]+
    | \b(?:hf|api_org)_[a-z0-9]{20,}                             # the Hub's tokens
    """
)


@contextmanager
def context(**fields: str) -> Iterator[None]:
    """Add fields to every record logged inside, in this task or thread."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def current() -> dict[str, str]:
    """The fields that `context` adds here, to be added elsewhere as well."""
    return dict(_context.get() or {})


def mask(text: str) -> str:
    """`text` without users and passwords in URLs, signed-URL parameters, authorization headers and Hub tokens."""
    return _SECRETS.sub(lambda found: f"{found[found.lastgroup] if found.lastgroup else ''}***", _USERINFO.sub("://***@", text))


def _masked(value: object) -> object:
    """`value` with every string inside masked."""
    match value:
        case str():
            return mask(value)
        case dict():
            return {mask(str(name)): _masked(item) for name, item in value.items()}
        case list() | tuple():
            return [_masked(item) for item in value]
        case None | bool() | int() | float():
            return value
        case _:
            return mask(str(value))


def _extras(record: logging.LogRecord) -> dict[str, object]:
    """The context and the record's own facts, masked; facts win."""
    facts = getattr(record, "facts", None)
    found = {**(_context.get() or {}), **(facts if isinstance(facts, dict) else {})}
    return {str(name): _masked(value) for name, value in found.items()}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, context, and a record's `extra={"facts": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        if record.exc_info:
            line["trace"] = mask(self.formatException(record.exc_info))
        for name, value in _extras(record).items():
            line.setdefault(name, value)  # a fact named `time` or `message` must not hide the record's own
        return json.dumps(line)


class ConsoleFormatter(logging.Formatter):
    """A line a person reads: time, level, message, context."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, with the trace below if it has one."""
        moment = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        tail = "".join(f" {name}={value}" for name, value in _extras(record).items())
        line = f"{moment} {record.levelname.lower():7} {mask(record.getMessage())}{tail}"
        return line + ("\n" + mask(self.formatException(record.exc_info)) if record.exc_info else "")


def setup(level: str, style: str) -> None:
    """Send everything to stderr in `style` (json, console, auto: console on a terminal)."""
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ConsoleFormatter() if console else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "huggingface_hub",
        "asyncio",
        "uvicorn",
        "uvicorn.access",
        "uvicorn.error",
        "urllib3",
    ):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    for verbose in ("azure", "msal", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):  # what our errors say anyway, in paragraphs; every try
        logging.getLogger(verbose).setLevel(max(logging.ERROR, root.level))
