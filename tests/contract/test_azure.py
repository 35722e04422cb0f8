"""Blobs, by the real SDK and the ranged reader, from Azurite behind a proxy: who is let in, what breaks half-way, and what is said of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import StandardBlobTier

from nvcache import logs
from nvcache.core.manifest import Selection
from nvcache.core.ref import Ref, parse_ref
from nvcache.engine.planning import make_plan
from nvcache.errors import Code, IntegrityError, NvcacheError, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.source import AzureBlob
from nvcache.sources.base import HttpRemote
from nvcache.sources.open import open_remote
from nvcache.sources.ranges import Transport
from tests.contract.conftest import QUICK, Tools
from tests.support.azure_answers import refusal, wrong_clock
from tests.support.azure_proxy import AzureProxy
from tests.support.azurite import ACCOUNT, KEY, Azurite, connection_string
from tests.support.faults import Kind
from tests.support.identity import CLIENT, MARK, Identity

BOX = "models"
CONTENT = os.urandom(6_000_000)
PATH = f"{BOX}/m/w.bin"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Over http: a container with one blob, and one that everybody may read."""
    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        for container in (azurite.container(BOX), azurite.container("public", public=True)):
            azurite.upload(container, "m/w.bin", CONTENT)
        yield azurite


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """The same over https, which takes tokens."""
    with Azurite(tmp_path_factory.mktemp("secure"), tls=True, oauth=True) as azurite:
        azurite.upload(azurite.container(BOX), "m/w.bin", CONTENT)
        yield azurite


@pytest.fixture
def proxy(plain: Azurite) -> Iterator[AzureProxy]:
    """In front of the one over http."""
    with AzureProxy(plain) as proxy:
        yield proxy


