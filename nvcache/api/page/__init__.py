"""The page for people: its files and the headers they are sent with. It serves nothing; the daemon and `nvcache ui` do.

The files hold nothing about the node, so that anybody who may connect may have them: what they show they ask of the API, as whoever looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

_JAVASCRIPT = "text/javascript; charset=utf-8"
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": _JAVASCRIPT,
    "stream.js": _JAVASCRIPT,
    "view.js": _JAVASCRIPT,
    "words.js": _JAVASCRIPT,
    "icon.svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, nobody's frame; and no text ever becomes markup, where the browser knows trusted types.
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
)


@dataclass(frozen=True, slots=True)
class Sheet:
    """One file: its bytes and its media type."""

    content: bytes
    media_type: str


def sheets() -> dict[str, Sheet]:
    """Every file by the path it is asked for; `/` is the page itself."""
    folder = resources.files(__name__)
    return {f"/{'' if name == 'index.html' else name}": Sheet((folder / name).read_bytes(), kind) for name, kind in _TYPES.items()}
