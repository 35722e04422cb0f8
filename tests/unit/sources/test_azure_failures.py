"""What the SDK runs into, told as ours: real sockets that refuse, redirect, ask to wait or speak something else. No key in any text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest
from azure.core import exceptions

from nvcache.core.ref import parse_ref
from nvcache.errors import Code, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.client import container_client
from nvcache.sources.azure.failures import CODES, used
from nvcache.sources.azure.identity import Identity
from nvcache.sources.azure.place import Anonymous, Bearer, Key, Sas
from nvcache.sources.http import Transport
from tests.support.serving import LoopbackServer

MARK = "signatureNeverToBePrinted"
QUICK = Transport(connect_timeout=2.0, stall_timeout=2.0)
EMPTY = b'<?xml version="1.0"?><EnumerationResults ServiceEndpoint="x" ContainerName="m"><Blobs/><NextMarker/></EnumerationResults>'
Reply = tuple[int, dict[str, str], bytes]


class _Server(LoopbackServer):
    def __init__(self, replies: list[Reply]) -> None:
        self.replies, self.paths = replies, list[str]()
        super().__init__(("127.0.0.1", 0), _Handler, None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """The next reply; the last one again and again."""
        self.server.paths.append(self.path)
        status, headers, body = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def serve() -> Iterator[Callable[..., _Server]]:
    """Starts a server of some replies."""
    servers = []

    def start(*replies: Reply) -> _Server:
        servers.append(_Server(list(replies)))
        servers[-1].start("azure")
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def listed(authority: str, transport: Transport = QUICK, *, anonymous: bool = False) -> list[object]:
    """What a listing there brings, with a SAS that must not be printed."""
    access = Access(account="acc", sas=f"sv=2021-12-02&sig={MARK}", hosts=(authority,), credential="anonymous" if anonymous else "auto")
    ref = parse_ref(f"http://{authority}/acc/models/m")
    with container_client(ref, access, transport, Identity(transport)) as container:
        return list(container.blobs("list it", "m/"))


def refused(authority: str, transport: Transport = QUICK, *, anonymous: bool = False) -> SourceError:
    """The error that it ends in."""
    with pytest.raises(SourceError) as caught:
        listed(authority, transport, anonymous=anonymous)
    assert str(caught.value).startswith("cannot list it: ")
    assert MARK not in f"{caught.value!r} {caught.value.hint} {caught.value.__cause__!r}"
    return caught.value


def address(server: _Server) -> str:
    """host:port."""
    return f"127.0.0.1:{server.server_port}"


def test_every_exception_without_an_answer_has_a_code() -> None:
    """Those of the SDK's core, by their nearest base."""
    kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, exceptions.AzureError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert any(base.__name__ in CODES for base in kind.__mro__), kind


def test_nobody_answers() -> None:
    """A closed port, and a proxy that is one."""
    error = refused("127.0.0.1:9")
    assert (error.code, error.retryable) == (Code.SOURCE_UNREACHABLE, True)
    assert "Connection refused" in str(error)
    proxied = refused("127.0.0.2:10000", replace(QUICK, proxies={"http": "http://user:passwordNeverToBePrinted@127.0.0.1:9"}))
    assert "the proxy to http://127.0.0.2:10000" in str(proxied)
    assert "passwordNeverToBePrinted" not in str(proxied)


@pytest.mark.parametrize("body", [b"<html><body>login</body></html>", b"<!doctype html><p>login<br>&nbsp;", b'{"a": 1}', b"", EMPTY[:60]])
def test_somebody_else_answers(serve: Callable[..., _Server], body: bytes) -> None:
    """A captive portal, for one; it is asked once."""
    server = serve((200, {"Content-Type": "text/html"}, body))
    error = refused(address(server))
    assert (error.code, error.retryable) == (Code.SOURCE_PROTOCOL, False)
    assert "does not answer as Blob Storage does" in str(error)
    assert len(server.paths) == 1


def test_a_redirect_is_not_followed(serve: Callable[..., _Server]) -> None:
    """The SAS would go along."""
    there = serve((200, {}, EMPTY))
    error = refused(address(serve((307, {"Location": f"http://{address(there)}/"}, b""))))
    assert error.code is Code.SOURCE_PROTOCOL
    assert there.paths == []


@pytest.mark.parametrize("status", [429, 503])
def test_what_asks_to_wait_is_waited_for(serve: Callable[..., _Server], status: int) -> None:
    """As long as it says, where that is soon; else the caller is told."""
    busy = {"x-ms-error-code": "ServerBusy", "Retry-After": "1"}
    server = serve((status, busy, b""), (status, busy, b""), (200, {"Content-Type": "application/xml"}, EMPTY))
    assert listed(address(server)) == []
    assert len(server.paths) == 3
    error = refused(address(serve((status, busy | {"Retry-After": "60"}, b""))))
    assert (error.code, error.retryable, error.retry_after_s) == (Code.SOURCE_BUSY, True, 60)


def test_refusals_are_told_by_the_table(serve: Callable[..., _Server]) -> None:
    """With what the credential is, and what was tried where there is none."""
    no = (403, {"x-ms-error-code": "AuthorizationPermissionMismatch"}, b"")
    refusal = refused(address(serve(no)))
    assert "the SAS does not allow this" in str(refusal)
    assert str(refusal).endswith("(403 AuthorizationPermissionMismatch), with the SAS from AZURE_STORAGE_SAS_TOKEN")
    assert str(refused(address(serve(no)), anonymous=True)).endswith(", anonymously")
    gone = refused(address(serve((404, {"x-ms-error-code": "ContainerNotFound"}, b""))))
    assert (gone.code, gone.retryable) == (Code.REPOSITORY_NOT_FOUND, False)
    hidden = refused(address(serve((404, {"x-ms-error-code": "ResourceNotFound"}, b""))), anonymous=True)
    assert hidden.code is Code.SOURCE_FORBIDDEN


def test_https_to_a_port_of_plain_http(serve: Callable[..., _Server]) -> None:
    """A certificate is not what is missing."""
    access = Access(credential="anonymous")
    ref = parse_ref(f"https://{address(serve((200, {}, EMPTY)))}/acc/models/m")
    with container_client(ref, access, QUICK, Identity(QUICK)) as container, pytest.raises(SourceError) as caught:
        list(container.blobs("list it", "m/"))
    assert (caught.value.code, caught.value.hint) == (Code.SOURCE_TLS, "it speaks plain http; write http://")


def test_every_credential_is_named_without_its_secret() -> None:
    """In words."""
    key, sas = used(Key("acc", MARK, "az_key_file /k")), used(Sas(MARK, "az_sas_file /s"))
    assert (key, sas) == ("signed with the account key from az_key_file /k", "with the SAS from az_sas_file /s")
    assert (used(Bearer(MARK)), used(Anonymous())) == ("with the node's identity", "anonymously")


def test_what_was_tried_is_named(serve: Callable[..., _Server]) -> None:
    """In order, up to the anonymous request."""
    authority = address(serve((404, {"x-ms-error-code": "ResourceNotFound"}, b"")))
    ref = parse_ref(f"http://{authority}/acc/models/m")
    with container_client(ref, Access(), QUICK, Identity(QUICK)) as container, pytest.raises(SourceError) as caught:
        list(container.blobs("list it", "m/"))
    assert str(caught.value) == (
        "cannot list it: no credential: connection string: none; account key: none; SAS: none; "
        "identity: its token is not sent over plain http; anonymous: refused (404 ResourceNotFound)"
    )