class Client:
    """The source with this access, and what is read through it."""

    def __init__(self, access: Access, tools: Tools, transport: Transport = QUICK) -> None:
        self.access, self._tools, self._transport = access, tools, transport
        self.source = AzureBlob(lambda: self.access, transport)

    def remote(self, ref: Ref, path: str = "w.bin") -> HttpRemote:
        """Where one file is, as it is listed now."""
        resolved = self.source.resolve(ref)
        return self.source.locate(resolved, next(file for file in self.source.list(resolved) if file.path == path))

    def read(self, remote: HttpRemote, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes by a reader of their own."""
        into = bytearray((remote.size if stop is None else stop) - start)
        with closing(open_remote(remote, self._transport, self._tools.throttle, self._tools.watchdog)()) as reader:
            reader.read(start, memoryview(into))
        return bytes(into)


def ref_of(server: AzureProxy | Azurite, prefix: str = "m", container: str = BOX) -> Ref:
    """The reference of a prefix."""
    return parse_ref(f"{server.url}/{container}/{prefix}")


def keyed(server: AzureProxy, tools: Tools) -> Client:
    """Let in by a connection string."""
    return Client(Access(connection_string=server.connection_string), tools)


def refused(call: Any, *arguments: Any, secrets: tuple[str, ...] = ()) -> NvcacheError:
    """The error that a call raises, in which no secret may be."""
    with pytest.raises(NvcacheError) as caught:
        call(*arguments)
    told = f"{caught.value!r} {caught.value} {caught.value.hint} {caught.value.facts} {caught.value.__cause__!r} {caught.value.__context__!r}"
    for secret in (KEY, MARK, "sig=", *secrets):
        assert secret not in told
    return caught.value


# -- who is let in


@pytest.mark.parametrize("kind", ["connection-string", "connection-string-sas", "key", "account-sas", "container-sas", "anonymous"])
def test_secrets_let_in(proxy: AzureProxy, tools: Tools, kind: str) -> None:
    """Listing and bytes; a key is never sent, only what it signed, and bytes come under If-Match."""
    azurite, container = proxy.azurite, "public" if kind == "anonymous" else BOX
    access = {
        "connection-string": Access(connection_string=proxy.connection_string),
        "connection-string-sas": Access(connection_string=f"BlobEndpoint={proxy.url};SharedAccessSignature={azurite.sas(BOX)}"),
        "key": Access(account=ACCOUNT, key=KEY),
        "account-sas": Access(account=ACCOUNT, sas=azurite.sas()),
        "container-sas": Access(account=ACCOUNT, sas=f"?{azurite.sas(BOX)}"),
        "anonymous": Access(),
    }[kind]
    client = Client(access, tools)
    remote = client.remote(ref_of(proxy, container=container))
    assert client.read(remote) == CONTENT
    by = [(request.origin, "sig=" in request.query, request.headers.get("authorization", "").partition(" ")[0]) for request in proxy.seen()]
    signed = kind != "anonymous"
    assert {what for what in by if what[0] == "bytes"} == {("bytes", signed, "")}
    assert {what for what in by if what[0] == "service"} == {("service", "sas" in kind, "SharedKey" if signed and "sas" not in kind else "")}
    assert {request.match for request in proxy.seen(origin="bytes")} == {remote.validator}


@pytest.mark.parametrize("kind", ["system-assigned", "user-assigned", "workload"])
def test_identities_let_in(secure: Azurite, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Found by the real azure.identity; one token serves listing and bytes as long as it lives."""
    with AzureProxy(secure) as proxy, Identity(tmp_path, tls=secure.tls) as identity:
        environment = {"system-assigned": identity.managed(), "user-assigned": identity.managed(CLIENT), "workload": identity.workload()}[kind]
        environment.pop("REQUESTS_CA_BUNDLE", None)  # one setting tells whom to trust, here as everywhere
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        client = Client(Access(hosts=(proxy.url.split("/")[2],)), tools, replace(QUICK, ca_file=str(secure.ca_file)))
        assert client.read(client.remote(ref_of(proxy))) == CONTENT
        assert [asked.client for asked in identity.asked] == [None if kind == "system-assigned" else CLIENT]
        assert {request.headers["authorization"] for request in proxy.seen()} == {f"Bearer {identity.given[0]}"}


def test_without_a_way_in_all_of_them_are_named(proxy: AzureProxy, tools: Tools) -> None:
    """In the order in which they are tried."""
    said = str(refused(Client(Access(), tools).source.resolve, ref_of(proxy)))
    ways = ["connection string", "account key", "SAS", "identity", "anonymous"]
    assert [said.find(f"{way}: ") >= 0 for way in ways] == [True] * 5
    assert sorted(ways, key=lambda way: said.find(f"{way}: ")) == ways


def test_an_identity_that_fails_is_not_passed_over(secure: Azurite, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token from the identity that is set up: its cause is told, in place of what an anonymous reader would be told."""
    with Identity(tmp_path, tls=secure.tls) as identity:
        identity.refuse = True
        for name, value in identity.workload().items():
            monkeypatch.setenv(name, value)
        client = Client(Access(hosts=(secure.url.split("/")[2],)), tools, replace(QUICK, ca_file=str(secure.ca_file)))
        error = refused(client.source.resolve, ref_of(secure))
    assert error.code is Code.SOURCE_FORBIDDEN
    assert "workload identity: " in str(error)
    assert "AADSTS700213" in str(error)


def test_a_sas_goes_nowhere_it_is_not_for(proxy: AzureProxy, tools: Tools) -> None:
    """Whoever names a model names the host: one that the operator did not name is asked without it."""
    client = Client(Access(account="somebodyelse", sas=proxy.azurite.sas(), key=KEY), tools)
    error = refused(client.source.resolve, ref_of(proxy))
    assert error.code is Code.SOURCE_FORBIDDEN
    assert {request.credential for request in proxy.seen()} == {None}
    assert not any("authorization" in request.headers for request in proxy.seen())


# -- what changes or breaks half-way


def test_an_overwritten_blob_ends_as_changed(proxy: AzureProxy, tools: Tools) -> None:
    """Nothing of the new one is taken for the old one, whether it was overwritten or deleted."""
    proxy.azurite.upload(BOX, "moving/w.bin", CONTENT)
    client = keyed(proxy, tools)
    remote = client.remote(ref_of(proxy, "moving"))
    new = bytes(len(CONTENT))
    proxy.faults.add(f"{BOX}/moving/w.bin", Kind.CALL, after=1000, hook=lambda: proxy.azurite.upload(BOX, "moving/w.bin", new))
    assert client.read(remote, 0, 3_000_000) == CONTENT[:3_000_000]  # what was under way when it happened
    assert refused(client.read, remote).code is Code.SOURCE_CHANGED
    remote = client.remote(ref_of(proxy, "moving"))
    assert client.read(remote) == new
    proxy.azurite.delete(BOX, "moving/w.bin")
    error = refused(client.read, remote)
    assert (error.code, "deleted" in str(error)) == (Code.SOURCE_CHANGED, True)


@pytest.mark.parametrize("kind", [Kind.BUSY, Kind.THROTTLE])
@pytest.mark.parametrize("what", ["listing", "bytes"])
def test_the_service_is_given_the_time_it_asks_for(proxy: AzureProxy, tools: Tools, kind: Kind, what: str) -> None:
    """503 and 429 with Retry-After, for listings and for bytes."""
    client = keyed(proxy, tools)
    remote = client.remote(ref_of(proxy))
    fault = proxy.faults.add("*", kind, seconds=1, origin="service" if what == "listing" else "bytes")
    began = time.monotonic()
    if what == "listing":
        client.source.resolve(ref_of(proxy))
    else:
        assert client.read(remote, 0, 1000) == CONTENT[:1000]
    assert fault.hits == 1
    assert 0.9 < time.monotonic() - began < 5


def test_a_timed_out_operation_is_tried_again(proxy: AzureProxy, tools: Tools) -> None:
    """500 OperationTimedOut, once each."""
    for origin in ("service", "bytes"):
        proxy.faults.add("*", Kind.STATUS, origin=origin, **refusal(500, "OperationTimedOut"))
    client = keyed(proxy, tools)
    assert client.read(client.remote(ref_of(proxy))) == CONTENT


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.TRUNCATE])
def test_a_broken_connection_is_resumed(proxy: AzureProxy, tools: Tools, kind: Kind) -> None:
    """Where it broke, three times; of a reset connection the kernel throws away what was not read yet."""
    proxy.azurite.upload(BOX, "proven/w.bin", CONTENT, md5=True)
    client = keyed(proxy, tools)
    remote = client.remote(ref_of(proxy, "proven"))
    for _ in range(3):
        proxy.faults.add(f"{BOX}/proven/w.bin", kind, after=1_000_000)
    assert client.read(remote) == CONTENT
    starts = [int((request.range or "").removeprefix("bytes=").partition("-")[0]) for request in proxy.seen(origin="bytes")]
    assert starts == sorted(starts)
    if kind is Kind.TRUNCATE:
        assert starts == [0, 1_000_000, 2_000_000, 3_000_000]
        assert proxy.bytes_sent() == len(CONTENT)
    else:
        assert len(starts) == 4


def test_a_stall_is_noticed(proxy: AzureProxy, tools: Tools) -> None:
    """And the rest is asked for again."""
    client = Client(Access(connection_string=proxy.connection_string), tools, replace(QUICK, stall_timeout=0.5))
    remote = client.remote(ref_of(proxy))
    proxy.faults.add(PATH, Kind.STALL, after=1_000_000, seconds=30)
    began = time.monotonic()
    assert client.read(remote) == CONTENT
    assert time.monotonic() - began < 10


def test_slow_egress_is_borne(proxy: AzureProxy, tools: Tools) -> None:
    """As long as something comes, however little."""
    client = keyed(proxy, tools)
    remote = client.remote(ref_of(proxy))
    proxy.bytes_per_s = 4_000_000
    began = time.monotonic()
    assert client.read(remote) == CONTENT
    assert time.monotonic() - began > 1


@pytest.mark.parametrize("kind", [Kind.FLIP, Kind.WRONG_MD5])
def test_a_range_that_is_not_what_its_md5_says_is_asked_for_again(proxy: AzureProxy, tools: Tools, kind: Kind) -> None:
    """Where the blob has no digest, each answer of at most 4 MiB has one."""
    client = keyed(proxy, tools)
    remote = client.remote(ref_of(proxy))
    assert remote.range_md5
    fault = proxy.faults.add(PATH, kind, after=100)
    assert client.read(remote) == CONTENT
    assert fault.hits == 1
    assert len(proxy.seen(PATH, origin="bytes")) == 3
    proxy.faults.add(PATH, kind, times=None, after=100)
    assert refused(client.read, remote).code is Code.DIGEST_MISMATCH


def test_an_expired_sas_is_told_and_a_new_one_goes_on(proxy: AzureProxy, tools: Tools) -> None:
    """It expires within the file. The same source, asked again where the bytes are, has the one that took its place."""
    old, new = proxy.azurite.sas(BOX), proxy.azurite.sas(BOX, lasts_s=7200)
    client = Client(Access(account=ACCOUNT, sas=old), tools)
    resolved = client.source.resolve(ref_of(proxy))
    (file,) = client.source.list(resolved)
    proxy.faults.add(PATH, Kind.EXPIRE, after=1_000_000)
    error = refused(client.read, client.source.locate(resolved, file), secrets=(old, signature(old)))
    assert error.code is Code.BAD_TOKEN
    assert "SAS" in str(error)
    client.access = replace(client.access, sas=new)
    assert client.read(client.source.locate(resolved, file), 1_000_000) == CONTENT[1_000_000:]


def test_an_expired_token_is_told(secure: Azurite, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Azure does (401), and as Azurite does when it is over (403); a new one is asked for before an old one runs out."""
    with AzureProxy(secure) as proxy, Identity(tmp_path, tls=secure.tls, lifetime_s=200) as identity:
        for name, value in identity.managed().items():
            monkeypatch.setenv(name, value)
        client = Client(Access(hosts=(proxy.url.split("/")[2],)), tools, replace(QUICK, ca_file=str(secure.ca_file)))
        resolved = client.source.resolve(ref_of(proxy))
        (file,) = client.source.list(resolved)
        proxy.faults.add(PATH, Kind.EXPIRE, after=1_000_000)
        assert refused(client.read, client.source.locate(resolved, file)).code is Code.BAD_TOKEN
        asked = len(identity.given)
        assert client.read(client.source.locate(resolved, file)) == CONTENT
        assert len(identity.given) > asked
        identity.lifetime_s = -5
        assert refused(client.read, client.source.locate(resolved, file)).code is Code.BAD_TOKEN


# -- what is said


@pytest.mark.parametrize("ahead", [3600, -7200])
@pytest.mark.parametrize("what", ["listing", "bytes"])
def test_a_wrong_clock_is_named_with_the_difference(proxy: AzureProxy, tools: Tools, ahead: int, what: str) -> None:
    """The service refuses, and its Date is far from ours."""
    client = keyed(proxy, tools)
    remote = client.remote(ref_of(proxy))
    proxy.faults.add("*", Kind.STATUS, times=None, origin="service" if what == "listing" else "bytes", **wrong_clock(ahead))
    error = refused(*((client.source.resolve, ref_of(proxy)) if what == "listing" else (client.read, remote)))
    assert error.code is Code.BAD_TOKEN
    assert ("clock is 60 min behind the server's" if ahead > 0 else "clock is 2 h ahead of the server's") in str(error)


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ({"lasts_s": -600}, Code.BAD_TOKEN, r"the SAS expired 10 min ago"),
        ({"begins_s": 600}, Code.BAD_TOKEN, r"the SAS is not valid for another (10|9|600|599) ?(min|s)"),
        ({"permission": "r"}, Code.SOURCE_FORBIDDEN, r"does not allow this operation"),
    ],
)
def test_what_is_wrong_with_a_sas(proxy: AzureProxy, tools: Tools, wrong: dict[str, Any], code: Code, said: str) -> None:
    """Told apart, though Azurite says the same of all but one."""
    sas = proxy.azurite.sas(BOX, **wrong)
    error = refused(Client(Access(account=ACCOUNT, sas=sas), tools).source.resolve, ref_of(proxy), secrets=(sas, signature(sas)))
    assert (error.code, error.retryable) == (code, False)
    assert re.search(said, str(error)), error


