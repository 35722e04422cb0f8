"""The settings: one frozen object from defaults, a TOML file, the environment and flags, in that order of precedence. Where a client finds
the daemon is `environment`'s matter.

Every scalar setting `name` is `NVCACHE_NAME` in the environment; lists are separated by commas there. The ecosystem's own variables (`HF_ENDPOINT`,
`HF_TOKEN`, `HF_TOKEN_PATH`, `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`) are honoured and rank below nvcache's.
Secrets are never kept here: tokens are named by file and read when needed.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from nvcache.core.manifest import CHUNK
from nvcache.core.ref import parse_alias, parse_ref
from nvcache.environment import SYSTEM_DIRECTORY, current, default_socket
from nvcache.errors import Code, ConfigError, RequestError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(I?)B?")
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class ModelSetting(BaseModel):
    """One `[[models]]` table: a model this node keeps ready."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(description="the model, as `nvcache warm` takes it")
    revision: str | None = Field(None, description="branch, tag or commit; the source's default otherwise")
    pin: bool = Field(False, description="never remove it to make room")
    include: tuple[str, ...] = Field((), description="patterns of files to take instead of the default set")
    exclude: tuple[str, ...] = Field((), description="patterns of files to leave out")
    alias: str | None = Field(None, description="name in the HuggingFace view, for models that do not come from the Hub")


