"""Models: what is here, make it ready, follow it, remove, pin, verify."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from nvcache.api import schemas, wire
from nvcache.api.events import EventStream
from nvcache.api.limits import DRY_RUN_SECONDS, Lifecycle, extend
from nvcache.api.routes.common import Entry, accepted, admit, engine_of
from nvcache.api.scope import Caller, Gate, Scope
from nvcache.core.ref import Ref, parse_name, shortened
from nvcache.core.states import ModelState
from nvcache.core.timeline import Event, slowest
from nvcache.engine.clock import from_unix
from nvcache.engine.status import DryRun, EnsureRequest, ModelStatus
from nvcache.errors import Code, RequestError

if TYPE_CHECKING:
    from nvcache.engine.engine import Engine

router = APIRouter(prefix="/v1/models", tags=["models"], responses=schemas.PROBLEMS)
JOB_LINK = {"Location": {"description": "the job's URL", "schema": {"type": "string"}}}
ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"model": schemas.Accepted, "description": "under way", "headers": JOB_LINK}}


@router.get("", response_model=schemas.Models | schemas.Model)
async def look(
    request: Request,
    ref: Annotated[
        str | None, Query(max_length=4096, description="reference, slug or entry: answers that one model", examples=[schemas.EXAMPLE_REF])
    ] = None,
    state: Annotated[ModelState | None, Query(description="only models in this state; for the list")] = None,
) -> Response:
    """What the node has: every model, or with `ref` the one it names. From memory, in about a millisecond."""
    await admit(request, Scope.READ)
    engine = engine_of(request)
    if ref is not None:
        return wire.reply(await engine.model(ref))
    return wire.reply({"models": engine.models(state)})


@router.post("", response_model=schemas.Model | schemas.DryRunView, responses=ACCEPTED)
async def ensure(request: Request, wish: schemas.Wish) -> Response:
    """Make a model ready: 200 with it if it is, else 202 with the job; the same wish twice is one fetch. With `dry_run`, what that would do."""
    caller = await admit(request, Scope.POD, f"make {wish.ref} ready")
    engine = engine_of(request)
    wanted = (await _in_full(engine, wish)).to_request()
    _check_allowed(request, caller, wanted)
    if wish.dry_run:
        extend(request, DRY_RUN_SECONDS)
        return wire.reply(_dry_run(await engine.dry_run(wanted)))
    answer = await engine.ensure(wanted, caller.holder("").rstrip("/"))
    return wire.reply(answer) if isinstance(answer, ModelStatus) else accepted(answer)


@router.get("/{entry}", response_model=schemas.ModelDetail)
async def show(request: Request, entry: Entry) -> Response:
    """One model with every file, what it was checked against, and who holds it. To look at it is not to use it: eviction takes no notice."""
    caller = await admit(request, Scope.READ)
    engine = engine_of(request)
    status = await engine.model(entry, use=False)
    held = sorted((lease for lease in engine.leases() if lease.entry == status.entry and caller.owns(lease)), key=lambda lease: lease.expires)
    holders = [{"lease": lease.lease, "holder": lease.holder, "expires": lease.expires} for lease in held]
    return wire.reply(wire.as_dict(status) | {"holders": holders, "manifest": wire.manifest_view(engine.manifest(status.entry))})


@router.delete("/{entry}", response_model=schemas.Model)
async def remove(request: Request, entry: Entry) -> Response:
    """Remove a model; 409 while it is leased, pinned or in use, and for a bare slug that has several revisions."""
    await admit(request, Scope.ADMIN, f"remove {entry}")
    return wire.reply(await engine_of(request).remove(entry))


@router.get("/{entry}/events", response_class=Response, responses={200: schemas.EVENTS})
async def events(request: Request, entry: Entry) -> Response:
    """Follow a model until it is ready, failed or gone. Reconnect with `Last-Event-ID`; polling the model works as well."""
    await admit(request, Scope.READ)
    engine = engine_of(request)
    lifecycle: Lifecycle = request.app.state.lifecycle
    status = await engine.model(entry)
    async with AsyncExitStack() as stack:
        queue = await stack.enter_async_context(engine.watch(status.entry))
        return EventStream(request, queue, stack.pop_all(), lifecycle)


@router.get("/{entry}/timeline", response_model=schemas.Timeline)
async def timeline(request: Request, entry: Entry) -> Response:
    """What happened to a model, and where the time of its last start went; also of one that is gone. Who asked and who held it is told to admins."""
    caller = await admit(request, Scope.READ)
    events = await engine_of(request).timeline(entry)
    slow = {id(event) for event in slowest(events)}
    return wire.reply({"entry": entry, "events": [_event(event, id(event) in slow, admin=caller.scope is Scope.ADMIN) for event in events]})


@router.put("/{entry}/pin", response_model=schemas.Model)
async def pin(request: Request, entry: Entry) -> Response:
    """Never remove this model to make room."""
    await admit(request, Scope.ADMIN, f"pin {entry}")
    return wire.reply(await engine_of(request).pin(entry, pinned=True))


@router.delete("/{entry}/pin", response_model=schemas.Model)
async def unpin(request: Request, entry: Entry) -> Response:
    """Let the model be removed again."""
    await admit(request, Scope.ADMIN, f"unpin {entry}")
    return wire.reply(await engine_of(request).pin(entry, pinned=False))


@router.post("/{entry}/verify", status_code=202, response_model=schemas.Accepted, responses=ACCEPTED)
async def verify(request: Request, entry: Entry, wish: schemas.VerifyWish | None = None) -> Response:
    """Read every byte back now and repair only the chunks that are bad."""
    await admit(request, Scope.ADMIN, f"verify {entry}")
    return accepted(await engine_of(request).verify(entry, wish.bandwidth if wish else None))


def _check_allowed(request: Request, caller: Caller, wanted: EnsureRequest) -> None:
    """Pods may ask for what `allow` names; what outlives their request or names things for others is the operator's."""
    gate: Gate = request.app.state.gate
    if caller.scope is Scope.ADMIN:
        return
    for field, given in (("pin", wanted.pin), ("alias", wanted.alias)):
        if given:
            raise RequestError(Code.NOT_ALLOWED, f"cannot make {wanted.ref} ready with {field}: only the admin scope may")
    if not gate.may_warm(caller, wanted.ref):
        raise RequestError(
            Code.NOT_ALLOWED,
            f"cannot make {wanted.ref} ready: no pattern of the setting allow matches it",
            hint="ask the operator for an `allow` pattern, or use the admin socket",
        )


def _event(event: Event, slow: bool, *, admin: bool) -> dict[str, object]:
    return wire.as_dict(event) | {"at": from_unix(event.at), "rate": event.rate, "slowest": slow, "who": event.who if admin else None}


async def _in_full(engine: Engine, wish: schemas.Wish) -> schemas.Wish:
    """The wish with a slug, an entry or a short revision of a model that is here written out; what a source may know stays as it is."""
    name = parse_name(wish.ref)
    if isinstance(name, Ref) and shortened(name) is None:
        return wish
    try:
        return wish.model_copy(update={"ref": (await engine.model(wish.ref)).ref})
    except RequestError as error:
        if error.code is not Code.UNKNOWN_MODEL:
            raise
        if isinstance(name, Ref):
            return wish  # a tag or a path that looks like one
        raise RequestError(error.code, str(error), hint="write it as org/name: a slug names only what is here") from error


def _dry_run(plan: DryRun) -> dict[str, object]:
    return wire.as_dict(plan) | {
        "left_out": [{"path": path, "size": size} for path, size in plan.left_out],
        "paths": [{"path": path, "size": size, "here": here} for path, size, here in plan.paths],
    }
