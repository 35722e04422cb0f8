"""Mirrors: where a file with a known SHA-256 may be had besides its source. It makes URLs and asks nobody, and trusts none of them: digests decide.

A mirror is asked with little patience. What it sends is compared with the digest that the source published, so the worst it can do is to cost time,
and that is bounded: a connection within seconds, `SLOWEST` bytes a second from each, no second try, no redirect to another origin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from nvcache.core.plan import RemoteFile
from nvcache.core.ref import Ref, Scheme
from nvcache.errors import Code, ConfigError
from nvcache.sources.base import HttpRemote
from nvcache.sources.http import Target, Transport

CONNECT_S = 2.0
STALL_S = 5.0
SLOWEST = 2**20  # bytes a second of one connection: a slower mirror is worth less than the source it is to spare
PLACEHOLDERS = ("sha256", "model", "revision", "path")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Mirror:
    """One mirror. `url` is a template with `{sha256}`, or with `{model}` and `{path}` (and `{revision}`), which means models of the Hub alone.

    `token_file` holds a bearer token, or a SAS (which has `sv=` and `sig=`). Raises ValueError for a template that cannot be used.
    """

    name: str
    url: str = field(repr=False)
    token_file: Path | None = None

    def __post_init__(self) -> None:
        fields = set(_PLACEHOLDER.findall(self.url))
        if unknown := sorted(fields - set(PLACEHOLDERS)):
            raise ValueError(f"there is no {{{unknown[0]}}}, only {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}")
        if "{" in (rest := _PLACEHOLDER.sub("", self.url)) or "}" in rest:
            raise ValueError("a brace is left open")
        if not fields & {"sha256", "path"}:
            raise ValueError("it needs {sha256}, or {model} and {path}, where a file's own part goes")
        if "sha256" not in fields and "model" not in fields:
            raise ValueError("{path} needs {model} as well: many models have a file of that name")
        if not self.url.isprintable() or " " in self.url:
            raise ValueError("a URL has no spaces; write %20")
        parts = urlsplit(self.url)
        if "{" in parts.netloc:
            raise ValueError("the host must be written out")
        Target.parse(_PLACEHOLDER.sub("x", self.url))
        if "@" in parts.netloc or "sig" in (name.lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
            raise ValueError("a URL with a password or a signature would be shown; put it into token_file")
        if parts.fragment:
            raise ValueError("a URL that is asked for has no #fragment")

    @property
    def origin(self) -> str:
        """scheme://host[:port]"""
        return Target.parse(_PLACEHOLDER.sub("x", self.url)).origin

    def knows(self, ref: Ref) -> bool:
        """Whether it may have files of that model: one that is asked by name has those of the Hub."""
        return ref.scheme is Scheme.HF or set(_PLACEHOLDER.findall(self.url)) == {"sha256"}

    def locate(self, ref: Ref, file: RemoteFile, sha256: str) -> HttpRemote:
        """Where it has the file, if it does, with what opens it. Reads the token's file; raises `ConfigError` (bad-config) if that cannot be read."""
        values = {"sha256": sha256, "model": ref.location, "revision": ref.revision or "", "path": file.path}
        url = _PLACEHOLDER.sub(lambda found: quote(values[found[1]], safe="/"), self.url)
        secret = self._secret()
        if {"sv", "sig"} <= {name for name, _ in parse_qsl(secret)}:
            url, secret = f"{url}{'&' if '?' in url else '?'}{secret}", ""
        headers = (("Authorization", f"Bearer {secret}"),) if secret else ()
        return HttpRemote(url=url, size=file.size, headers=headers, origin=self.origin, name=file.path, stay=True)

    def _secret(self) -> str:
        if self.token_file is None:
            return ""
        try:
            secret = self.token_file.read_text().strip().removeprefix("?")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(Code.BAD_CONFIG, f"cannot read the token of mirror {self.name}, {self.token_file}: {why}") from error
        if not secret or not secret.isprintable() or " " in secret:
            raise ConfigError(Code.BAD_CONFIG, f"cannot use the token of mirror {self.name}: {self.token_file} does not hold one word")
        return secret


def impatient(transport: Transport) -> Transport:
    """How mirrors are asked: as sources are, but with the first failure as the last, and no patience with who is slow."""
    return replace(
        transport,
        connect_timeout=min(CONNECT_S, transport.connect_timeout),
        stall_timeout=min(STALL_S, transport.stall_timeout),
        deadline=min(3 * STALL_S, transport.deadline),
        stall_bytes=int(SLOWEST * min(STALL_S, transport.stall_timeout)),
        insists=False,
    )
