"""Which secret goes where: connection strings, keys and SAS against accounts and hosts, and what is said of those that are not used."""

from __future__ import annotations

import base64
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.ref import parse_ref
from nvcache.errors import Code, ConfigError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.place import CLOUDS, EMULATED, EMULATED_KEY, Connection, Key, Sas, place_of, secret_for, trusted

KEY = base64.b64encode(b"accountKeyNeverToBePrinted").decode()
SIGNED = "sv=2021-12-02&sp=rl&sig=signatureNeverToBePrinted%3D"
EMULATOR = "http://127.0.0.1:10000/devstoreaccount1"
STRING = f"DefaultEndpointsProtocol=https;AccountName=weights;AccountKey={KEY};EndpointSuffix=core.windows.net"
PUBLIC = "az://weights/models/llama"


def chosen(ref: str, access: Access) -> Key | Sas | None:
    """The secret for a reference."""
    return secret_for(place_of(parse_ref(ref), access), access)[0]


def reasons(ref: str, access: Access) -> str:
    """Why there is none."""
    secret, tried = secret_for(place_of(parse_ref(ref), access), access)
    assert secret is None
    assert KEY not in str(tried)
    assert "NeverToBePrinted" not in str(tried)
    return "; ".join(tried)


@pytest.mark.parametrize(
    ("text", "account", "endpoint"),
    [
        (STRING, "weights", "https://weights.blob.core.windows.net"),
        (f"AccountName=weights;AccountKey={KEY}", "weights", "https://weights.blob.core.windows.net"),
        ("accountname=weights; endpointsuffix=core.chinacloudapi.cn ;", "weights", "https://weights.blob.core.chinacloudapi.cn"),
        (f"DefaultEndpointsProtocol=http;AccountName={EMULATED};BlobEndpoint={EMULATOR}/;", EMULATED, EMULATOR),
        ("BlobEndpoint=https://Weights.Example.com:443/;SharedAccessSignature=" + SIGNED, "weights", "https://weights.example.com"),
        ("BlobEndpoint=http://10.0.0.1:10000/acc", "acc", "http://10.0.0.1:10000/acc"),
        ("UseDevelopmentStorage=true", EMULATED, EMULATOR),
    ],
)
def test_connection_strings(text: str, account: str, endpoint: str) -> None:
    """Account and endpoint of each form."""
    found = Connection.parse(text, "x")
    assert (found.account, found.endpoint) == (account, endpoint)


def test_a_key_keeps_its_equals_signs() -> None:
    """Values may hold the character that separates names from values."""
    assert Connection.parse(f"AccountName=a1b;AccountKey={EMULATED_KEY}", "x").key == EMULATED_KEY
    assert Connection.parse(f"BlobEndpoint=https://a1b.blob.core.windows.net;SharedAccessSignature={SIGNED}", "x").sas == SIGNED


@pytest.mark.parametrize(
    "text", ["nonsense", "AccountKey=secretNeverToBePrinted", "BlobEndpoint=ftp://h;AccountName=acc", "BlobEndpoint=https://u:p@h/"]
)
def test_an_unusable_connection_string_is_not_repeated(text: str) -> None:
    """It names nothing, or no http(s) URL."""
    with pytest.raises(ConfigError) as caught:
        Connection.parse(text, "x")
    assert caught.value.code is Code.BAD_CONFIG
    assert text not in str(caught.value)
    assert "NeverToBePrinted" not in str(caught.value)


def test_an_account_is_where_its_connection_string_says() -> None:
    """az://account by the connection string's endpoint, another account in the cloud of the suffix."""
    access = Access(connection_string="UseDevelopmentStorage=true", suffix="core.usgovcloudapi.net")
    assert place_of(parse_ref(f"az://{EMULATED}/models/a/b"), access).endpoint == EMULATOR
    place = place_of(parse_ref("az://other/models"), access)
    assert (place.endpoint, place.account, place.container, place.prefix) == ("https://other.blob.core.usgovcloudapi.net", "other", "models", "")


def test_a_blob_s_url_is_quoted_once() -> None:
    """Names are free text."""
    place = place_of(parse_ref("az://weights/models/a%20b"), Access())
    assert place.url("ü #1%41.txt") == "https://weights.blob.core.windows.net/models/a%20b/%C3%BC%20%231%2541.txt"


def test_the_order_of_secrets() -> None:
    """Connection string, then key, then SAS."""
    everything = Access(connection_string=STRING, account="weights", key=base64.b64encode(b"other").decode(), sas=SIGNED)
    assert chosen(PUBLIC, everything) == Key("weights", KEY)
    assert chosen(PUBLIC, replace(everything, connection_string=None)) == Key("weights", everything.key or "")
    assert chosen(PUBLIC, replace(everything, connection_string=None, key=None)) == Sas(SIGNED)
    assert chosen(PUBLIC, Access(account="weights", sas=f"?{SIGNED}")) == Sas(SIGNED)
    assert reasons(PUBLIC, Access()) == "connection string: none; account key: none; SAS: none"


def test_no_secret_goes_to_another_account() -> None:
    """Each says for which account it is."""
    access = Access(connection_string=STRING, account="weights", key=KEY, sas=SIGNED)
    assert reasons("az://other/models", access) == (
        "connection string: it is for https://weights.blob.core.windows.net; account key: it is for account weights; SAS: it is for account weights"
    )
    assert reasons(PUBLIC, Access(key=KEY, sas=SIGNED)).count("az_account does not say") == 2


