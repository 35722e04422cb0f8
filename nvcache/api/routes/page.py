"""The page for people, at `/`. It is the same for everybody and tells nothing of the node, so nobody is asked who he is; what it shows it asks of the
API. Where TCP has metrics alone, the door is shut before it.
"""

from __future__ import annotations

from types import MappingProxyType

from fastapi import APIRouter, Request
from starlette.responses import Response

from nvcache.api import page

SHEETS = MappingProxyType(page.sheets())
router = APIRouter(include_in_schema=False)


async def show(request: Request) -> Response:
    """One of its files."""
    sheet = SHEETS[request.url.path]
    return Response(sheet.content, headers=dict(page.HEADERS), media_type=sheet.media_type)


for path in SHEETS:
    router.add_api_route(path, show)
