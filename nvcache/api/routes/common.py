"""What every route needs: the engine, the caller, the job reply. It adds no call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import Path, Request
from starlette.responses import Response

from nvcache.api import wire
from nvcache.api.schemas import EXAMPLE_ENTRY
from nvcache.api.scope import Caller, Gate, Scope
from nvcache.engine.status import JobStatus

if TYPE_CHECKING:
    from nvcache.engine.engine import Engine

Entry = Annotated[str, Path(max_length=512, description="<slug>@<revision>, or a bare slug", examples=[EXAMPLE_ENTRY])]


def engine_of(request: Request) -> Engine:
    """The engine this application serves."""
    engine: Engine = request.app.state.engine
    return engine


async def admit(request: Request, need: Scope, doing: str = "") -> Caller:
    """The caller, if it may do what needs `need`; see `Gate.admit`."""
    gate: Gate = request.app.state.gate
    return await gate.admit(request, need, doing or f"{request.method} {request.url.path}")


def accepted(job: JobStatus) -> Response:
    """202 with the job and where to follow it."""
    return wire.reply({"job": job, "entry": job.entry}, 202, {"Location": f"/v1/jobs/{job.id}"})
