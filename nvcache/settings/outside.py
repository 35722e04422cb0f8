"""What the daemon needs from outside and never keeps: secrets by file or variable, proxies, what workers are given. Never log any of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from nvcache.environment import current
from nvcache.errors import Code, ConfigError
from nvcache.settings.daemon import Settings
from nvcache.sources.azure.access import Access
from nvcache.sources.http import Transport


def source_transport(settings: Settings) -> Transport:
    """How to reach sources, by the settings and the environment's proxies."""
    return Transport(
        connect_timeout=settings.connect_timeout,
        stall_timeout=settings.stall_timeout,
        deadline=settings.fetch_deadline,
        ca_file=str(settings.ca_file) if settings.ca_file else None,
        proxies=proxies(),
    )


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


def azure_access(settings: Settings, environ: Mapping[str, str] | None = None) -> Access:
    """What is known for Azure now: files first, then the variables that Azure's own tools read. Made at each call, so that what rotates is seen.

    Raises `ConfigError` (bad-config) when a file that is named cannot be read: going on without it would be refused for another reason.
    """
    env = current() if environ is None else environ

    def secret(name: str, variable: str) -> str | None:
        file: Path | None = getattr(settings, name)
        if file is None:
            return env.get(variable, "").strip() or None
        try:
            return file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(Code.BAD_CONFIG, f"cannot read {name} {file}: {why}", facts={"setting": name}) from error

    def source(name: str, variable: str) -> str:
        file: Path | None = getattr(settings, name)
        return variable if file is None else f"{name} {file}"

    return Access(
        connection_string=secret("az_connection_string_file", "AZURE_STORAGE_CONNECTION_STRING"),
        account=settings.az_account,
        key=secret("az_key_file", "AZURE_STORAGE_KEY"),
        sas=secret("az_sas_file", "AZURE_STORAGE_SAS_TOKEN"),
        credential=settings.az_credential,
        suffix=settings.az_suffix,
        hosts=settings.az_hosts,
        connection_string_from=source("az_connection_string_file", "AZURE_STORAGE_CONNECTION_STRING"),
        key_from=source("az_key_file", "AZURE_STORAGE_KEY"),
        sas_from=source("az_sas_file", "AZURE_STORAGE_SAS_TOKEN"),
    )


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


def traces_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether OpenTelemetry's own variables ask for traces: an OTLP endpoint or exporter is named, and nothing switches it off.

    Raises `ConfigError` (bad-config) for a protocol other than http/protobuf, which is all that nvcache speaks.
    """
    env = current() if environ is None else environ
    exporter = env.get("OTEL_TRACES_EXPORTER", "").strip()
    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    named = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or not (exporter == "otlp" or (not exporter and named)):
        return False
    if protocol.strip() != "http/protobuf":
        why = f"the protocol is {protocol}; set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL to http/protobuf and name the collector's port for it, mostly 4318"
        raise ConfigError(Code.BAD_CONFIG, f"cannot export traces: {why}")
    return True
