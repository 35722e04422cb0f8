"""Looks at everything the settings are taken from and says all that is wrong, not only the first. It changes nothing and asks no daemon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from nvcache.errors import ConfigError
from nvcache.settings.daemon import Settings
from nvcache.settings.gather import PREFIX, Given, Kind, Origin
from nvcache.settings.load import Fault, judge

FILES = ("listen_token_file", "hf_token_path", "az_connection_string_file", "az_key_file", "az_sas_file", "ca_file")
CLIENTS = ("CONFIG", "HOLDER", "MODEL", "TOKEN_FILE", "URL")  # variables of other commands
ALIKE = 0.8  # from which on two names are taken for one that is misspelt: Kubernetes makes NVCACHE_ variables of Services


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, `fatal` for one that ends `nvcache serve`. `setting` and `origin` are None where it is about the file as a whole.

    `line` is the file's, from 1, where it is known.
    """

    fatal: bool
    setting: str | None
    origin: Origin | None
    message: str
    hint: str
    line: int | None = None


def check(given: Given) -> tuple[Finding, ...]:
    """What is wrong with the settings that `given` makes, faults first, in the order of the file; empty when nothing is. Reads the files it names."""
    try:
        found = given.gather()
    except ConfigError as error:
        return (Finding(True, None, None, str(error), error.hint), *_misspelt(given))
    settings, faults = judge(found)
    wrong = {fault.setting for fault in faults}
    named = {name: Path(str(found.values[name])).expanduser() for name in FILES if found.values.get(name) is not None and name not in wrong}
    if settings is not None:
        tokens = {f"mirrors.{number}.token_file": mirror.token_file for number, mirror in enumerate(settings.mirrors)}
        named |= {name: path for name, path in tokens.items() if path is not None}
    return (
        *(_of(fault) for fault in sorted(faults, key=lambda fault: fault.line or 0)),
        *_misspelt(given),
        *(_unreadable(name, path, found.origin(name), why) for name, path in named.items() if (why := _why_unreadable(path))),
    )


def _of(fault: Fault) -> Finding:
    return Finding(True, fault.setting, fault.origin, str(fault), fault.hint, fault.line)


def _unreadable(name: str, path: Path, origin: Origin, why: str) -> Finding:
    return Finding(
        False,
        name,
        origin,
        f"cannot read {name} {path}: {why}",
        "it is read when it is needed, by the daemon's user where the daemon runs; correct the name or the file's owner if that is here",
    )


def _why_unreadable(path: Path) -> str | None:
    """Why nothing comes of reading the file, in words."""
    if path.exists() and not path.is_file():
        return "it is not a file"
    try:
        with path.open("rb") as file:
            return None if file.read(4096).strip() else "it is empty"
    except OSError as error:
        return error.strerror or str(error)


def _misspelt(given: Given) -> Iterator[Finding]:
    """Variables that look like a setting's and are not: the daemon passes them over."""
    known = [name.upper() for name in Settings.model_fields]
    for variable in sorted(given.environ):
        name = variable.removeprefix(PREFIX)
        near = get_close_matches(name, known, 1, ALIKE)
        if variable.startswith(PREFIX) and near and name not in (*known, *CLIENTS):
            why = f"cannot use {variable}: there is no such setting, so it is passed over"
            yield Finding(False, None, Origin(Kind.ENVIRONMENT, variable), why, f"did you mean {PREFIX}{near[0]}?")