def test_a_sas_that_may_list_but_not_read(proxy: AzureProxy, tools: Tools) -> None:
    """Is noticed at the first byte."""
    client = Client(Access(account=ACCOUNT, sas=proxy.azurite.sas(BOX, permission="l")), tools)
    error = refused(client.read, client.remote(ref_of(proxy)))
    assert error.code is Code.SOURCE_FORBIDDEN
    assert "does not allow" in str(error)


@pytest.mark.parametrize(
    ("code", "status", "meant", "said"),
    [
        ("AuthorizationPermissionMismatch", 403, Code.SOURCE_FORBIDDEN, "no data role|does not allow"),
        ("AuthorizationFailure", 403, Code.SOURCE_FORBIDDEN, "network rules"),
        ("AuthorizationSourceIPMismatch", 403, Code.SOURCE_FORBIDDEN, "address"),
        ("AccountIsDisabled", 403, Code.SOURCE_FORBIDDEN, "account is disabled"),
        ("LeaseIdMissing", 412, Code.SOURCE_FORBIDDEN, "lease"),
        ("BlobBeingRehydrated", 409, Code.ARCHIVED, "archive"),
    ],
)
def test_refusals_that_only_azure_makes(proxy: AzureProxy, tools: Tools, code: str, status: int, meant: Code, said: str) -> None:
    """Each with its cause, when listing."""
    proxy.faults.add("*", Kind.STATUS, times=None, origin="service", **refusal(status, code))
    error = refused(keyed(proxy, tools).source.resolve, ref_of(proxy))
    assert (error.code, error.retryable) == (meant, False)
    assert re.search(said, str(error)), error