class Settings(BaseModel):
    """Everything that can be set. Sizes are bytes, times seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Path = Field(description="the store's root directory")
    socket: Path = Field(description="the Unix socket pods and people use (0660)")
    admin_socket: Path | None = Field(
        None, description="a second socket (0600) that may do everything; without it the daemon's own user may, on `socket`"
    )
    listen: str | None = Field(None, description="host:port to listen on over TCP as well; needs listen_token_file")
    listen_token_file: Path | None = Field(None, description="file with the bearer token for `listen`, read at each request")
    listen_scope: Literal["read", "pod", "admin"] = Field("read", description="what a bearer of the token may do")
    allow: tuple[str, ...] = Field(("hf://*",), description="references (shell patterns) that callers of the pods' socket may make ready")
    max_bytes: int | None = Field(
        None, gt=0, description="most bytes the store may hold; default: half of what is free, its own files counted as free"
    )
    min_free: int = Field(0, ge=0, description="bytes to leave free on the store's file system")
    workers: int = Field(0, ge=0, le=64, description="processes that fetch, hash and write; 0: one a core, at most 16")
    lanes: int = Field(4, ge=1, le=32, description="range requests in flight for each worker (each holds one chunk of 16 MiB)")
    stall_timeout: float = Field(20.0, gt=0, description="seconds without a byte after which a request is given up and tried anew")
    connect_timeout: float = Field(10.0, gt=0, description="seconds to wait for a connection")
    fetch_deadline: float = Field(600.0, gt=0, description="seconds a file may go without progress before its fill fails")
    resolve_ttl: float = Field(60.0, ge=0, description="seconds a moving revision such as main stays resolved")
    lease_ttl: float = Field(600.0, gt=0, le=86400, description="default life of a lease in seconds")
    direct_io: bool = Field(True, description="write around the page cache where the file system can")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is logged")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="JSON lines, or console on a terminal")
    hf_endpoint: str = Field("https://huggingface.co", description="the Hub or a mirror of it (HF_ENDPOINT)")
    hf_token_path: Path | None = Field(None, description="file with the Hub token (HF_TOKEN_PATH), read when needed")
    ca_file: Path | None = Field(None, description="certificates to trust instead of the system's (SSL_CERT_FILE)")
    models: tuple[ModelSetting, ...] = Field((), description="models this node keeps ready, one `[[models]]` table each; only in the file")

    @field_validator("max_bytes", "min_free", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("store", "socket", "admin_socket", "listen_token_file", "hf_token_path", "ca_file", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        try:
            return None if value is None else Path(os.path.abspath(value.expanduser()))  # noqa: PTH100 - Path.resolve would follow links
        except RuntimeError as error:  # ~somebody without a home
            raise ValueError(str(error)) from error

    @field_validator("hf_endpoint", mode="after")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError("it is not an http(s) URL")
        if "@" in url.netloc:
            raise ValueError("a URL with a password would be shown; name the token's file in hf_token_path")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _token_for_tcp(self) -> Settings:
        if self.listen and not self.listen_token_file:
            raise ValueError("to listen on TCP needs listen_token_file")
        return self

    @field_validator("models", mode="after")
    @classmethod
    def _readable(cls, value: tuple[ModelSetting, ...]) -> tuple[ModelSetting, ...]:
        for model in value:
            try:
                parse_ref(model.ref if model.revision is None else f"{model.ref}@{model.revision}")
                if model.alias is not None:
                    parse_alias(model.alias)
            except RequestError as error:
                raise ValueError(str(error)) from error
        return value

    @property
    def worker_count(self) -> int:
        """How many worker processes to run."""
        return self.workers or min(16, os.cpu_count() or 1)

    @property
    def buffer_bytes(self) -> int:
        """The most memory all workers together hold in chunk buffers."""
        return self.worker_count * self.lanes * CHUNK


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
    env = current() if environ is None else environ
    path = config or (Path(env["NVCACHE_CONFIG"]) if env.get("NVCACHE_CONFIG") else None)
    merged: dict[str, Any] = {}
    origin: dict[object, str] = {}
    for where, found in (
        ("the defaults", _defaults(env, os.geteuid() if uid is None else uid)),
        ("the environment", _ecosystem(env)),
        (f"config file {path}", _file(path)),
        ("the environment", _environment(env)),
        ("the command line", {name: value for name, value in (flags or {}).items() if value is not None}),
    ):
        merged |= found
        origin |= dict.fromkeys(found, where)
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise _unusable(error.errors()[0], origin) from error
    if settings.socket == SYSTEM_DIRECTORY / "nvcache.sock" and "admin_socket" not in merged:
        settings = settings.model_copy(update={"admin_socket": SYSTEM_DIRECTORY / "admin.sock"})
    return settings


def _unusable(fault: ErrorDetails, origin: Mapping[object, str]) -> ConfigError:
    """One fault that pydantic found, as our error; the value is not repeated, it may be a secret in the wrong place."""
    name = ".".join(str(part) for part in fault["loc"]) or "listen"  # only the settings as a whole have no name: `_token_for_tcp`
    where = origin.get(name.partition(".")[0], "the defaults")
    why = "there is no such setting" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    return ConfigError(Code.BAD_CONFIG, f"cannot use setting {name} from {where}: {why[:1].lower()}{why[1:]}", facts={"setting": name})


def parse_size(text: str) -> int:
    """`140GB`, `1.5 TiB`, `1024` → bytes, rounded down. Raises ValueError."""
    match = _SIZE.fullmatch(text.replace(" ", "").upper())
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{text[:80]!r} is not a size such as 140GB or 2TiB")
    return int(Fraction(match[1]) * (1024 if match[3] else 1000) ** _EXPONENT[match[2]])


def _defaults(env: Mapping[str, str], uid: int) -> dict[str, Any]:
    cache = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/root") / ".cache")
    return {"store": cache / "nvcache" / "store", "socket": default_socket(env, uid)}


def _ecosystem(env: Mapping[str, str]) -> dict[str, Any]:
    named = {"hf_endpoint": "HF_ENDPOINT", "hf_token_path": "HF_TOKEN_PATH", "ca_file": "SSL_CERT_FILE"}
    return {name: env[variable] for name, variable in named.items() if env.get(variable)}


def _file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(Code.BAD_CONFIG, f"cannot read config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(Code.BAD_CONFIG, f"cannot read config file {path}: {error}") from error


def _environment(env: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in Settings.model_fields:
        value = env.get(f"NVCACHE_{name.upper()}")
        if value and name != "models":
            found[name] = tuple(part.strip() for part in value.split(",") if part.strip()) if name == "allow" else value
    return found


def hub_token(settings: Settings, environ: Mapping[str, str] | None = None) -> str | None:
    """The Hub token as it is now: `HF_TOKEN`, else the token file; read at each call so that a rotated secret is seen. Never log it."""
    env = current() if environ is None else environ
    if env.get("HF_TOKEN"):
        return env["HF_TOKEN"].strip() or None
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/root") / ".cache") / "huggingface")
    try:
        return (settings.hf_token_path or home / "token").read_text().strip() or None
    except OSError:
        return None  # no file, no token: the Hub is asked anonymously


def proxies(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Proxy settings by scheme (`http`, `https`, `all`, `no`), lower-case first as curl does; values may hold credentials, never log them."""
    env = current() if environ is None else environ
    found: dict[str, str] = {}
    for scheme in ("http", "https", "all", "no"):
        value = env.get(f"{scheme}_proxy") or env.get(f"{scheme.upper()}_PROXY")
        if value:
            found[scheme] = value
    return found


def proxy_hosts(proxies: Mapping[str, str]) -> dict[str, str]:
    """The `host[:port]` of each proxy by scheme, which may be shown: user names and passwords are left out."""
    found: dict[str, str] = {}
    for scheme, url in proxies.items():
        if scheme != "no":
            rest = url.partition("://")[2] or url
            found[scheme] = re.split(r"[/?#]", rest.rpartition("@")[2])[0]
    return found


def child_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a worker process is given: no secret, no proxy; those reach it by its control pipe."""
    env = current() if environ is None else environ
    keep = ("PATH", "LANG", "LC_ALL", "HOME", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")
    return {name: env[name] for name in keep if name in env}
