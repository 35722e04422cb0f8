"""The ASGI application over one engine: routes, limits, every error as a problem document. It neither starts nor stops the engine; `serve` does."""

from __future__ import annotations

import os
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from nvcache.api import metrics, problems
from nvcache.api.limits import Lifecycle, Limits
from nvcache.api.routes import blobs, leases, models, node, page
from nvcache.api.scope import Door, Gate
from nvcache.engine.status import ErrorInfo
from nvcache.errors import Code, NvcacheError

if TYPE_CHECKING:
    from nvcache.engine.engine import Engine

GROUPS = (models, leases, blobs, node, page)
DESCRIPTION = """A node-local cache of model weights. Errors are RFC 9457 problem documents whose `code` is stable.
Callers of a Unix socket are known by their credentials; over TCP send `Authorization: Bearer` with the daemon's token.
With `listen_scope = "metrics"` TCP needs no token and answers `/healthz`, `/readyz`, `/version` and `/metrics`, nothing else."""


def create_app(engine: Engine) -> FastAPI:
    """The application. `app.state.lifecycle` lets whoever runs it end the requests in flight."""
    # The pages that show the document in a browser load scripts from a CDN; nodes have no business there.
    app = FastAPI(title="nvcache", version=engine.version, description=DESCRIPTION, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.gate = Gate(engine.settings, os.geteuid(), lambda: engine.settings.allow)
    app.state.lifecycle = Lifecycle()
    app.state.metrics = metrics.registry(engine)
    for group in GROUPS:
        app.include_router(group.router)
    app.add_middleware(Door, gate=app.state.gate)
    app.add_middleware(Limits, lifecycle=app.state.lifecycle)
    app.add_exception_handler(NvcacheError, _expected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)
    return app


async def _expected(_request: Request, error: Exception) -> Response:
    return problems.reply(ErrorInfo.of(cast("NvcacheError", error)))


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing wrong with the request, and where; values are not echoed, they may hold secrets."""
    first = cast("RequestValidationError", error).errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return problems.reply(problems.plain(Code.BAD_REQUEST, f"cannot {request.method} {request.url.path}: {where}: {first['msg']}"))


async def _http(request: Request, error: Exception) -> Response:
    """What the router and the body reader refuse: 404, 405, 413. A body that cannot be decoded is 422 as any other malformed body."""
    found = cast("HTTPException", error)
    status = HTTPStatus.UNPROCESSABLE_ENTITY if found.status_code == HTTPStatus.BAD_REQUEST else found.status_code
    info = problems.plain(Code.BAD_REQUEST, f"cannot {request.method} {request.url.path}: {found.detail}")
    headers = {**(found.headers or {}), "Allow": _allowed(request)} if status == HTTPStatus.METHOD_NOT_ALLOWED else found.headers
    return problems.reply(info, int(status), headers)


def _allowed(request: Request) -> str:
    """Every method of the path (RFC 9110 §15.5.6); the router itself names only those of the first route that has it."""
    routes = [route for group in GROUPS for route in group.router.routes if isinstance(route, Route)]
    return ", ".join(sorted({method for route in routes if route.matches(request.scope)[0] is not Match.NONE for method in route.methods or ()}))


async def _defect(request: Request, _error: Exception) -> Response:
    """A defect: the caller learns only that; the server logs the trace when Starlette raises it again after this."""
    return problems.reply(problems.plain(Code.INTERNAL, f"cannot {request.method} {request.url.path}: a defect in nvcache; its log has the trace"))
