"""What tests of the Azure source stand on: Azurite, azure.identity, azcopy and the proxy do what is said of them. It tests nothing of nvcache."""

from __future__ import annotations

import filecmp
import hashlib
import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import HTTPError

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobServiceClient, ContainerClient, StandardBlobTier

from tests.support import azcopy
from tests.support.azure_answers import refusal, wrong_clock
from tests.support.azure_proxy import AzureProxy
from tests.support.azurite import Azurite
from tests.support.faults import Kind
from tests.support.identity import CLIENT, Identity, jwt

CONTENT = os.urandom(300_000)
LIST_CONTAINERS = """
import sys, warnings
warnings.simplefilter("error")
from azure.identity import DefaultAzureCredential
from azure.storage.blob import BlobServiceClient
with DefaultAzureCredential() as who, BlobServiceClient(sys.argv[1], who, connection_verify=sys.argv[2], retry_total=0) as service:
    print(*(found.name for found in service.list_containers()))
"""


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Over http, with a container that holds one blob."""
    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        azurite.upload(azurite.container(), "m/w.bin", CONTENT)
        yield azurite


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """The same over https, which takes tokens as well."""
    with Azurite(tmp_path_factory.mktemp("secure"), tls=True, oauth=True) as azurite:
        azurite.upload(azurite.container(), "m/w.bin", CONTENT)
        yield azurite


@pytest.fixture
def proxy(azurite: Azurite) -> Iterator[AzureProxy]:
    """In front of the one over http."""
    with AzureProxy(azurite) as proxy:
        yield proxy


def get(server: Azurite | AzureProxy, query: str, **headers: str) -> bytes:
    """The blob, plainly asked for."""
    ca_file = server.ca_file if isinstance(server, Azurite) else server.azurite.ca_file
    handlers = [urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file))] if ca_file else []
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"x-ms-version": "2021-12-02"}
    request = urllib.request.Request(f"{server.url}/models/m/w.bin?{query}", headers=named)
    with urllib.request.build_opener(urllib.request.ProxyHandler({}), *handlers).open(request, timeout=20) as answer:
        return bytes(answer.read())


def refused(server: Azurite | AzureProxy, query: str, **headers: str) -> HTTPError:
    """The error it answers instead."""
    with pytest.raises(HTTPError) as caught:
        get(server, query, **headers)
    caught.value.close()
    return caught.value


def test_what_a_blob_may_carry(azurite: Azurite) -> None:
    """Blocks leave it without MD5, one piece gives it one; metadata, tier and MD5 as asked; overwriting changes the ETag, a snapshot stays."""
    box = azurite.container("carries")
    azurite.upload(box, "blocks", CONTENT, metadata={"sha256": "1"})
    azurite.upload(box, "piece", CONTENT, md5=None)
    azurite.upload(box, "set", CONTENT, md5=True)
    azurite.upload(box, "wrong", CONTENT, md5=bytes(16))
    azurite.upload(box, "empty", b"")
    azurite.upload(box, "cold", b"x", tier=StandardBlobTier.ARCHIVE)
    with azurite.service.get_container_client(box) as client:
        found = {blob.name: blob for blob in client.list_blobs(include=["metadata"])}
    md5 = bytearray(hashlib.md5(CONTENT).digest())
    wanted = {"blocks": None, "piece": md5, "set": md5, "wrong": bytearray(16), "empty": None, "cold": None}
    assert {name: blob.content_settings.content_md5 for name, blob in found.items()} == wanted
    assert (found["blocks"].metadata, found["empty"].size, found["cold"].blob_tier) == ({"sha256": "1"}, 0, "Archive")
    moment = azurite.snapshot(box, "set")
    azurite.upload(box, "set", b"other")
    assert azurite.blob(box, "set").get_blob_properties().etag != found["set"].etag
    with azurite.service.get_blob_client(box, "set", snapshot=moment) as client:
        assert client.download_blob().readall() == CONTENT
    azurite.delete(box, "set")
    assert not azurite.blob(box, "set").exists()


def test_a_sas_is_of_an_account_a_container_or_a_blob(azurite: Azurite) -> None:
    """And may be expired, not yet valid or short of a permission."""
    for good in (azurite.sas(), azurite.sas("models"), azurite.sas("models", "m/w.bin")):
        assert get(azurite, good) == CONTENT
    for bad in (azurite.sas("models", lasts_s=-10), azurite.sas("models", begins_s=600), azurite.sas("models", permission="l"), ""):
        assert refused(azurite, bad).code == 403


def test_the_connection_string_is_the_sdks(azurite: Azurite, proxy: AzureProxy) -> None:
    """Also through the proxy, which leaves the signature whole."""
    for text in (azurite.connection_string, proxy.connection_string):
        with BlobServiceClient.from_connection_string(text, retry_total=0) as service, service.get_blob_client("models", "m/w.bin") as blob:
            assert blob.download_blob().readall() == CONTENT


def test_a_token_counts_as_long_as_it_lives(secure: Azurite) -> None:
    """Of whoever minted it; Azurite refuses none, one that is over and one that has not begun."""
    assert get(secure, "", Authorization=f"Bearer {jwt(60)}") == CONTENT
    for token in (jwt(-10), jwt(600, begins_s=300)):
        assert refused(secure, "", Authorization=f"Bearer {token}").headers["x-ms-error-code"] == "AuthenticationFailed"


@pytest.mark.parametrize("way", ["managed", "managed-by-id", "workload"])
def test_the_real_library_finds_the_identity(secure: Azurite, tmp_path: Path, way: str) -> None:
    """DefaultAzureCredential, in a process with nothing but that environment; and it is told when there is no token."""
    with Identity(tmp_path, lifetime_s=600) as identity:
        environment = identity.workload() if way == "workload" else identity.managed("someone" if way == "managed-by-id" else None)
        command = [sys.executable, "-c", LIST_CONTAINERS, secure.url, str(secure.ca_file)]

        def run() -> subprocess.CompletedProcess[str]:
            clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment}
            return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)

        assert run().stdout.strip() == "models"
        asked = [(asked.how, asked.client) for asked in identity.asked]
        assert asked == [(way.partition("-")[0], {"managed": None, "managed-by-id": "someone", "workload": CLIENT}[way])]
        identity.refuse = True
        assert "DefaultAzureCredential failed to retrieve a token" in run().stderr
        assert len(identity.asked) > 1


@pytest.mark.parametrize("md5", [False, True])
def test_azcopy_there_and_back(azurite: Azurite, tmp_path: Path, md5: bool) -> None:
    """With and without MD5; where it is wrong, azcopy says so if it looks."""
    source, box = tmp_path / "source", azurite.container(f"copied-{md5}".lower())
    (source / "a folder").mkdir(parents=True)
    (source / "w.bin").write_bytes(os.urandom(9_000_000))
    (source / "a folder" / "x").write_bytes(b"x")
    azcopy.upload(source, f"{azurite.url}/{box}/m?{azurite.sas(box, permission='rwlc')}", tmp_path / "log", md5=md5)
    assert (azurite.blob(box, "m/w.bin").get_blob_properties().content_settings.content_md5 is not None) == md5
    if md5:
        azurite.upload(box, "m/a folder/x", b"x", md5=bytes(16))
        with pytest.raises(RuntimeError, match="cannot copy"):
            azcopy.download(f"{azurite.url}/{box}/m?{azurite.sas(box)}", tmp_path / "checked", tmp_path / "log", check_md5=True)
    azcopy.download(f"{azurite.url}/{box}/m?{azurite.sas(box)}", tmp_path / "back", tmp_path / "log")
    assert filecmp.cmpfiles(source, tmp_path / "back", ["w.bin", "a folder/x"], shallow=False)[0] == ["w.bin", "a folder/x"]


def test_the_proxy_passes_on_what_it_is_not_told_to_spoil(proxy: AzureProxy) -> None:
    """Listing, HEAD, PUT, DELETE, errors; each recorded, without a credential in its repr."""
    sas = proxy.azurite.sas(permission="rwdlc")
    with ContainerClient.from_container_url(f"{proxy.url}/passed?{sas}", retry_total=0) as box:
        box.create_container()
        box.upload_blob("a/b", CONTENT)
        assert [blob.name for blob in box.list_blobs()] == ["a/b"]
        with box.get_blob_client("a/b") as blob:
            assert blob.get_blob_properties().size == len(CONTENT)
            assert blob.download_blob(offset=5, length=100).readall() == CONTENT[5:105]
        box.delete_blob("a/b")
        with pytest.raises(HttpResponseError) as caught, box.get_blob_client("a/b") as blob:
            blob.download_blob()
    assert caught.value.status_code == 404
    (first, second) = proxy.seen("passed/a/b", origin="bytes")
    assert (first.range, first.status, first.sent, second.status) == ("bytes=5-104", 206, 100, 404)
    assert proxy.bytes_sent("passed/*") == 100
    assert {(request.method, request.origin) for request in proxy.seen()} == {
        *((method, "service") for method in ("GET", "HEAD", "PUT", "DELETE")),
        ("GET", "bytes"),
    }
    assert first.credential is not None
    assert first.credential not in repr(proxy.requests)


def test_the_proxy_speaks_tls_where_azurite_does(secure: Azurite) -> None:
    """With the same certificate; a token gets through, an expired one is refused as Azure refuses it."""
    with AzureProxy(secure) as proxy:
        token = jwt(60)
        assert get(proxy, "", Authorization=f"Bearer {token}") == CONTENT
        proxy.revoke()
        error = refused(proxy, "", Authorization=f"Bearer {token}")
        assert (error.code, error.headers["x-ms-error-code"]) == (401, "InvalidAuthenticationInfo")
        assert get(proxy, "", Authorization=f"Bearer {jwt(60)}") == CONTENT
        assert token not in repr(proxy.requests)


@pytest.mark.parametrize(
    ("kind", "options", "status", "code"),
    [
        (Kind.BUSY, {"seconds": 2}, 503, "ServerBusy"),
        (Kind.THROTTLE, {"seconds": 2}, 429, "TooManyRequests"),
        (Kind.STATUS, refusal(500, "OperationTimedOut"), 500, "OperationTimedOut"),
        (Kind.STATUS, refusal(409, "BlobArchived"), 409, "BlobArchived"),
        (Kind.STATUS, wrong_clock(1000), 403, "AuthenticationFailed"),
    ],
)
def test_the_proxy_answers_itself(proxy: AzureProxy, kind: Kind, options: dict[str, object], status: int, code: str) -> None:
    """Once, with Azure's headers; the next request gets through."""
    proxy.faults.add("models/m/*", kind, **options)
    error = refused(proxy, proxy.azurite.sas())
    assert (error.code, error.headers["x-ms-error-code"], error.headers["Retry-After"]) == (status, code, "2" if "seconds" in options else None)
    skew = parsedate_to_datetime(error.headers["Date"]).timestamp() - time.time()
    assert (990 < skew < 1010) if code == "AuthenticationFailed" else (-10 < skew < 10)
    assert get(proxy, proxy.azurite.sas()) == CONTENT


