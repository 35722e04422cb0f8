"""Leases: hold a model while loading it. Pods see and touch only their own."""

from __future__ import annotations

import functools
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from nvcache.api import schemas, wire
from nvcache.api.routes.common import Entry, admit, engine_of
from nvcache.api.scope import Scope, same_holder
from nvcache.errors import Code, RequestError

router = APIRouter(prefix="/v1", tags=["leases"], responses=schemas.PROBLEMS)
LeaseId = Annotated[str, Path(max_length=128, description="the lease, as it was given")]


@router.get("/leases", response_model=schemas.Leases)
async def listing(request: Request) -> Response:
    """Every lease on the node."""
    await admit(request, Scope.ADMIN, "list the leases")
    return wire.reply({"leases": engine_of(request).leases()})


@router.post("/models/{entry}/leases", status_code=201, response_model=schemas.Lease)
async def take(request: Request, entry: Entry, wish: schemas.LeaseWish) -> Response:
    """Hold a ready model: its bytes are not removed until the lease is released or runs out. `adopt` takes over a lease of the same holder."""
    caller = await admit(request, Scope.POD, f"lease {entry}")
    if wish.adopt and not wish.holder:
        raise RequestError(Code.BAD_REQUEST, f"cannot adopt a lease on {entry}: no holder is named", hint="give the words that it was taken with")
    holder = caller.holder(wish.holder)
    adopts = functools.partial(same_holder, holder) if wish.adopt else None
    return wire.reply(await engine_of(request).lease(entry, holder, wish.ttl_s, adopts), 201)


@router.put("/models/{entry}/leases/{lease}", response_model=schemas.Lease)
async def renew(request: Request, entry: Entry, lease: LeaseId, wish: schemas.Renewal | None = None) -> Response:
    """Hold it for longer, counted from now."""
    await _own(request, lease)
    return wire.reply(await engine_of(request).renew(entry, lease, wish.ttl_s if wish else None))


@router.delete("/models/{entry}/leases/{lease}", status_code=204, response_class=Response)
async def release(request: Request, entry: Entry, lease: LeaseId) -> Response:
    """Let go of it."""
    await _own(request, lease)
    await engine_of(request).release(entry, lease)
    return Response(status_code=204)


async def _own(request: Request, lease: str) -> None:
    caller = await admit(request, Scope.POD, f"change lease {lease}")
    held = next((found for found in engine_of(request).leases() if found.lease == lease), None)
    if held is not None and not caller.owns(held):
        raise RequestError(
            Code.NOT_ALLOWED, f"cannot change lease {lease!r}: another user holds it", hint="only who took it, or the admin socket, may"
        )
