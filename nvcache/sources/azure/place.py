"""Where blobs are and which of the known secrets may be sent there. Pure: it asks nobody, and knows nothing of identities' tokens.

Connection strings: Microsoft's "Configure Azure Storage connection strings". A secret goes to the account that it is for and to no other; who names a
model names a host, so secrets and an identity's token go to hosts of Azure's only, or to those that the operator named.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from nvcache.core.ref import Ref, blobs_of, is_host
from nvcache.errors import Code, ConfigError
from nvcache.sources.azure.access import Access

VERSION = "2021-12-02"  # of the REST API: bearer tokens, versions, ranges with MD5; old enough for every cloud and emulator
EMULATED = "devstoreaccount1"
EMULATED_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # public: the same for every emulator
CLOUDS = ("blob.core.windows.net", "blob.core.chinacloudapi.cn", "blob.core.usgovcloudapi.net", "blob.storage.azure.net")
_SAS = re.compile(r"\??(?=(?:.*&)?sig=)[A-Za-z0-9%&=._~:/+,*-]+")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Place:
    """Blobs below a prefix. `endpoint` is the account's URL without a slash at its end; `prefix` ends in a slash unless it is empty."""

    endpoint: str
    account: str
    container: str
    prefix: str

    def url(self, path: str) -> str:
        """The URL of the blob at `path` below the prefix, without a query."""
        return f"{self.endpoint}/{self.container}/{quote(self.prefix + path, safe='/~')}"

    @property
    def secure(self) -> bool:
        """Whether it is spoken to by https."""
        return self.endpoint.startswith("https://")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection string taken apart."""

    account: str
    endpoint: str
    key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, source: str) -> Connection:
        """`source` says where it is from. Raises `ConfigError` (bad-config) that does not repeat it."""
        fields = {name.strip().lower(): value.strip() for name, _, value in (part.partition("=") for part in text.split(";"))}
        if fields.get("usedevelopmentstorage", "").lower() == "true":
            return cls(EMULATED, f"http://127.0.0.1:10000/{EMULATED}", EMULATED_KEY)
        account = fields.get("accountname", "")
        domain = f"{account}.blob.{fields.get('endpointsuffix') or 'core.windows.net'}"
        named = fields.get("blobendpoint") or (f"{fields.get('defaultendpointsprotocol') or 'https'}://{domain}" if account else "")
        endpoint = _endpoint(named)
        if endpoint is None:
            why = "its BlobEndpoint is no http(s) URL" if named else "it names neither an account nor a BlobEndpoint"
            raise ConfigError(Code.BAD_CONFIG, f"cannot use the connection string from {source} for Azure: {why}")
        url = urlsplit(endpoint)
        account = account or url.path.strip("/") or (url.hostname or "").partition(".")[0]
        return cls(account, endpoint, fields.get("accountkey") or None, fields.get("sharedaccesssignature") or None)


@dataclass(frozen=True, slots=True)
class Key:
    """An account's key: signs, and is never sent. `source` says where it is from."""

    account: str
    secret: str = field(repr=False)
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Sas:
    """A shared access signature, without a question mark. `source` says where it is from."""

    text: str = field(repr=False)
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Bearer:
    """An identity's token."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Anonymous:
    """No credential; `tried` says of each that there could be why it is not used."""

    tried: str = ""


Grant = Key | Sas | Bearer | Anonymous


def connection_of(access: Access) -> Connection | None:
    """The connection string, taken apart, if there is one. Raises `ConfigError`."""
    return Connection.parse(access.connection_string, access.connection_string_from) if access.connection_string else None


def place_of(ref: Ref, access: Access) -> Place:
    """Where the blobs of `ref` are: az://account is where the connection string says, if it is of that account, else in the cloud of `suffix`."""
    endpoint, account, container, prefix = blobs_of(ref)
    if endpoint is None:
        connection = connection_of(access)
        known = connection is not None and connection.account == account
        endpoint = connection.endpoint if connection is not None and known else f"https://{account}.blob.{access.suffix}"
    return Place(_endpoint(endpoint) or endpoint, account, container, f"{prefix}/" if prefix else "")