def test_what_does_not_exist_is_named(proxy: AzureProxy, tools: Tools) -> None:
    """A container, a prefix (and what is there instead), an account, a host."""
    client = keyed(proxy, tools)
    error = refused(client.source.resolve, ref_of(proxy, container="no-such-box"))
    assert (error.code, "no such container" in str(error)) == (Code.REPOSITORY_NOT_FOUND, True)
    error = refused(client.source.resolve, ref_of(proxy, "mm"))
    assert (error.code, "'m/'" in str(error)) == (Code.REPOSITORY_NOT_FOUND, True)
    proxy.azurite.container("empty")
    error = refused(client.source.resolve, ref_of(proxy, "m", "empty"))
    assert (error.code, "empty" in str(error)) == (Code.REPOSITORY_NOT_FOUND, True)
    error = refused(Client(Access(account="other", key=KEY, hosts=(proxy.url.split("/")[2],)), tools).source.resolve, other_account(proxy))
    assert error.code in (Code.REPOSITORY_NOT_FOUND, Code.SOURCE_FORBIDDEN, Code.BAD_TOKEN)
    assert not error.retryable
    nowhere = Client(Access(suffix="invalid"), tools)
    error = refused(nowhere.source.resolve, parse_ref("az://nosuchaccount/models/m"))
    assert "no such account" in str(error)
    closed = parse_ref("http://127.0.0.1:9/devstoreaccount1/models/m")
    error = refused(Client(Access(connection_string=connection_string("http://127.0.0.1:9/devstoreaccount1")), tools).source.resolve, closed)
    assert (error.code, error.retryable) == (Code.SOURCE_UNREACHABLE, True)


