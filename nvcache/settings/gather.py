"""What is set, and where: defaults, the ecosystem's variables, the file, the environment, flags, in that order of precedence. It judges no value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nvcache.environment import current, default_socket
from nvcache.settings import file
from nvcache.settings.daemon import LISTS, TABLES, Settings

SHARED = {"hf_endpoint": "HF_ENDPOINT", "hf_token_path": "HF_TOKEN_PATH", "az_account": "AZURE_STORAGE_ACCOUNT", "ca_file": "SSL_CERT_FILE"}
PREFIX = "NVCACHE_"


class Kind(StrEnum):
    """Where a value comes from; a later one counts before an earlier one."""

    DEFAULT = "default"
    ECOSYSTEM = "ecosystem"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from. `name` is the variable, the file or the flag; a default has none."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.kind)

    @property
    def words(self) -> str:
        """As it reads after "from"."""
        match self.kind:
            case Kind.DEFAULT:
                return "the defaults"
            case Kind.FILE:
                return f"config file {self.name}"
            case Kind.FLAG:
                return "the command line"
            case _:
                return "the environment"


NOWHERE = Origin(Kind.DEFAULT)


@dataclass(frozen=True, slots=True)
class Given:
    """What settings are taken from, to take them again later: the same flags and environment, the file as it is then."""

    config: Path | None
    flags: Mapping[str, object]
    environ: Mapping[str, str]
    uid: int

    @classmethod
    def of(
        cls,
        *,
        config: Path | None = None,
        flags: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        uid: int | None = None,
    ) -> Given:
        """`config` falls back to `NVCACHE_CONFIG`; flags with value None are not set."""
        env = current() if environ is None else environ
        path = config or (Path(env["NVCACHE_CONFIG"]) if env.get("NVCACHE_CONFIG") else None)
        chosen = {name: value for name, value in (flags or {}).items() if value is not None}
        return cls(path, chosen, env, os.geteuid() if uid is None else uid)

    @property
    def followed(self) -> bool:
        """Whether there is a file that can be read again: a pipe cannot."""
        return self.config is not None and self.config.is_file()

    def gather(self) -> Gathered:
        """Every value that is set, as it is written. Raises `ConfigError` (bad-config) for a file that cannot be read."""
        defaults = _defaults(self.environ, self.uid)
        document = file.read(self.config) if self.config is not None else None
        found = Gathered(dict(defaults), dict.fromkeys(defaults, NOWHERE), defaults, document)
        for name, variable in SHARED.items():
            found.put(name, self.environ.get(variable), Origin(Kind.ECOSYSTEM, variable))
        for name, value in (document.values if document is not None else {}).items():
            found.set(name, value, Origin(Kind.FILE, str(self.config)))
        for name in Settings.model_fields:
            if name not in TABLES:
                found.put(name, self._variable(name), Origin(Kind.ENVIRONMENT, f"{PREFIX}{name.upper()}"))
        for name, value in self.flags.items():
            found.set(name, value, Origin(Kind.FLAG, f"--{name.replace('_', '-')}"))
        return found

    def _variable(self, name: str) -> object:
        value = self.environ.get(f"{PREFIX}{name.upper()}")
        return tuple(part.strip() for part in value.split(",") if part.strip()) if value and name in LISTS else value


@dataclass(frozen=True, slots=True)
class Gathered:
    """Values as they are written, by setting, and the origin of each; `defaults` are of those that have no fixed one, `document` is the file's."""

    values: dict[str, Any]
    origins: dict[str, Origin]
    defaults: dict[str, Any]
    document: file.Document | None = None

    def set(self, name: str, value: object, origin: Origin) -> None:
        """It counts before what was there."""
        self.values[name], self.origins[name] = value, origin

    def put(self, name: str, value: object, origin: Origin) -> None:
        """The same of a variable; an empty one is not set."""
        if value:
            self.set(name, value, origin)

    def origin(self, setting: str) -> Origin:
        """Where a setting comes from, also one of a table's (`models.0.ref`)."""
        return self.origins.get(setting.partition(".")[0], NOWHERE)

    def line(self, setting: str) -> int | None:
        """The line of the file that a setting comes from, if it does and that can be told."""
        return self.document.line(setting) if self.document is not None and self.origin(setting).kind is Kind.FILE else None


def _defaults(env: Mapping[str, str], uid: int) -> dict[str, Any]:
    cache = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/root") / ".cache")
    return {"store": cache / "nvcache" / "store", "socket": default_socket(env, uid)}
