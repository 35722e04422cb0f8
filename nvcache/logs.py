"""Logging: JSON lines, or console lines on a terminal, with the context model, job and disk. It rotates nothing and ships nothing; stderr is the sink.

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
_SECRETS = re.compile(
    r"(?P<keep>(?:[?&](?:sig|se|sp|sv|sr|skoid|sktid|Signature|Policy|Key-Pair-Id|X-Amz-[A-Za-z-]+|token)=)|(?:Bearer\s+)|(?:://[^/\s:@]*:))"
    r"[^&\s\"'@]+|hf_[A-Za-z0-9]{8,}"
)


@contextmanager
def context(**fields: str) -> Iterator[None]:
    """Add fields to every record logged inside, in this task or thread."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def mask(text: str) -> str:
    """`text` without signed-URL parameters, bearer tokens, Hub tokens and passwords in URLs."""
    return _SECRETS.sub(lambda found: f"{found.group('keep') or ''}***", text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, context, and a record's `extra={"facts": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask(record.getMessage()),
            **(_context.get() or {}),
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            line.update({str(name): mask(value) if isinstance(value, str) else value for name, value in facts.items()})
        if record.exc_info:
            line["trace"] = mask(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


class ConsoleFormatter(logging.Formatter):
    """A line a person reads: time, level, message, context."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, with the trace below if it has one."""
        moment = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        extra = dict(_context.get() or {})
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            extra |= {str(name): str(value) for name, value in facts.items()}
        tail = "".join(f" {name}={value}" for name, value in extra.items())
        line = f"{moment} {record.levelname.lower():7} {mask(record.getMessage() + tail)}"
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