@pytest.mark.parametrize(
    "ref",
    [
        "https://weights.example.com/models",
        "http://127.0.0.1:6666/weights/models",
        "http://weights.blob.core.windows.net/models",  # anybody on the way could read it
        "https://weights.blob.core.windows.net.example.com/models",
        "https://weights.core.windows.net/models",
    ],
)
def test_no_secret_goes_to_a_host_that_only_names_the_account(ref: str) -> None:
    """Whoever names the model must not be able to have the SAS sent to a host of theirs."""
    access = Access(connection_string=STRING, account="weights", key=KEY, sas=SIGNED)
    assert "not sent to" in reasons(ref, replace(access, connection_string=None))
    assert chosen(ref, access) is None
    assert not trusted(place_of(parse_ref(ref), access), access)


@pytest.mark.parametrize("ref", [f"https://weights.{cloud}/models" for cloud in CLOUDS])
def test_every_cloud_of_azure_is_trusted(ref: str) -> None:
    """Sovereign clouds and accounts with a DNS zone."""
    access = Access(account="weights", key=KEY)
    assert trusted(place_of(parse_ref(ref), access), access)
    assert chosen(ref, access) == Key("weights", KEY)


def test_hosts_that_the_operator_names() -> None:
    """In az_hosts, in the connection string, or by the suffix."""
    ref = "http://127.0.0.1:10000/weights/models"
    assert chosen(ref, Access(account="weights", sas=SIGNED, hosts=("127.0.0.1:10000",))) == Sas(SIGNED)
    assert chosen(ref, Access(account="weights", sas=SIGNED, hosts=("127.0.0.1",))) is None
    assert chosen("http://azurite:10000/weights/models", Access(account="weights", sas=SIGNED, hosts=("azurite:10000",))) is None
    assert chosen("http://azurite:10000/weights/models", Access(account="weights", sas=SIGNED, hosts=("http://azurite:10000",))) == Sas(SIGNED)
    assert chosen("https://azurite:10000/weights/models", Access(account="weights", sas=SIGNED, hosts=("azurite:10000",))) == Sas(SIGNED)
    own = Access(connection_string=f"BlobEndpoint=https://weights.example.com;SharedAccessSignature={SIGNED}")
    assert chosen("https://weights.example.com/models", own) == Sas(SIGNED)
    assert chosen("https://weights.example.com:8443/weights/models", own) is None
    stack = Access(account="weights", key=KEY, suffix="local.azurestack.external")
    assert chosen("az://weights/models", stack) == Key("weights", KEY)


def test_the_emulator_s_own_account_needs_no_setting() -> None:
    """Its key is public; on another machine, or with an account of its own, it has to be named."""
    access = Access(account=EMULATED, key=EMULATED_KEY)
    assert chosen(f"{EMULATOR}/models", access) == Key(EMULATED, EMULATED_KEY)
    assert chosen(f"http://localhost:10000/{EMULATED}/models", access) == Key(EMULATED, EMULATED_KEY)
    assert chosen(f"http://10.0.0.1:10000/{EMULATED}/models", access) is None
    assert chosen(f"{EMULATOR}/models", Access(sas=SIGNED)) is None


@pytest.mark.parametrize(
    "access", [Access(account="weights", key="not base64!"), *(Access(account="weights", sas=text) for text in ("token", "sig=a\nb", "https://a/?x"))]
)
def test_what_cannot_be_a_secret_is_refused_unseen(access: Access) -> None:
    """Before any library could quote it."""
    with pytest.raises(ConfigError) as caught:
        chosen(PUBLIC, access)
    assert caught.value.code is Code.BAD_CONFIG
    assert str(access.key or access.sas) not in str(caught.value)


@pytest.mark.parametrize(
    ("access", "text"),
    [
        (Access(account="weights", key="§", key_from="az_key_file /k"), "the account key from az_key_file /k for Azure: it is not base64"),
        (Access(account="weights", sas="x"), "the SAS from AZURE_STORAGE_SAS_TOKEN for Azure: it is no signed query"),
        (Access(account="weights", sas=f"https://weights.blob.core.windows.net/?{SIGNED}"), "it is a URL: only what follows the '?' is the SAS"),
        (Access(connection_string="x"), "the connection string from AZURE_STORAGE_CONNECTION_STRING for Azure: it names neither"),
        (Access(connection_string=f"{STRING.partition('AccountKey')[0]};AccountKey=§"), "the connection string from AZURE_STORAGE_CONNECTION_STRING"),
    ],
)
def test_where_a_bad_secret_is_from_is_said(access: Access, text: str) -> None:
    """The setting to correct is named."""
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        chosen(PUBLIC, access)
    assert "NeverToBePrinted" not in str(caught.value)


def test_nothing_printable_holds_a_secret() -> None:
    """Representations of what is known and of what is chosen."""
    access = Access(connection_string=STRING, account="weights", key=KEY, sas=SIGNED)
    printed = repr((access, Connection.parse(STRING, "x"), Key("weights", KEY), Sas(SIGNED)))
    assert KEY not in printed
    assert "NeverToBePrinted" not in printed


@given(st.text(), st.sampled_from(["", "AccountName=weights;", "BlobEndpoint="]))
def test_any_text_is_a_connection_string_or_a_refusal(text: str, start: str) -> None:
    """No other error, and an endpoint is always an http(s) URL without a slash at its end."""
    try:
        found = Connection.parse(start + text, "x")
    except ConfigError:
        return
    assert found.endpoint.startswith(("http://", "https://"))
    assert not found.endpoint.endswith("/")
