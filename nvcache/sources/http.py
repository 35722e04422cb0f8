"""What every HTTP connection to a source needs: transport settings, URLs taken apart, choice of proxy, TLS context. It opens no connection."""

from __future__ import annotations

import base64
import ipaddress
import ssl
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from nvcache import __version__

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Transport:
    """How to reach sources: plain data, the same for every source. Times in seconds.

    `deadline` is how long one read may go without progress; a body has to bring `stall_bytes` within each `stall_timeout`. Without `insists` the
    first failure of a read is its last. `proxies` has the keys http, https, all and no, as curl understands them; its values may hold credentials.
    `ca_file` replaces the system's certificates.
    """

    connect_timeout: float = 10.0
    stall_timeout: float = 20.0
    deadline: float = 600.0
    stall_bytes: int = 256 * 1024
    insists: bool = True
    ca_file: str | None = None
    proxies: dict[str, str] = field(default_factory=dict, repr=False)
    user_agent: str = f"nvcache/{__version__}"


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart. Only `origin` may be printed: path and query may be signed."""

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Target:
        """Raises ValueError for anything that is not an http(s) URL with a host, quoting nothing of it. User info in it is dropped."""
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError("not an http(s) URL")
        try:
            port = parts.port or _PORTS[parts.scheme]
        except ValueError:  # which quotes it: of a password with a slash, unquoted, the beginning
            raise ValueError("its port is no number up to 65535") from None
        path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*") + (f"?{quote(parts.query, safe='/%:=&~+!$,;?@()*')}" if parts.query else "")
        host = parts.hostname.encode("idna").decode("ascii") if not parts.hostname.isascii() else parts.hostname
        return cls(parts.scheme, host, port, path)

    def join(self, location: str) -> Target:
        """Where a `Location` header leads from here (RFC 9110 §10.2.2: it may be relative). Raises ValueError."""
        return Target.parse(urljoin(f"{self.origin}{self.path}", location))

    @property
    def authority(self) -> str:
        """host[:port], as the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """scheme://host[:port]: what credentials belong to and throttling is counted by."""
        return f"{self.scheme}://{self.authority}"


def tls_hint(error: ssl.SSLError) -> str | None:
    """What to do where the other side answers the handshake in another protocol; None: what is to be done for any fault of TLS."""
    return "it speaks plain http; write http://" if error.reason == "WRONG_VERSION_NUMBER" else None


class UnreadableCaError(OSError):
    """The certificates to trust cannot be read."""


def proxy_for(target: Target, proxies: dict[str, str]) -> str | None:
    """The proxy's URL for `target` by the rules of curl: by scheme, then `all`, except for what `no` names.

    Raises ValueError for a proxy that is not spoken to by plain http://.
    """
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if not proxy or bypassed(target.host, proxies.get("no", "")):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        known = Target.parse(proxy).scheme == "http"
    except ValueError:
        known = False  # what was wrong with it may quote the password
    if not known:
        raise ValueError("the proxy setting is not the URL of an http:// proxy")
    return proxy


def bypassed(host: str, no_proxy: str) -> bool:
    """Whether NO_PROXY names `host`: `*`, a domain (with or without leading dot, its subdomains too), an address or a CIDR network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    for entry in no_proxy.replace(",", " ").lower().split():
        name = entry.strip("[]").strip(".")
        if entry == "*" or host == name or (address is None and name and host.endswith(f".{name}")):
            return True
        if address is not None and "/" in entry:
            try:
                if address in ipaddress.ip_network(entry, strict=False):
                    return True
            except ValueError:
                continue  # somebody's typo must not stop the fill
    return False


def proxy_authorization(proxy: str) -> dict[str, str]:
    """The header for the user and password in the proxy's URL, if it has them."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(credentials.encode()).decode('ascii')}"}


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """The context to verify servers with; made anew when the bundle was replaced. Raises `UnreadableCaError`."""
    try:
        return _tls_context(ca_file, Path(ca_file).stat().st_mtime_ns if ca_file else 0)
    except OSError as error:
        raise UnreadableCaError from error


@lru_cache(maxsize=4)
def _tls_context(ca_file: str | None, _version: int) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)  # takes tens of milliseconds, hence kept
    context.set_alpn_protocols(["http/1.1"])
    return context