def test_an_archived_blob_is_refused_before_a_byte(proxy: AzureProxy, tools: Tools) -> None:
    """It is listed; planning and reading say that it has to be brought back."""
    proxy.azurite.upload(BOX, "cold/w.bin", CONTENT[:1000], tier=StandardBlobTier.ARCHIVE)
    client = keyed(proxy, tools)
    resolved = client.source.resolve(ref_of(proxy, "cold"))
    (file,) = client.source.list(resolved)
    for call in (client.source.refuse, client.source.locate):
        error = refused(call, resolved, file)
        assert (error.code, error.retryable) == (Code.ARCHIVED, False)
        assert "w.bin" in str(error)
    assert proxy.seen(origin="bytes") == []
    warm = client.remote(ref_of(proxy))
    proxy.azurite.blob(BOX, "m/w.bin")
    proxy.faults.add(PATH, Kind.STATUS, **refusal(409, "BlobArchived"))
    assert refused(client.read, warm).code is Code.ARCHIVED


def test_blobs_as_they_were(proxy: AzureProxy, tools: Tools) -> None:
    """A snapshot is found by the time it was taken, also after the blob was overwritten; a time before all of them finds nothing."""
    proxy.azurite.upload(BOX, "shot/w.bin", b"before")
    moment = proxy.azurite.snapshot(BOX, "shot/w.bin")
    proxy.azurite.upload(BOX, "shot/w.bin", b"now")
    client = keyed(proxy, tools)
    ref = ref_of(proxy, "shot")
    assert client.read(client.remote(ref)) == b"now"
    assert client.read(client.remote(ref.at(moment))) == b"before"
    assert client.source.resolve(ref.at(moment)).name == moment
    for moment in ("2020-01-01T00:00:00Z", "2090-01-01T00:00:00.0000001Z"):
        error = refused(client.source.resolve, ref.at(moment))
        assert (error.code, error.retryable) == (Code.REVISION_NOT_FOUND, False)