@pytest.mark.parametrize(("kind", "error"), [(Kind.RESET, ConnectionResetError), (Kind.TRUNCATE, IncompleteRead), (Kind.STALL, TimeoutError)])
def test_the_proxy_breaks_a_body(proxy: AzureProxy, kind: Kind, error: type[Exception]) -> None:
    """After so many bytes."""
    proxy.faults.add("models/m/*", kind, after=100_000, seconds=20)
    request = urllib.request.Request(f"{proxy.url}/models/m/w.bin?{proxy.azurite.sas()}")
    with pytest.raises(error), urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=0.5) as answer:
        answer.read()
    assert proxy.bytes_sent() == 100_000


def test_the_proxy_spoils_a_byte_or_an_md5(proxy: AzureProxy) -> None:
    """And nothing beside it."""
    proxy.faults.add("models/m/*", Kind.FLIP, after=1000)
    assert [at for at, byte in enumerate(get(proxy, proxy.azurite.sas())) if byte != CONTENT[at]] == [1000]
    proxy.faults.add("models/m/*", Kind.WRONG_MD5)
    for wrong in (True, False):
        url = f"{proxy.url}/models/m/w.bin?{proxy.azurite.sas()}"
        request = urllib.request.Request(url, headers={"x-ms-range": "bytes=0-9", "x-ms-range-get-content-md5": "true"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            assert answer.read() == CONTENT[:10]
            assert (answer.headers["Content-MD5"] == "1B2M2Y8AsgTpgAmY7PhCfg==") == wrong


def test_a_sas_expires_within_a_file(proxy: AzureProxy) -> None:
    """The connection ends, and that SAS is refused from then on, another is not."""
    old = proxy.azurite.sas("models")
    proxy.faults.add("models/m/*", Kind.EXPIRE, after=5)
    with pytest.raises(IncompleteRead):
        get(proxy, old)
    assert refused(proxy, old).headers["x-ms-error-code"] == "AuthenticationFailed"
    assert get(proxy, proxy.azurite.sas("models", lasts_s=7200)) == CONTENT


def test_something_happens_half_way(proxy: AzureProxy) -> None:
    """A blob is overwritten while it is read: this answer goes on, a request for what it was does not."""
    proxy.azurite.upload("models", "m/changes", CONTENT)
    etag = proxy.azurite.blob("models", "m/changes").get_blob_properties().etag
    proxy.faults.add("models/m/changes", Kind.CALL, after=1000, hook=lambda: proxy.azurite.upload("models", "m/changes", b"new"))
    with BlobServiceClient.from_connection_string(proxy.connection_string, retry_total=0) as service:
        blob = service.get_blob_client("models", "m/changes")
        assert blob.download_blob().readall() == CONTENT
        assert blob.get_blob_properties().etag != etag
        with pytest.raises(HttpResponseError) as caught:
            blob.download_blob(offset=0, length=2, etag=etag, match_condition=MatchConditions.IfNotModified)
    assert caught.value.status_code == 412
    assert proxy.seen("models/m/changes", origin="bytes")[-1].match == etag


def test_slow_egress(proxy: AzureProxy) -> None:
    """So many bytes a second for all together, or one answer in small pieces; leaving the proxy ends what still waits."""
    proxy.bytes_per_s = 1_000_000
    began = time.monotonic()
    threads = [threading.Thread(target=get, args=(proxy, proxy.azurite.sas())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began > 0.45
    proxy.bytes_per_s = None
    proxy.faults.add("models/m/*", Kind.TRICKLE, after=100_000, seconds=0.1)
    began = time.monotonic()
    assert get(proxy, proxy.azurite.sas()) == CONTENT
    assert time.monotonic() - began > 0.15
