"""Writes settings as the TOML file would have them, and as plain data. Secrets are no settings; what of one a URL might hold is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nvcache.settings.daemon import SIZES, TABLES, Settings
from nvcache.settings.disks import DiskSettings
from nvcache.settings.sizes import format_size

_PASSWORD = re.compile(r"(?i)(https?://)[^/?#\s]*@")
_SIGNATURE = re.compile(r"(?i)(https?://[^?#\s]*)[?#]\S*")
_NAMES = sorted(Settings.model_fields, key=DiskSettings.model_fields.__contains__)
HIDDEN = "***"


def plain(settings: Settings) -> dict[str, Any]:
    """Every setting by name, those of the disks last: sizes in bytes, times in seconds, None for what is not set."""
    return {name: _plain(getattr(settings, name)) for name in _NAMES}


def lines(settings: Settings, remarks: Mapping[str, str]) -> Iterator[str]:
    """The lines of a file with these settings. `remarks` (setting → text) follow each; what is not set is a remark as a whole."""
    values = {name: getattr(settings, name) for name in _NAMES}
    written = {name: _line(name, value) for name, value in values.items() if name not in TABLES}
    width = min(44, max(map(len, written.values()))) if remarks else 0

    def remarked(line: str, name: str) -> str:
        return f"{line:<{width}}  # {remarks[name]}" if name in remarks else line

    yield from (remarked(line, name) for name, line in written.items())
    for name in TABLES:
        if values[name] == ():
            yield ""
            yield remarked(f"# no [[{name}]]", name)
        for head, table in _tables(name, values[name]):
            yield ""
            yield remarked(head, name)
            yield from (f"{key} = {_toml(key, value)}" for key, value in table if value is not None)


def _line(name: str, value: object) -> str:
    return f"# {name} is not set" if value is None else f"{name} = {_toml(name, value)}"


def _tables(name: str, value: object) -> Iterator[tuple[str, BaseModel]]:
    """Each table of a setting that is one or a list of them, with the line it begins with; inner ones stand by themselves."""
    if isinstance(value, tuple):
        yield from ((f"[[{name}]]", each) for each in value)
    elif isinstance(value, BaseModel):
        inner = [(key, each) for key, each in value if isinstance(each, BaseModel)]
        if not inner:
            yield f"[{name}]", value
        for key, each in inner:
            yield from _tables(f"{name}.{key}", each)


def _toml(name: str, value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() if name in SIZES:
            return json.dumps(format_size(value))
        case int():
            return str(value)
        case float():
            return repr(value)
        case tuple():
            return f"[{', '.join(_toml(name, each) for each in value)}]"
        case _:
            return json.dumps(shown(str(value)), ensure_ascii=False).replace("\x7f", "\\u007f")


def _plain(value: object) -> Any:
    match value:
        case BaseModel():
            return {key: _plain(each) for key, each in value}
        case tuple():
            return [_plain(each) for each in value]
        case Path() | str():
            return shown(str(value))
        case _:
            return value


def shown(text: str) -> str:
    """The text without what a URL in it might keep secret: user, password, query."""
    return _SIGNATURE.sub(rf"\1?{HIDDEN}", _PASSWORD.sub(rf"\1{HIDDEN}@", text))
