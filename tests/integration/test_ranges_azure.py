"""The ranged reader against Azurite: every range of one version, MD5 on the wire, and refusals told apart. The proxy adds the faults."""

import os
from dataclasses import replace
from urllib.parse import quote, unquote

import pytest

from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources.base import HttpRemote
from tests.support.azure_answers import expired_sas, refusal, wrong_clock
from tests.support.azure_proxy import AzureProxy
from tests.support.azurite import Azurite
from tests.support.faults import Kind
from tests.support.hub import HubServer, Repo
from tests.support.identity import jwt
from tests.support.lanes import Lanes

MIB = 2**20
WEIGHTS = os.urandom(9 * MIB + 5)
SIZE = len(WEIGHTS)
VERSION = ("x-ms-version", "2025-11-05")


@pytest.fixture(scope="module")
def azurite(tmp_path_factory):
    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        azurite.container()
        yield azurite


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    with Azurite(tmp_path_factory.mktemp("secure"), tls=True, oauth=True) as azurite:
        azurite.upload(azurite.container(), "w.bin", WEIGHTS)
        yield azurite


@pytest.fixture
def proxy(azurite):
    azurite.upload("models", "w.bin", WEIGHTS)
    with AzureProxy(azurite) as proxy:
        yield proxy


def remote(proxy, **fields):
    """What a source gives for the blob: its ETag as listings name it, a SAS of the container."""
    etag = proxy.azurite.blob("models", "w.bin").get_blob_properties().etag.strip('"')
    url = f"{proxy.url}/models/w.bin?{proxy.azurite.sas('models')}"
    return HttpRemote(**{"url": url, "size": SIZE, "headers": (VERSION,), "validator": etag, "name": "w.bin", "match": True} | fields)


def refused(proxy, asked=None, **transport):
    """The error of reading the whole blob, which shows nothing of the SAS."""
    asked = asked or remote(proxy)
    with Lanes(asked, **transport) as lanes, pytest.raises((SourceError, IntegrityError)) as caught:
        lanes.read()
    assert "sig=" not in f"{caught.value!r} {caught.value.hint}"
    return caught.value


# --- one version


@pytest.mark.parametrize("lanes", [1, 4])
def test_every_range_names_the_version(proxy, lanes):
    asked = remote(proxy)
    with Lanes(asked) as readers:
        assert readers.fetch(lanes=lanes, chunk=MIB) == WEIGHTS
    requests = proxy.seen("models/w.bin", origin="bytes")
    assert len(requests) == 10
    assert {request.match for request in requests} == {f'"{asked.validator}"'}
    assert not any("if-range" in request.headers or "x-ms-range-get-content-md5" in request.headers for request in requests)
    assert {request.headers["x-ms-version"] for request in requests} == {VERSION[1]}


def test_a_blob_that_is_overwritten_before_the_next_range(proxy):
    with Lanes(remote(proxy)) as lanes:
        lanes.read(0, MIB)
        proxy.azurite.upload("models", "w.bin", WEIGHTS[::-1])
        with pytest.raises(SourceError, match="overwritten or deleted after it was listed") as caught:
            lanes.read(MIB)
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_CHANGED, True)
    assert [request.status for request in proxy.seen("models/w.bin", origin="bytes")] == [206, 412]


def test_a_blob_that_is_deleted_before_the_next_range(proxy):
    with Lanes(remote(proxy)) as lanes:
        lanes.read(0, MIB)
        proxy.azurite.delete("models", "w.bin")
        with pytest.raises(SourceError, match="deleted after it was listed") as caught:
            lanes.read(MIB)
    assert caught.value.code is Code.SOURCE_CHANGED


def test_the_same_where_the_condition_is_not_looked_at_first(proxy):
    proxy.faults.add("models/w.bin", Kind.STATUS, **refusal(404, "BlobNotFound"))
    error = refused(proxy)
    assert error.code is Code.SOURCE_CHANGED
    assert "deleted after it was listed (404 BlobNotFound)" in str(error)


def test_a_container_that_is_gone_is_no_change_of_the_blob(proxy):
    proxy.faults.add("models/w.bin", Kind.STATUS, **refusal(404, "ContainerNotFound"))
    assert refused(proxy).code is Code.REPOSITORY_NOT_FOUND


def test_a_blob_that_nobody_listed_is_only_missing(proxy):
    asked = remote(proxy, match=False, validator=None)
    proxy.azurite.delete("models", "w.bin")
    error = refused(proxy, asked)
    assert (error.code, error.retryable) == (Code.FILE_NOT_FOUND, False)


