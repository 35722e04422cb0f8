"""Errors as RFC 9457 problem documents, with one table from code to HTTP status. It raises nothing and logs nothing.

`type` is a URN: the codes are this project's own and resolve to no page; docs/errors.md lists them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response

from nvcache.engine.status import ErrorInfo
from nvcache.errors import FACTS, Code

MEDIA_TYPE = "application/problem+json"

STATUS: dict[Code, int] = {
    Code.BAD_REFERENCE: 422,
    Code.BAD_REQUEST: 422,
    Code.UNKNOWN_MODEL: 404,
    Code.UNKNOWN_JOB: 404,
    Code.UNKNOWN_LEASE: 404,
    Code.UNKNOWN_BLOB: 404,
    Code.AMBIGUOUS_REVISION: 409,
    Code.NOT_READY: 409,
    Code.LEASED: 409,
    Code.PINNED: 409,
    Code.IN_USE: 409,
    Code.ALIAS_CONFLICT: 409,
    Code.NOT_ALLOWED: 403,
    Code.UNAUTHORIZED: 401,
    Code.BAD_CONFIG: 500,
    Code.STORE_FOREIGN: 503,
    Code.STORE_FORMAT: 503,
    Code.STORE_LOCKED: 503,
    Code.STORE_READONLY: 503,
    Code.STORE_UNFIT: 503,
    Code.SOCKET_IN_USE: 500,
    Code.DAEMON_UNREACHABLE: 503,
    Code.STARTING: 503,
    Code.DISK_IO: 500,
    Code.DISK_STALLED: 503,
    Code.NO_STRIPE: 503,
    Code.DISKS_REFUSED: 503,
    Code.DISKS_BUSY: 503,
    Code.TOOL_MISSING: 503,
    Code.TOOL_FAILED: 503,
    Code.TOOL_STALLED: 503,
    Code.REPOSITORY_NOT_FOUND: 404,
    Code.REVISION_NOT_FOUND: 404,
    Code.FILE_NOT_FOUND: 502,
    # 401 is kept for the daemon's own token: a source's refusal is 403 whatever the source answered, and the code says which it was.
    Code.GATED: 403,
    Code.BAD_TOKEN: 403,
    Code.SOURCE_FORBIDDEN: 403,
    Code.SOURCE_UNREACHABLE: 503,
    Code.SOURCE_STALLED: 504,
    Code.SOURCE_BUSY: 503,
    Code.SOURCE_FAILED: 502,
    Code.SOURCE_TLS: 502,
    Code.SOURCE_PROTOCOL: 502,
    Code.SOURCE_CHANGED: 502,
    Code.NEEDS_XET: 501,
    Code.ARCHIVED: 502,
    Code.NO_DIGEST: 409,
    Code.DIGEST_MISMATCH: 502,
    Code.SIZE_MISMATCH: 502,
    Code.POINTER_FILE: 502,
    Code.BAD_SAFETENSORS: 502,
    Code.BAD_INDEX: 502,
    Code.HOSTILE_NAME: 502,
    Code.LISTING_CONFLICT: 502,
    Code.DEGRADED: 503,
    Code.TOO_LARGE: 413,
    Code.FULL: 507,
    Code.DISK_FULL: 507,
    Code.WORKER_DIED: 503,
    Code.CANCELLED: 409,
    Code.STOPPING: 503,
    Code.TIMEOUT: 504,
    Code.UNREADABLE: 409,
    Code.INTERNAL: 500,
}


def document(error: ErrorInfo, status: int | None = None) -> dict[str, object]:
    """The problem document of an error; `status` overrides the table's (404 and 405 of the router, 413 of an oversized body)."""
    return {
        **error.facts,
        "type": f"urn:nvcache:error:{error.code}",
        "title": FACTS[error.code].meaning,
        "status": STATUS[error.code] if status is None else status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "retryable": error.retryable,
        "retry_after_s": error.retry_after_s,
    }


def reply(error: ErrorInfo, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """The problem document as a response, with `Retry-After` and `WWW-Authenticate` where HTTP asks for them."""
    body = document(error, status)
    extra = dict(headers or {})
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.code is Code.UNAUTHORIZED:
        extra["WWW-Authenticate"] = 'Bearer realm="nvcache"'
    return Response(json.dumps(body, default=str), STATUS[error.code] if status is None else status, extra, MEDIA_TYPE)


def plain(code: Code, message: str) -> ErrorInfo:
    """An error that no exception stands for, with its code's own hint."""
    return ErrorInfo(code, message, FACTS[code].hint, FACTS[code].retryable)
