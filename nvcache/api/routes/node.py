"""The node: jobs, space, stripe, health, metrics, version. Health is told from memory: it awaits neither a lock nor a disk."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from nvcache.api import metrics, schemas, wire
from nvcache.api.events import AllEvents
from nvcache.api.limits import Lifecycle
from nvcache.api.routes.common import admit, engine_of
from nvcache.api.scope import Scope, came_locally

router = APIRouter(responses=schemas.PROBLEMS)
JobId = Annotated[str, Path(max_length=128, description="the job, as 202 answers name it")]


@router.get("/v1/jobs", tags=["jobs"], response_model=schemas.Jobs)
async def jobs(request: Request) -> Response:
    """Running jobs, and those that ended not long ago."""
    await admit(request, Scope.READ)
    return wire.reply({"jobs": engine_of(request).jobs()})


@router.get("/v1/jobs/{job}", tags=["jobs"], response_model=schemas.Job)
async def job_status(request: Request, job: JobId) -> Response:
    """One job."""
    await admit(request, Scope.READ)
    return wire.reply(engine_of(request).job(job))


@router.delete("/v1/jobs/{job}", tags=["jobs"], response_model=schemas.Job)
async def cancel(request: Request, job: JobId) -> Response:
    """Cancel a job; what it has on the disk is kept, and asking again resumes there."""
    await admit(request, Scope.ADMIN, f"cancel job {job}")
    return wire.reply(await engine_of(request).cancel(job))


@router.get("/v1/events", tags=["node"], response_class=Response, responses={200: schemas.EVENTS})
async def events(request: Request) -> Response:
    """Follow all models, for as long as the daemon lives: first each as it is, then what changes; `absent` is one that is gone."""
    await admit(request, Scope.READ)
    engine = engine_of(request)
    lifecycle: Lifecycle = request.app.state.lifecycle
    async with AsyncExitStack() as stack:
        changes = await stack.enter_async_context(engine.watch_all())
        return AllEvents(request, changes, stack.pop_all(), lifecycle)


@router.get("/v1/space", tags=["node"], response_model=schemas.Space)
async def space(request: Request) -> Response:
    """The store's room."""
    await admit(request, Scope.READ)
    return wire.reply(engine_of(request).space())


@router.post("/v1/evict", tags=["node"], response_model=schemas.EvictionView)
async def evict(request: Request, wish: schemas.EvictWish) -> Response:
    """Remove the models used longest ago until so much is available; never one that is pinned, declared or leased. 507 when that is not enough."""
    await admit(request, Scope.ADMIN, "evict models")
    return wire.reply(await engine_of(request).evict(wish.need_bytes, dry_run=wish.dry_run))


@router.get("/v1/stripe", tags=["node"], response_model=schemas.Stripe)
async def stripe(request: Request) -> Response:
    """What the store lies on."""
    await admit(request, Scope.READ)
    return wire.reply(engine_of(request).stripe())


@router.get("/v1/sources", tags=["node"], response_model=schemas.Sources)
async def sources(request: Request) -> Response:
    """Where models come from as the daemon is set up: endpoint, whether it has a token, proxies. No secret is shown."""
    await admit(request, Scope.READ)
    return wire.reply({"sources": await engine_of(request).sources()})


@router.get("/healthz", tags=["health"], response_model=schemas.Health)
async def healthz() -> Response:
    """The process answers. For liveness probes; open to everybody."""
    return wire.reply({"status": "ok"})


@router.get(
    "/readyz", tags=["health"], response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness, "description": "not ready, and why"}}
)
async def readyz(request: Request) -> Response:
    """Whether models can be asked for, and if not, why. For readiness probes; open to everybody, so over TCP it names no model."""
    engine = engine_of(request)
    problems = engine.problems() if came_locally(request) else engine.causes()
    return wire.reply({"ready": not problems, "problems": problems, "degraded": engine.degraded()}, 503 if problems else 200)


@router.get("/version", tags=["health"], response_model=schemas.Version)
async def version(request: Request) -> Response:
    """The daemon's version and its API's. Open to everybody."""
    return wire.reply({"version": engine_of(request).version, "api": "v1"})


@router.get(
    "/metrics",
    tags=["health"],
    response_class=Response,
    responses={200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def scrape(request: Request) -> Response:
    """Counts and gauges in Prometheus' text format; no model is named."""
    await admit(request, Scope.METRICS)
    return Response(metrics.render(request.app.state.metrics), media_type=metrics.MEDIA_TYPE)