def test_an_answer_of_another_version_is_a_change_though_no_412_came(proxy):
    asked = remote(proxy)
    proxy.azurite.upload("models", "w.bin", WEIGHTS[::-1])
    other = proxy.azurite.blob("models", "w.bin").get_blob_properties().etag
    headers = {"ETag": other, "Content-Range": f"bytes 0-{SIZE - 1}/{SIZE}"}
    proxy.faults.add("models/w.bin", Kind.STATUS, status=206, headers=headers, body=WEIGHTS[::-1])
    assert refused(proxy, asked).code is Code.SOURCE_CHANGED


def test_a_412_of_who_is_not_azure_is_a_change_as_well():
    with HubServer({"acme/m": Repo({"config.json": b"{}"})}) as hub:
        hub.faults.add("*", Kind.STATUS, origin="hub", status=412)
        url = f"{hub.url}/acme/m/resolve/{hub.repos['acme/m'].commit}/config.json"
        asked = HttpRemote(url, 2, validator='"1"', name="config.json", match=True)
        with Lanes(asked) as lanes, pytest.raises(SourceError) as caught:
            lanes.read()
        assert caught.value.code is Code.SOURCE_CHANGED
        assert hub.requests[0].headers["if-match"] == '"1"'


# --- MD5 on the wire


def ranges(proxy):
    """First and last byte of every range asked for."""
    return [tuple(int(end) for end in request.range.removeprefix("bytes=").split("-")) for request in proxy.seen("models/w.bin", origin="bytes")]


def test_ranges_with_md5_have_four_mebibytes_at_most_and_share_a_connection(proxy):
    with Lanes(remote(proxy, range_md5=True)) as lanes:
        assert lanes.read() == WEIGHTS
    assert ranges(proxy) == [(0, 4 * MIB - 1), (4 * MIB, 8 * MIB - 1), (8 * MIB, SIZE - 1)]
    assert {request.headers["x-ms-range-get-content-md5"] for request in proxy.seen("models/w.bin", origin="bytes")} == {"true"}
    assert proxy.connections == 1


@pytest.mark.parametrize(("kind", "after"), [(Kind.FLIP, 12345), (Kind.WRONG_MD5, 0)])
def test_a_range_that_is_not_its_md5_is_asked_for_again(proxy, kind, after):
    with Lanes(remote(proxy, range_md5=True)) as lanes:
        reader, into = lanes.reader(), bytearray(SIZE)
        reader.read(0, memoryview(into)[: 4 * MIB])
        spoilt = proxy.faults.add("models/w.bin", kind, after=after)
        reader.read(4 * MIB, memoryview(into)[4 * MIB :])
    assert spoilt.hits == 1
    assert into == WEIGHTS
    assert ranges(proxy)[1:3] == [(4 * MIB, 8 * MIB - 1)] * 2
    assert reader.received == SIZE


def test_ranges_that_are_never_their_md5_are_given_up(proxy):
    fault = proxy.faults.add("models/w.bin", Kind.WRONG_MD5, times=None)
    error = refused(proxy, remote(proxy, range_md5=True))
    assert isinstance(error, IntegrityError)
    assert error.code is Code.DIGEST_MISMATCH
    assert "bytes 0-4194303 came with an MD5 that is not theirs" in str(error)
    assert fault.hits == 3


def test_spoilt_ranges_that_are_not_in_a_row_are_no_reason_to_give_up(proxy):
    with Lanes(remote(proxy, range_md5=True)) as lanes:
        reader, into = lanes.reader(), bytearray(4 * MIB)
        for _ in range(4):
            proxy.faults.add("models/w.bin", Kind.FLIP, after=1)
            reader.read(0, memoryview(into))
            assert into == WEIGHTS[: 4 * MIB]


@pytest.mark.parametrize("kind", [Kind.TRUNCATE, Kind.RESET, Kind.STALL])
def test_of_a_range_that_breaks_no_byte_is_taken_unproven(proxy, kind):
    proxy.faults.add("models/w.bin", kind, after=MIB)
    with Lanes(remote(proxy, range_md5=True)) as lanes:
        assert lanes.read() == WEIGHTS
    assert ranges(proxy)[:2] == [(0, 4 * MIB - 1)] * 2


def test_an_answer_without_md5_is_taken():
    with HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS})}) as hub:
        url = f"{hub.url}/acme/m/resolve/{hub.repos['acme/m'].commit}/m.safetensors"
        with Lanes(HttpRemote(url, SIZE, name="m.safetensors", range_md5=True)) as lanes:
            assert lanes.read() == WEIGHTS
        assert len(hub.seen("m.safetensors", origin="cdn")) == 3


# --- refusals


def test_a_sas_that_expires_half_way_is_to_be_renewed(proxy):
    asked = remote(proxy)
    with Lanes(asked) as lanes:
        reader, into = lanes.reader(), memoryview(bytearray(SIZE))
        reader.read(0, into[:MIB])
        proxy.revoke()
        with pytest.raises(SourceError, match="SAS is refused") as caught:
            reader.read(MIB, into[MIB:])
    assert (caught.value.code, caught.value.retryable) == (Code.BAD_TOKEN, False)
    with Lanes(replace(asked, url=f"{proxy.url}/models/w.bin?{proxy.azurite.sas('models', lasts_s=7200)}")) as lanes:
        assert lanes.read(MIB) == WEIGHTS[MIB:]


