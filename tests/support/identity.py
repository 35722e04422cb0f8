"""Microsoft Entra as far as azure.identity needs it, on loopback: gives tokens to a managed identity and to a workload identity. It signs nothing.

The managed identity is asked for as in App Service (IDENTITY_ENDPOINT, plain http); the workload identity as in AKS (AZURE_FEDERATED_TOKEN_FILE,
https only, the library trusts the certificate by REQUESTS_CA_BUNDLE). The tokens are JWTs that Azurite accepts.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from tests.support.serving import LoopbackServer
from tests.support.tls import Tls, make_tls

AUDIENCE = "https://storage.azure.com"
TENANT = "adfs"  # of any other tenant the library would ask login.microsoftonline.com whether this authority may be trusted
CLIENT = "11111111-2222-3333-4444-555555555555"
HEADER = "identityHeaderNeverToBePrinted"
ASSERTION = "federatedTokenNeverToBePrinted"
MARK = "accessTokenNeverToBePrinted"


def jwt(lifetime_s: float, *, begins_s: float = 0) -> str:
    """A token for Blob Storage that is valid from and until so many seconds from now; every one differs and holds `MARK` in plain text."""
    now = time.time()
    claims = {"iss": "https://sts.windows.net/test/", "aud": AUDIENCE, "oid": "test", "tid": "test", "sub": f"{now}"}
    claims |= {"iat": int(now), "nbf": int(now + begins_s), "exp": int(now + lifetime_s)}
    return f"{_part({'alg': 'none', 'typ': 'JWT'})}.{_part(claims)}.{MARK}"


@dataclass(frozen=True)
class Asked:
    """One request for a token. `client` is None for the identity of the system."""

    how: str  # "managed" or "workload"
    client: str | None
    resource: str


class Identity:
    """A context manager. `managed()` and `workload()` are the environments with which azure.identity finds it; `asked` are the requests so far.

    `tls` is another server's certificate, for clients that trust only one. `lifetime_s` (of a token, from when it is asked for) and `refuse` may be
    changed while it serves.
    """

    def __init__(self, work: Path, *, tls: Tls | None = None, lifetime_s: float = 3600) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.lifetime_s, self.refuse = lifetime_s, False
        self.asked: list[Asked] = []
        self.given: list[str] = []
        tls = tls or make_tls(work)
        self.ca_file = tls.cert
        self._assertion = work / "federated-token"
        self._assertion.write_text(ASSERTION)
        self._servers = {"managed": _Server(("127.0.0.1", 0), self, None), "workload": _Server(("127.0.0.1", 0), self, tls)}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for name, server in self._servers.items():
            server.start(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self._servers.values():
            server.stop()

    def managed(self, client: str | None = None) -> dict[str, str]:
        """The environment of a system-assigned identity, or of the user-assigned one with this client id."""
        port = self._servers["managed"].server_port
        found = {"IDENTITY_ENDPOINT": f"http://127.0.0.1:{port}/msi/token", "IDENTITY_HEADER": HEADER}
        return found | ({"AZURE_CLIENT_ID": client} if client else {})

    def workload(self) -> dict[str, str]:
        """The environment that AKS gives a pod with a workload identity, and whom to trust."""
        return {
            "AZURE_AUTHORITY_HOST": f"https://127.0.0.1:{self._servers['workload'].server_port}",
            "AZURE_TENANT_ID": TENANT,
            "AZURE_CLIENT_ID": CLIENT,
            "AZURE_FEDERATED_TOKEN_FILE": str(self._assertion),
            "REQUESTS_CA_BUNDLE": str(self.ca_file),
        }

    def token(self, asked: Asked) -> str | None:
        """The next token, counted; None if it is to be refused."""
        with self._lock:
            self.asked.append(asked)
            if self.refuse:
                return None
            self.given.append(jwt(self.lifetime_s))
            return self.given[-1]


class _Server(LoopbackServer):
    def __init__(self, address: tuple[str, int], identity: Identity, tls: Tls | None) -> None:
        self.identity = identity
        super().__init__(address, _Handler, tls)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """A managed identity's token (App Service, API 2019-08-01), or where the authority gives tokens (OpenID Connect Discovery 1.0)."""
        url = urlsplit(self.path)
        if url.path.endswith("/.well-known/openid-configuration"):
            own = f"https://{self.headers['Host']}{url.path.partition('/.well-known')[0]}"
            return self._json(200, {"issuer": own, "authorization_endpoint": f"{own}/oauth2/authorize", "token_endpoint": f"{own}/oauth2/token"})
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path != "/msi/token" or self.headers["X-IDENTITY-HEADER"] != HEADER:
            return self._json(401, {"statusCode": 401, "message": "the identity header is wrong"})
        asked = Asked("managed", query.get("client_id"), query.get("resource", ""))
        token = self.server.identity.token(asked)
        if token is None:
            return self._json(400, {"statusCode": 400, "message": "no such identity"})
        expires = int(time.time() + self.server.identity.lifetime_s)
        return self._json(200, {"access_token": token, "expires_on": str(expires), "resource": asked.resource, "token_type": "Bearer"})

    def do_POST(self) -> None:
        """A workload identity's token: client credentials with a federated token as assertion (RFC 7523 §2.2)."""
        form = {name: values[0] for name, values in parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).items()}
        right = form.get("grant_type") == "client_credentials" and form.get("client_assertion") == ASSERTION
        token = self.server.identity.token(Asked("workload", form.get("client_id"), form.get("scope", ""))) if right else None
        if token is None:
            return self._json(401, {"error": "invalid_client", "error_description": "AADSTS700213: no matching federated identity record"})
        return self._json(200, {"access_token": token, "expires_in": int(self.server.identity.lifetime_s), "token_type": "Bearer"})

    def log_message(self, *_: object) -> None:
        """Requests are recorded, not printed."""

    def _json(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()