@pytest.mark.parametrize("names", [("n/dir", "n/dir/file"), ("A.bin", "a.bin"), ("x\\y",), ("sp//ace",), ("é" * 200,)])
def test_names_a_store_cannot_hold_are_refused(proxy: AzureProxy, tools: Tools, names: tuple[str, ...]) -> None:
    """Blob Storage has them all; `\\` it turns into `/` itself."""
    prefix = f"names-{abs(hash(names))}"
    for name in (*names, "w.safetensors"):
        proxy.azurite.upload(BOX, f"{prefix}/{name}", b"x")
    source = keyed(proxy, tools).source
    resolved = source.resolve(ref_of(proxy, prefix))
    listing = source.list(resolved)
    if names == ("x\\y",):
        assert [file.path for file in listing] == ["w.safetensors", "x/y"]
        return
    with pytest.raises(IntegrityError) as caught:
        make_plan(resolved, listing, asked="", selection=Selection(("*",)))
    assert caught.value.code in (Code.HOSTILE_NAME, Code.LISTING_CONFLICT)


@pytest.mark.usefixtures("as_the_daemon_logs")
def test_no_secret_is_logged(proxy: AzureProxy, tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    """With all that the daemon can be made to log; the SDK, which tells of each request, is silent."""
    logs.setup("debug", "json")
    sas = proxy.azurite.sas(BOX)
    for access in (Access(connection_string=proxy.connection_string), Access(account=ACCOUNT, sas=sas)):
        client = Client(access, tools)
        remote = client.remote(ref_of(proxy))
        proxy.faults.add(PATH, Kind.RESET, after=1000)
        client.read(remote)
        refused(client.source.resolve, ref_of(proxy, "mm"))
        told = capsys.readouterr().err
        assert "trying again" in told
        for secret in (KEY, "sig=", signature(sas), "azure.core"):
            assert secret not in told + repr((access, client.source, vars(client.source), remote))


def test_a_page_that_is_no_blob_storage(tools: Tools, proxy: AzureProxy) -> None:
    """A captive portal, or a web server at that address."""
    page = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
    proxy.faults.add("*", Kind.STATUS, times=None, origin="service", status=200, headers={"Content-Type": "text/html"}, body=page)
    error = refused(keyed(proxy, tools).source.resolve, ref_of(proxy))
    assert isinstance(error, SourceError)
    assert (error.code, error.retryable) == (Code.SOURCE_PROTOCOL, False)


def signature(sas: str) -> str:
    """What of a SAS is secret."""
    return sas.partition("sig=")[2].partition("&")[0]


def other_account(server: AzureProxy) -> Ref:
    """An account that Azurite does not have."""
    return parse_ref(f"{server.url.replace(ACCOUNT, 'other')}/{BOX}/m")