@pytest.mark.parametrize(
    ("sas", "code", "says"),
    [
        ({"lasts_s": -120}, Code.BAD_TOKEN, "the SAS expired 2 min ago; the clocks agree"),
        ({"begins_s": 1000}, Code.BAD_TOKEN, "the SAS is not valid for another 17 min; the clocks agree"),
        ({"permission": "l"}, Code.SOURCE_FORBIDDEN, "the SAS does not allow this operation (403 AuthorizationPermissionMismatch)"),
    ],
)
def test_what_azurite_says_of_a_sas(proxy, sas, code, says):
    error = refused(proxy, remote(proxy, url=f"{proxy.url}/models/w.bin?{proxy.azurite.sas('models', **sas)}"))
    assert error.code is code
    assert says in str(error)
    assert len(proxy.requests) == 1


def test_a_sas_that_is_cut_short(proxy):
    whole = remote(proxy)
    rest, signature = whole.url.split("sig=")
    cut = quote(unquote(signature)[:-8], safe="")  # Azurite answers 500 to half a %-escape
    error = refused(proxy, replace(whole, url=f"{rest}sig={cut}"))
    assert error.code in (Code.BAD_TOKEN, Code.SOURCE_FORBIDDEN)
    assert "403" in str(error)


def test_who_gives_no_credential(proxy):
    error = refused(proxy, remote(proxy, url=f"{proxy.url}/models/w.bin"))
    assert error.code is Code.SOURCE_FORBIDDEN
    assert "credential" in error.hint or "network" in error.hint


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (wrong_clock(1500), Code.BAD_TOKEN, "this node's clock is 25 min behind the server's"),
        (expired_sas(), Code.BAD_TOKEN, "the clocks agree"),
        (refusal(403, "AuthorizationFailure"), Code.SOURCE_FORBIDDEN, "network rules"),
        (refusal(403, "AuthorizationSourceIPMismatch"), Code.SOURCE_FORBIDDEN, "not for this node's address"),
        (refusal(409, "BlobArchived"), Code.ARCHIVED, "archive tier"),
        (refusal(403, "AccountIsDisabled"), Code.SOURCE_FORBIDDEN, "disabled"),
    ],
)
def test_refusals_that_azurite_never_gives(proxy, options, code, says):
    proxy.faults.add("models/w.bin", Kind.STATUS, **options)
    error = refused(proxy)
    assert (error.code, error.retryable) == (code, False)
    assert says in str(error)
    assert len(proxy.requests) == 1


def test_a_token_that_expires_half_way_is_to_be_renewed(secure):
    with AzureProxy(secure) as proxy:
        url, headers = f"{proxy.url}/models/w.bin", (VERSION, ("Authorization", f"Bearer {jwt(3600)}"))
        with Lanes(remote(proxy, url=url, headers=headers), ca_file=str(secure.ca_file)) as lanes:
            reader, into = lanes.reader(), memoryview(bytearray(SIZE))
            reader.read(0, into[:MIB])
            proxy.revoke()
            with pytest.raises(SourceError, match="token is refused") as caught:
                reader.read(MIB, into[MIB:])
        assert into[:MIB] == WEIGHTS[:MIB]
    assert caught.value.code is Code.BAD_TOKEN
    assert "Bearer" not in repr(caught.value)


@pytest.mark.parametrize(("kind", "status"), [(Kind.BUSY, 503), (Kind.THROTTLE, 429)])
def test_a_busy_account_is_waited_for_as_long_as_it_says(proxy, kind, status):
    told = []
    proxy.faults.add("models/w.bin", kind, seconds=1)
    with Lanes(remote(proxy), on_pause=lambda origin, seconds: told.append((origin, seconds))) as lanes:
        assert lanes.read() == WEIGHTS
    assert [request.status for request in proxy.requests] == [status, 206]
    assert told == [(proxy.url.rpartition("/")[0], 1.0)]


def test_a_service_that_fails_is_tried_again(proxy):
    proxy.faults.add("models/w.bin", Kind.STATUS, **refusal(500, "OperationTimedOut"))
    with Lanes(remote(proxy)) as lanes:
        assert lanes.read() == WEIGHTS


def test_a_busy_account_that_stays_so_is_named(proxy):
    proxy.faults.add("models/w.bin", Kind.BUSY, seconds=30, times=None)
    error = refused(proxy, deadline=1.0)
    assert (error.code, error.retryable, error.retry_after_s) == (Code.SOURCE_BUSY, True, 30.0)
    assert "over its limit" in str(error)
