"""The node's identity: real azure-identity against a loopback endpoint, and what is said when there is no token."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.core.ref import parse_ref
from nvcache.errors import Code, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.grant import grant_for
from nvcache.sources.azure.identity import Identity, NoTokenError, explained
from nvcache.sources.azure.place import Anonymous, Bearer, place_of
from nvcache.sources.http import Transport
from tests.support.identity import AUDIENCE, CLIENT, HEADER, MARK, Asked
from tests.support.identity import Identity as Entra

PUBLIC = place_of(parse_ref("az://weights/models"), Access())
NOTHING = """DefaultAzureCredential failed to retrieve a token from the included credentials.
Attempted credentials:
\tEnvironmentCredential: EnvironmentCredential authentication unavailable. Environment variables are not fully configured.
Visit https://aka.ms/azsdk/python/identity/environmentcredential/troubleshoot to troubleshoot this issue.
\tWorkloadIdentityCredential: WorkloadIdentityCredential authentication unavailable. The workload options are not fully configured. See the \
troubleshooting guide for more information: https://aka.ms/x. Missing required arguments: 'tenant_id', 'token_file_path'.
\tManagedIdentityCredential: ManagedIdentityCredential authentication unavailable, no response from the IMDS endpoint.
\tAzureCliCredential: Azure CLI not found on path
To mitigate this issue, please refer to the troubleshooting guidelines here at https://aka.ms/azsdk/python/identity/defaultazurecredential."""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No identity in the environment."""
    for name in ("IDENTITY_ENDPOINT", "IDENTITY_HEADER", "MSI_ENDPOINT", "AZURE_TOKEN_CREDENTIALS", "AZURE_AUTHORITY_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_USERNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bare(unset: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor a way to one on this machine."""
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def entra(unset: None, tmp_path: Path) -> Iterator[Entra]:
    """Something that gives tokens."""
    with Entra(tmp_path) as entra:
        yield entra


def test_what_the_library_says_in_a_line() -> None:
    """Each way by name and in order, variables instead of arguments, no addresses of help pages."""
    assert explained(NOTHING) == (
        "environment: Environment variables are not fully configured; "
        "workload identity: AZURE_TENANT_ID, AZURE_FEDERATED_TOKEN_FILE not set; "
        "managed identity: no response from the IMDS endpoint; "
        "Azure CLI: Azure CLI not found on path",
        True,
    )


def test_an_identity_that_is_set_up_and_fails() -> None:
    """The library stops there: the last way was not tried."""
    text = "x\nAttempted credentials:\n\tEnvironmentCredential: none\n\tWorkloadIdentityCredential: AADSTS700016: no such application\nTrace ID: 1"
    tried, whole = explained(text)
    assert not whole
    assert tried.endswith("workload identity: AADSTS700016: no such application")
    assert explained("AADSTS50001: gone\nTrace") == ("identity: AADSTS50001: gone", False)


def test_a_managed_identity(entra: Entra, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the system and of a user; a token is asked for once."""
    for client in (None, CLIENT):
        for name, value in entra.managed(client).items():
            monkeypatch.setenv(name, value)
        identity = Identity(Transport())
        assert identity.token() == identity.token() == entra.given[-1]
        assert entra.asked == [Asked("managed", client, AUDIENCE)]
        entra.asked.clear()


def test_a_workload_identity(entra: Entra, monkeypatch: pytest.MonkeyPatch) -> None:
    """As AKS sets it up for a pod."""
    for name, value in entra.workload().items():
        monkeypatch.setenv(name, value)
    assert Identity(Transport()).token() == entra.given[-1]
    assert entra.asked[-1].how == "workload"


def test_a_token_is_renewed_before_it_ends(entra: Entra, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is about to end is not given out for another file."""
    for name, value in entra.managed().items():
        monkeypatch.setenv(name, value)
    entra.lifetime_s = 200
    identity = Identity(Transport())
    assert identity.token() != identity.token()


def test_an_identity_that_worked_before_is_no_reason_to_go_on_without(entra: Entra, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anonymous reading would be refused for another reason, and for good."""
    for name, value in entra.managed().items():
        monkeypatch.setenv(name, value)
    entra.lifetime_s = 200
    identity = Identity(Transport())
    grant = grant_for(PUBLIC, Access(), identity)
    assert isinstance(grant, Bearer)
    assert MARK not in repr(grant)
    entra.refuse = True
    with pytest.raises(SourceError) as caught:
        grant_for(PUBLIC, Access(), identity)
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_FORBIDDEN, True)
    for secret in (MARK, HEADER):
        assert secret not in f"{caught.value!r} {caught.value.hint}"


@pytest.mark.usefixtures("bare")
def test_no_identity_is_found_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to none is told, and is not gone again."""
    identity = Identity(Transport())
    with pytest.raises(NoTokenError) as caught:
        identity.token()
    assert [part.partition(":")[0] for part in caught.value.tried.split("; ")] == [
        "environment",
        "workload identity",
        "managed identity",
        "Azure CLI",
    ]
    assert not caught.value.failing
    monkeypatch.setattr(Identity, "_ask", lambda *_: pytest.fail("it was looked for again"))
    grant = grant_for(PUBLIC, Access(), identity)
    assert isinstance(grant, Anonymous)
    assert grant.tried.startswith("connection string: none; account key: none; SAS: none; environment: ")
    with pytest.raises(SourceError) as refused:
        grant_for(PUBLIC, Access(credential="identity"), identity)
    assert (refused.value.code, refused.value.retryable) == (Code.SOURCE_FORBIDDEN, False)


@pytest.mark.usefixtures("bare")
def test_an_identity_is_not_asked_for_what_it_must_not_be_sent_to() -> None:
    """Plain http, and hosts of nobody knows whom."""
    identity = Identity(Transport())
    for url, why in (("http://weights.blob.core.windows.net/models", "plain http"), ("https://weights.example.com/models", "neither Azure's")):
        grant = grant_for(place_of(parse_ref(url), Access()), Access(), identity)
        assert isinstance(grant, Anonymous)
        assert why in grant.tried
    assert grant_for(PUBLIC, Access(credential="anonymous"), identity) == Anonymous()


def test_nothing_of_azure_is_loaded_before_it_is_asked() -> None:
    """Workers, and daemons without blobs, do not pay for the libraries."""
    code = "import sys, nvcache.sources.azure.source, nvcache.engine.worker; print([name for name in sys.modules if name.partition('.')[0] in "
    code += "('azure', 'requests', 'msal', 'urllib3')])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]"
