"""Makes the settings of what is gathered, or says every fault of it: the setting, where it comes from, what is wrong. It holds no secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nvcache.environment import SYSTEM_DIRECTORY
from nvcache.errors import FACTS, Code, ConfigError
from nvcache.settings.daemon import TABLES, Settings
from nvcache.settings.gather import Gathered, Given, Kind, Origin

_PLACE = frozenset({"store", "mount", "backend", "follow"})  # what says where the store is
_UNKNOWN = "there is no such setting"
_NO_LIST = "it is not a list"
_PLAIN = {"extra_forbidden": _UNKNOWN, "model_type": "it is not a table", "tuple_type": _NO_LIST}
_LOCATED = 20  # faults of which the line is looked for: with more, the file is no settings of ours


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a value cannot be used. `setting` names one of a table with its path, such as `models.0.ref`; `line` is the file's, from 1, if known.

    The value is never repeated.
    """

    setting: str
    origin: Origin
    why: str
    hint: str = ""  # where there is more to say than that it is to be corrected
    line: int | None = None

    def __str__(self) -> str:
        where = f" (at line {self.line})" if self.line else ""  # as tomllib says it
        return f"cannot use setting {self.setting} from {self.origin.words}: {self.why}{where}"


def load(
    *,
    config: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    uid: int | None = None,
) -> Settings:
    """Read the settings. `flags` with value None are not set.

    `config` falls back to `NVCACHE_CONFIG`. Raises `ConfigError` (bad-config) naming the setting, its source and what is wrong.
    """
    return take(Given.of(config=config, flags=flags, environ=environ, uid=uid))


def take(given: Given) -> Settings:
    """The settings of what is given, as it is now. Raises `ConfigError` (bad-config) with the first fault."""
    settings, faults = judge(given.gather())
    if settings is None:
        first, more = faults[0], len(faults) - 1
        hint = first.hint or FACTS[Code.BAD_CONFIG].hint
        hint += f" (`nvcache config check` shows {more} more fault{'' if more == 1 else 's'})" if more else ""
        raise ConfigError(Code.BAD_CONFIG, str(first), hint=hint, facts={"setting": first.setting})
    return settings


def judge(found: Gathered) -> tuple[Settings | None, tuple[Fault, ...]]:
    """The settings, or everything that is wrong with them. What has a fault is set aside and the rest looked at again: one may hide another."""
    faults = list(_said_twice(found))
    values, aside, settings = dict(found.values), set[str](), None
    while settings is None:
        try:
            settings = Settings(**values)
        except ValidationError as error:
            bad = set()
            for each in error.errors():
                top, fault = _fault(each, found)
                bad.add(top)
                if aside.isdisjoint((top, *each.get("ctx", {}).get("with", ()))):  # else it may be wrong only for want of what was set aside
                    faults.append(fault)
            if bad <= aside:
                break  # a default of this machine is at fault
            aside |= bad
            values = {name: value for name, value in values.items() if name not in aside} | {
                name: value for name, value in found.defaults.items() if name in aside
            }
    if settings is not None and aside.isdisjoint(_PLACE):
        settings, misplaced = _on_stripe(_with_admin(settings, found), found.origin("store"))
        faults += misplaced
    located = (replace(fault, line=found.line(fault.setting)) for fault in faults[:_LOCATED])
    return (None if faults else settings), (*located, *faults[_LOCATED:])


def _with_admin(settings: Settings, found: Gathered) -> Settings:
    if settings.socket == SYSTEM_DIRECTORY / "nvcache.sock" and "admin_socket" not in found.values:
        return settings.model_copy(update={"admin_socket": SYSTEM_DIRECTORY / "admin.sock"})
    return settings


def _said_twice(found: Gathered) -> Iterator[Fault]:
    """A file that gives the read-ahead in both its places; a flag or a variable counts before the file, as ever."""
    tuning = found.values.get("tuning")
    tables = tuning.items() if isinstance(tuning, dict) else ()
    named = [kind for kind, table in tables if isinstance(table, dict) and "read_ahead" in table]
    if named and found.origins.get("read_ahead") == found.origins["tuning"]:
        yield Fault("read_ahead", found.origins["tuning"], f"tuning.{named[0]}.read_ahead is there as well", "keep one of them")


def _on_stripe(settings: Settings, origin: Origin) -> tuple[Settings, list[Fault]]:
    """The settings with the store where the stripe's is, or the fault that the operator wants it elsewhere."""
    store = settings.mount / "store"
    if not settings.follow and settings.backend not in ("md", "lvm"):
        return settings, []
    if origin.kind is Kind.DEFAULT:
        return settings.model_copy(update={"store": store}), []
    if settings.store != store and not settings.follow:  # who follows is told where it is
        why = f"with backend {settings.backend} the store is {store}"
        return settings, [Fault("store", origin, why, "leave store out, or set mount to the directory that is to hold `store`")]
    return settings, []


def _fault(error: ErrorDetails, found: Gathered) -> tuple[str, Fault]:
    """One that pydantic found, and the setting of the file's top that it is in; the value is not repeated, it may be a secret in the wrong place."""
    name = ".".join(str(part) for part in error["loc"]) or str(error["ctx"]["setting"])  # `Settings._together` says which
    why = _PLAIN.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    hint = _suggestion(error["loc"]) if why == _UNKNOWN else _brackets(name) if why == _NO_LIST else ""
    return name.partition(".")[0], Fault(name, found.origin(name), f"{why[:1].lower()}{why[1:]}", hint)


def _suggestion(loc: tuple[int | str, ...]) -> str:
    """What an unknown setting was probably meant to be."""
    *above, name = loc
    if above and name in Settings.model_fields:
        return f"put {name} above the file's first table: what follows a line in brackets belongs to that table"
    near = get_close_matches(str(name).lower().replace("-", "_"), fields_of(above), 1)
    return f"did you mean {near[0]}?" if near else "docs/settings.md has every setting"


def _brackets(name: str) -> str:
    """How a list is written."""
    return f"begin each of them with a line [[{name}]]" if name in TABLES else f'write it in brackets: {name.rpartition(".")[2]} = ["…"]'


def fields_of(above: list[int | str]) -> list[str]:
    """The settings that there are in a table, by its path; without one, those of the file's top."""
    model: type[BaseModel] = Settings
    for part in above:
        if isinstance(part, str):
            annotation: Any = model.model_fields[part].annotation
            model = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