def secret_for(place: Place, access: Access) -> tuple[Key | Sas | None, tuple[str, ...]]:
    """The secret that is meant for `place`, the first of connection string, key and SAS; else None, and of each why not.

    Raises `ConfigError` (bad-config) for a secret that cannot be one.
    """
    tried = []
    connection = connection_of(access)
    if connection is not None and connection.endpoint == place.endpoint and (secret := secret_in(connection, access)) is not None:
        return secret, ()
    tried.append(f"connection string: {_not_used(connection)}")
    own = _own(place, access)
    elsewhere = None if own else f"not sent to {urlsplit(place.endpoint).netloc}, which is neither Azure's nor in az_hosts"
    wrong = f"it is for account {access.account}" if access.account else "az_account does not say for which account"
    if access.key and access.account == place.account and own:
        return key_of(place.account, access.key, access.key_from), ()
    tried.append(f"account key: {'none' if not access.key else elsewhere if access.account == place.account else wrong}")
    if access.sas and access.account == place.account and own:
        return sas_of(access.sas, access.sas_from), ()
    tried.append(f"SAS: {'none' if not access.sas else elsewhere if access.account == place.account else wrong}")
    return None, tuple(tried)


def secret_in(connection: Connection, access: Access) -> Key | Sas | None:
    """The key, else the SAS, that a connection string holds. Raises `ConfigError` (bad-config) for one that cannot be one."""
    source = f"the connection string from {access.connection_string_from}"
    if connection.key:
        return key_of(connection.account, connection.key, source)
    return sas_of(connection.sas, source) if connection.sas else None


def key_of(account: str, text: str, source: str) -> Key:
    """An account's key that may be one. Raises `ConfigError` (bad-config) that names `source` and does not repeat the key."""
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        raise ConfigError(Code.BAD_CONFIG, f"cannot use the account key from {source} for Azure: it is not base64") from None
    return Key(account, text, source)


def sas_of(text: str, source: str) -> Sas:
    """A SAS that may be one. Raises `ConfigError` (bad-config) that names `source` and does not repeat the SAS."""
    if not _SAS.fullmatch(text):
        url = text.lower().startswith(("http://", "https://"))
        why = "it is a URL: only what follows the '?' is the SAS" if url else "it is no signed query (sv=…&sig=…)"
        raise ConfigError(Code.BAD_CONFIG, f"cannot use the SAS from {source} for Azure: {why}")
    return Sas(text.removeprefix("?"), source)


def trusted(place: Place, access: Access) -> bool:
    """Whether an identity's token or a SAS may be sent to `place`: over https to one of Azure's clouds, or to a host that the operator named.

    A host that was named without http:// is meant for https: whoever names a model must not have a SAS sent for everybody on the way to read.
    """
    url = urlsplit(place.endpoint)
    clouds = (*CLOUDS, f"blob.{access.suffix}")
    if place.secure and url.netloc.endswith(tuple(f".{cloud}" for cloud in clouds)) and is_host(url.netloc):  # as it stands, without a port
        return True
    connection = connection_of(access)
    if connection is not None and connection.endpoint == place.endpoint:
        return True
    bare = place.secure or _is_loopback(url.hostname or "")
    return {url.netloc if bare else f"http://{url.netloc}", f"{url.scheme}://{url.netloc}"} & {host.lower() for host in access.hosts} != set()


def _own(place: Place, access: Access) -> bool:
    """`trusted`, or the emulator on this machine, whose key is no secret."""
    return trusted(place, access) or (access.account == place.account == EMULATED and _is_loopback(urlsplit(place.endpoint).hostname or ""))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _not_used(connection: Connection | None) -> str:
    if connection is None:
        return "none"
    return f"it is for {connection.endpoint}" if connection.key or connection.sas else "it holds neither a key nor a SAS"


def _endpoint(text: str) -> str | None:
    """The URL of an account in the form that is compared: host in lower case, no default port, no slash at its end; None if it is none."""
    try:
        url = urlsplit(text)
        port = None if url.port in (None, _PORTS[url.scheme]) else url.port
    except (ValueError, KeyError):
        return None
    host = url.hostname or ""
    if not is_host(host) or "@" in url.netloc:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{url.scheme}://{host}{'' if port is None else f':{port}'}{url.path.rstrip('/')}"
