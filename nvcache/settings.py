"""The settings: one frozen object from defaults, a TOML file, the environment and flags, in that order of precedence. The only reader of os.environ.

Every scalar setting `name` is `NVCACHE_NAME` in the environment; lists are separated by commas there. The ecosystem's own variables (`HF_ENDPOINT`,
`HF_TOKEN`, `HF_TOKEN_PATH`, `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`) are honoured and rank below nvcache's.
Secrets are never kept here: tokens are named by file and read when needed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nvcache.core.manifest import CHUNK
from nvcache.core.ref import parse_ref
from nvcache.errors import Code, ConfigError, RequestError

SYSTEM_DIRECTORY = Path("/run/nvcache")
SIZE_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class ModelSetting(BaseModel):
    """One `[[models]]` table: a model this node keeps ready."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str
    revision: str | None = None
    pin: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    alias: str | None = None


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
    max_bytes: int | None = Field(None, description="most bytes the store may hold; default: half of what is free, its own files counted as free")
    min_free: int = Field(0, description="bytes to leave free on the store's file system")
    workers: int = Field(0, ge=0, le=64, description="processes that fetch, hash and write; 0: one a core, at most 16")
    lanes: int = Field(4, ge=1, le=32, description="range requests in flight for each worker (each holds one chunk of 16 MiB)")
    stall_timeout: float = Field(20.0, gt=0, description="seconds without a byte after which a request is given up and tried anew")
    connect_timeout: float = Field(10.0, gt=0, description="seconds to wait for a connection")
    fetch_deadline: float = Field(600.0, gt=0, description="seconds a file may go without progress before its fill fails")
    resolve_ttl: float = Field(60.0, ge=0, description="seconds a moving revision such as main stays resolved")
    lease_ttl: float = Field(600.0, gt=0, le=86400, description="default life of a lease in seconds")
    direct_io: bool = Field(True, description="write around the page cache where the file system can")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = Field("auto", description="JSON lines, or console on a terminal")
    hf_endpoint: str = Field("https://huggingface.co", description="the Hub or a mirror of it (HF_ENDPOINT)")
    hf_token_path: Path | None = Field(None, description="file with the Hub token (HF_TOKEN_PATH), read when needed")
    ca_file: Path | None = Field(None, description="certificates to trust instead of the system's (SSL_CERT_FILE)")
    models: tuple[ModelSetting, ...] = ()

    @field_validator("max_bytes", "min_free", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("store", "socket", "admin_socket", "listen_token_file", "hf_token_path", "ca_file", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else Path(os.path.abspath(value.expanduser()))  # noqa: PTH100 - Path.resolve would follow links

    @field_validator("models", mode="after")
    @classmethod
    def _readable(cls, value: tuple[ModelSetting, ...]) -> tuple[ModelSetting, ...]:
        for model in value:
            try:
                parse_ref(model.ref if model.revision is None else f"{model.ref}@{model.revision}")
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
    env = os.environ if environ is None else environ
    path = config or (Path(env["NVCACHE_CONFIG"]) if env.get("NVCACHE_CONFIG") else None)
    merged: dict[str, Any] = _defaults(env, os.geteuid() if uid is None else uid)
    merged |= _file(path)
    merged |= _environment(env)
    merged |= {name: value for name, value in (flags or {}).items() if value is not None}
    system = SYSTEM_DIRECTORY / "nvcache.sock"
    if Path(merged["socket"]) == system:
        merged.setdefault("admin_socket", SYSTEM_DIRECTORY / "admin.sock")
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the settings"
        raise ConfigError(Code.BAD_CONFIG, f"cannot use setting {where}: {first['msg']}") from error
    if settings.listen and not settings.listen_token_file:
        raise ConfigError(Code.BAD_CONFIG, "cannot use setting listen: listening on TCP needs listen_token_file")
    if urlsplit(settings.hf_endpoint).scheme not in ("http", "https"):
        raise ConfigError(Code.BAD_CONFIG, f"cannot use setting hf_endpoint: {settings.hf_endpoint!r} is not an http(s) URL")
    return settings


def client_url(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """Where commands look for the daemon: `NVCACHE_URL`, else the socket in `NVCACHE_SOCKET`, else the default socket (admin first) as unix:// URL."""
    env = os.environ if environ is None else environ
    if env.get("NVCACHE_URL"):
        return env["NVCACHE_URL"]
    if env.get("NVCACHE_SOCKET"):
        return f"unix://{os.path.abspath(env['NVCACHE_SOCKET'])}"  # noqa: PTH100
    socket = _default_socket(env, os.geteuid() if uid is None else uid)
    admin = socket.with_name("admin.sock")
    if os.access(admin, os.W_OK):
        return f"unix://{admin}"
    system = SYSTEM_DIRECTORY / "nvcache.sock"
    return f"unix://{system if not socket.exists() and os.access(system, os.W_OK) else socket}"


def parse_size(text: str) -> int:
    """`140GB`, `1.5 TiB`, `1024` → bytes. Raises ValueError."""
    cleaned = text.strip().replace(" ", "").upper()
    digits = cleaned.rstrip("KMGTIB")
    unit = cleaned[len(digits) :].removesuffix("B") if len(cleaned) > len(digits) else ""
    if unit not in SIZE_UNITS or not digits:
        raise ValueError(f"{text!r} is not a size such as 140GB or 2TiB")
    return int(float(digits) * SIZE_UNITS[unit])


def _default_socket(env: Mapping[str, str], uid: int) -> Path:
    if uid == 0:
        return SYSTEM_DIRECTORY / "nvcache.sock"
    runtime = env.get("XDG_RUNTIME_DIR")
    return Path(runtime or f"/tmp/nvcache-{uid}") / "nvcache" / "nvcache.sock"  # noqa: S108 - made 0700 and owner-checked by api.serve


def _defaults(env: Mapping[str, str], uid: int) -> dict[str, Any]:
    cache = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/root") / ".cache")
    found: dict[str, Any] = {"store": cache / "nvcache" / "store", "socket": _default_socket(env, uid)}
    for name, variable in {"hf_endpoint": "HF_ENDPOINT", "hf_token_path": "HF_TOKEN_PATH", "ca_file": "SSL_CERT_FILE"}.items():
        if env.get(variable):
            found[name] = env[variable]
    return found


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
    env = os.environ if environ is None else environ
    if env.get("HF_TOKEN"):
        return env["HF_TOKEN"].strip() or None
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/root") / ".cache") / "huggingface")
    try:
        return (settings.hf_token_path or home / "token").read_text().strip() or None
    except OSError:
        return None  # no file, no token: the Hub is asked anonymously


def proxies(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Proxy settings by scheme (`http`, `https`, `all`, `no`), lower-case variables first as curl does; values may hold credentials, never log them."""
    env = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for scheme in ("http", "https", "all", "no"):
        value = env.get(f"{scheme}_proxy") or env.get(f"{scheme.upper()}_PROXY")
        if value:
            found[scheme] = value
    return found


def child_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a worker process is given: no secret, no proxy; those reach it by its control pipe."""
    env = os.environ if environ is None else environ
    keep = ("PATH", "LANG", "LC_ALL", "HOME", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")
    return {name: env[name] for name in keep if name in env}
