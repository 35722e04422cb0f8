"""What doctor says of Azure's secrets: what is set, from where, whether it can be used; never the secret."""

from __future__ import annotations

import base64

import pytest

from nvcache.cli.checks_azure import secrets
from nvcache.cli.doctor import THIS_SHELL, _azure
from nvcache.settings import load
from nvcache.sources.azure.access import Access

KEY = base64.b64encode(b"KeyNeverToBePrinted").decode()
SAS = "sv=2021-12-02&se=2026-01-31T12:00:00Z&sig=SignatureNeverToBePrinted"
ENDS = 1769860800.0  # 2026-01-31T12:00:00Z


@pytest.mark.parametrize(
    ("access", "verdict", "text"),
    [
        (Access(account="weights", key=KEY, key_from="az_key_file /k"), "ok", "account key from az_key_file /k, for account weights"),
        (Access(account="weights", key="§"), "fail", "AZURE_STORAGE_KEY for Azure: it is not base64"),
        (Access(key=KEY), "warn", "not used, az_account does not say for which account"),
        (Access(account="weights", sas=SAS), "ok", "for account weights, valid until 2026-01-31T12:00:00Z"),
        (Access(account="weights", sas=SAS.replace("12:", "10:")), "fail", "expired at 2026-01-31T10:00:00Z"),
        (Access(account="weights", sas="sig=NeverToBePrinted"), "ok", "does not say until when"),
        (Access(connection_string=f"AccountName=weights;AccountKey={KEY}"), "ok", "the connection string from AZURE_STORAGE_CONNECTION_STRING"),
        (Access(connection_string="AccountName=weights"), "warn", "neither a key nor a SAS"),
        (Access(connection_string=f"AccountKey={KEY}"), "fail", "neither an account nor a BlobEndpoint"),
    ],
)
def test_each_secret_is_told(access, verdict, text):
    (finding,) = secrets(access, ENDS - 3600)
    assert (finding.check, finding.verdict) == ("azure", verdict)
    assert text in finding.detail
    assert bool(finding.remedy) == (verdict != "ok")
    assert not any(secret in repr(finding) for secret in (KEY, "NeverToBePrinted"))


def test_secrets_that_another_choice_leaves_unused_are_told():
    assert [finding.verdict for finding in secrets(Access(account="weights", key=KEY, credential="identity"), 0.0)] == ["ok", "warn"]


def test_nothing_is_said_where_nothing_is_set():
    assert list(secrets(Access(account="weights", credential="identity"), 0.0)) == []


def test_a_file_is_named_and_one_that_cannot_be_read_fails(tmp_path, monkeypatch):
    for name in ("CONNECTION_STRING", "KEY", "SAS_TOKEN"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    file = tmp_path / "key"
    chosen = load(flags={"az_account": "weights", "az_key_file": file})
    (missing,) = _azure(chosen)
    assert (missing.verdict, str(file) in missing.detail) == ("fail", True)
    file.write_text(KEY)
    (found,) = _azure(chosen)
    assert found.detail == f"account key from az_key_file {file}, for account weights{THIS_SHELL}"
