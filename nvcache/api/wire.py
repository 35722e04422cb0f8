"""The engine's snapshots as JSON: field for field, straight from the dataclasses. Nothing is validated here; `schemas` declares the same shapes.

Responses are serialised once, by the C encoder: passing every answer through a validator would cost more than everything else the look-up does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from nvcache.api import problems
from nvcache.core.manifest import Manifest
from nvcache.engine.status import ErrorInfo


def reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` (a snapshot, or plain data that holds snapshots) as a JSON response."""
    return Response(to_json(value), status, headers, "application/json")


def to_json(value: object) -> bytes:
    """`value` as JSON; times are RFC 3339 in UTC, errors are problem documents. Raises TypeError for anything else that JSON lacks."""
    return json.dumps(value, default=_simpler, separators=(",", ":")).encode()


def manifest_view(manifest: Manifest | None) -> dict[str, object] | None:
    """What a caller may know of a manifest: everything but the chunk digests."""
    if manifest is None:
        return None
    return {
        "endpoint": manifest.endpoint,
        "asked": manifest.asked,
        "commit": manifest.commit,
        "selection": manifest.selection,
        "left_out": manifest.left_out,
        "parsed": manifest.parsed,
        "checks": [
            {"path": f.path, "size": f.size, "sha256": f.sha256, "check": f.check, "source": str(f.source) if f.source else None}
            for f in manifest.files
        ],
    }


def as_dict(snapshot: Any) -> dict[str, object]:
    """The fields of a dataclass instance, one level deep."""
    return {name: getattr(snapshot, name) for name in snapshot.__dataclass_fields__}


def _simpler(value: object) -> object:
    if isinstance(value, ErrorInfo):
        return problems.document(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if is_dataclass(value):
        return as_dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
