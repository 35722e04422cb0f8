"""What Azure's refusals mean: every code its own error, every 403 its cause, and never a word of the credential."""

from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import quote, urlencode

import pytest
from azure.storage.blob import StorageErrorCode
from hypothesis import given
from hypothesis import strategies as st

from nvcache.errors import Code, SourceError
from nvcache.sources.azure_answers import NOTHING, Credential, Kind, recognised, refusal

NOW = 1_900_000_000.0
WHAT = "cannot fetch m.safetensors from https://acme.blob.core.windows.net"
SECRET = "c2VjcmV0LXNpZ25hdHVyZS1kby1ub3QtcHJpbnQ="
TOKEN, KEY, POLICY = Credential(Kind.TOKEN), Credential(Kind.KEY), Credential(Kind.SAS)  # a SAS whose times a stored access policy knows
VALID = Credential(Kind.SAS, NOW - 3600, NOW + 3600)


def refused(status, code, credential=TOKEN, *, ahead=0.0, listed=False, **headers):
    """The error of this answer, from a server whose clock is `ahead` seconds ahead of ours."""
    sent = {"Date": formatdate(NOW + ahead, usegmt=True)} | {name.replace("_", "-"): value for name, value in headers.items()}
    return refusal(status, code, sent, WHAT, now=NOW, credential=credential, listed=listed)


@pytest.mark.parametrize(
    ("status", "code", "credential", "means", "says"),
    [
        (401, "NoAuthenticationInformation", NOTHING, Code.SOURCE_FORBIDDEN, "anonymous"),
        (401, "NoAuthenticationInformation", TOKEN, Code.BAD_TOKEN, "token is refused"),
        (401, "InvalidAuthenticationInfo", TOKEN, Code.BAD_TOKEN, "token is refused"),
        (400, "InvalidAuthenticationInfo", KEY, Code.BAD_TOKEN, "key is refused"),
        (401, None, TOKEN, Code.BAD_TOKEN, "token is refused"),
        (401, None, NOTHING, Code.SOURCE_FORBIDDEN, "refuses"),
        (403, "AuthenticationFailed", KEY, Code.BAD_TOKEN, "key is refused"),
        (403, "AuthenticationFailed", VALID, Code.BAD_TOKEN, "wrong, revoked or cut short"),
        (403, "AuthenticationFailed", POLICY, Code.BAD_TOKEN, "not valid yet, out of date, or wrong"),
        (403, "AuthenticationFailed", NOTHING, Code.SOURCE_FORBIDDEN, "who asks"),
        (403, "AuthorizationFailure", TOKEN, Code.SOURCE_FORBIDDEN, "network rules"),
        (403, "AuthorizationFailure", NOTHING, Code.SOURCE_FORBIDDEN, "network rules"),
        (403, "AuthorizationFailure", VALID, Code.SOURCE_FORBIDDEN, "network rules"),
        (403, "AuthorizationFailure", POLICY, Code.BAD_TOKEN, "out of date"),
        (403, None, POLICY, Code.BAD_TOKEN, "out of date"),
        (403, None, TOKEN, Code.SOURCE_FORBIDDEN, "refuses"),
        (403, "AuthorizationPermissionMismatch", TOKEN, Code.SOURCE_FORBIDDEN, "no data role"),
        (403, "AuthorizationPermissionMismatch", VALID, Code.SOURCE_FORBIDDEN, "SAS does not allow"),
        (403, "AuthorizationPermissionMismatch", KEY, Code.SOURCE_FORBIDDEN, "credential does not allow"),
        (403, "AuthorizationSourceIPMismatch", VALID, Code.SOURCE_FORBIDDEN, "address"),
        (403, "AuthorizationProtocolMismatch", VALID, Code.SOURCE_FORBIDDEN, "https only"),
        (403, "AuthorizationServiceMismatch", VALID, Code.SOURCE_FORBIDDEN, "not for the Blob service"),
        (403, "AuthorizationResourceTypeMismatch", VALID, Code.SOURCE_FORBIDDEN, "type of resource"),
        (403, "InsufficientAccountPermissions", TOKEN, Code.SOURCE_FORBIDDEN, "account does not allow"),
        (403, "KeyBasedAuthenticationNotPermitted", KEY, Code.SOURCE_FORBIDDEN, "neither its key"),
        (403, "AccountIsDisabled", TOKEN, Code.SOURCE_FORBIDDEN, "disabled"),
        (409, "PublicAccessNotPermitted", NOTHING, Code.SOURCE_FORBIDDEN, "anonymous"),
        (404, "ResourceNotFound", NOTHING, Code.SOURCE_FORBIDDEN, "anonymous"),
        (404, "ResourceNotFound", TOKEN, Code.REPOSITORY_NOT_FOUND, "no such account, container"),
        (409, "BlobArchived", TOKEN, Code.ARCHIVED, "archive tier"),
        (409, "BlobBeingRehydrated", TOKEN, Code.ARCHIVED, "on its way"),
        (404, "BlobNotFound", TOKEN, Code.FILE_NOT_FOUND, "no such blob, snapshot or version"),
        (404, "ContainerNotFound", TOKEN, Code.REPOSITORY_NOT_FOUND, "no such container"),
        (409, "ContainerBeingDeleted", TOKEN, Code.REPOSITORY_NOT_FOUND, "being deleted"),
        (409, "ContainerDisabled", TOKEN, Code.SOURCE_FORBIDDEN, "container is disabled"),
        (400, "InvalidResourceName", TOKEN, Code.REPOSITORY_NOT_FOUND, "name"),
        (400, "InvalidQueryParameterValue", TOKEN, Code.REVISION_NOT_FOUND, "snapshot or version"),
        (412, "LeaseIdMissing", TOKEN, Code.SOURCE_FORBIDDEN, "lease"),
        (412, "LeaseIdMismatchWithBlobOperation", TOKEN, Code.SOURCE_FORBIDDEN, "lease"),
        (412, "LeaseNotPresentWithBlobOperation", TOKEN, Code.SOURCE_FORBIDDEN, "lease"),
        (412, "LeaseLost", TOKEN, Code.SOURCE_FORBIDDEN, "lease"),
        (404, None, TOKEN, Code.FILE_NOT_FOUND, "404"),
        (418, "Teapot", TOKEN, Code.SOURCE_FAILED, "418 Teapot"),
    ],
)
def test_what_will_not_pass_by_itself(status, code, credential, means, says):
    error = refused(status, code, credential)
    assert (error.code, error.retryable, error.retry_after_s) == (means, False, None)
    assert str(error).startswith(f"{WHAT}: ")
    assert says in str(error)
    assert str(status) in str(error)
    assert (code or "") in str(error)
    assert error.hint


@pytest.mark.parametrize(
    ("status", "code", "headers", "means", "wait"),
    [
        (503, "ServerBusy", {"Retry_After": "7"}, Code.SOURCE_BUSY, 7.0),
        (503, "ServerBusy", {}, Code.SOURCE_BUSY, None),
        (503, "ServerBusy", {"retry_after": formatdate(NOW + 40, usegmt=True)}, Code.SOURCE_BUSY, 40.0),
        (429, "TooManyRequests", {"Retry_After": "3"}, Code.SOURCE_BUSY, 3.0),
        (503, None, {}, Code.SOURCE_BUSY, None),
        (500, "OperationTimedOut", {}, Code.SOURCE_FAILED, None),
        (500, "InternalError", {"Retry_After": "2"}, Code.SOURCE_FAILED, 2.0),
        (502, None, {}, Code.SOURCE_FAILED, None),
    ],
)
def test_what_may_pass(status, code, headers, means, wait):
    error = refused(status, code, **headers)
    assert (error.code, error.retryable, error.retry_after_s) == (means, True, wait)


def test_a_wait_is_counted_by_the_clock_of_the_server():
    assert refused(503, "ServerBusy", ahead=900, Retry_After=formatdate(NOW + 910, usegmt=True)).retry_after_s == 10.0


@pytest.mark.parametrize(
    ("status", "code", "says"), [(412, "ConditionNotMet", "overwritten"), (404, "BlobNotFound", "deleted"), (416, "InvalidRange", "shorter")]
)
def test_a_blob_that_is_another_one_since_it_was_listed(status, code, says):
    error = refused(status, code, listed=True)
    assert (error.code, error.retryable) == (Code.SOURCE_CHANGED, True)
    assert says in str(error)


def test_a_missing_container_is_no_change_of_a_listed_blob():
    assert refused(404, "ContainerNotFound", listed=True).code is Code.REPOSITORY_NOT_FOUND


# --- clocks


@pytest.mark.parametrize("code", ["AuthenticationFailed", "AuthorizationFailure", None])
@pytest.mark.parametrize(
    ("starts", "ends", "ahead", "says"),
    [
        (-7200, -600, 0, "the SAS expired 10 min ago; the clocks agree"),
        (-7200, 300, 900, "the SAS expired 10 min ago; this node's clock is 15 min behind the server's"),
        (1200, 7200, 0, "the SAS is not valid for another 20 min; the clocks agree"),
        (-60, 7200, -900, "the SAS is not valid for another 14 min; this node's clock is 15 min ahead of the server's"),
        (-7 * 86400, -5 * 86400, 10, "the SAS expired 5 days ago; the clocks agree"),
        (None, -90, 0, "the SAS expired 90 s ago"),
    ],
)
def test_a_sas_out_of_its_time_is_told_with_the_clocks(code, starts, ends, ahead, says):
    error = refused(403, code, Credential(Kind.SAS, None if starts is None else NOW + starts, NOW + ends), ahead=ahead)
    assert error.code is Code.BAD_TOKEN
    assert says in str(error)
    assert "SAS" in error.hint


@pytest.mark.parametrize("ahead", [1200, -1200])
def test_a_shared_key_is_refused_for_the_clock(ahead):
    error = refused(403, "AuthenticationFailed", KEY, ahead=ahead)
    assert f"clock is 20 min {'behind' if ahead > 0 else 'ahead of'} the server's" in str(error)
    assert "15 minutes" in error.hint


def test_without_a_date_validity_is_judged_by_our_own_clock():
    error = refusal(403, "AuthenticationFailed", {}, WHAT, now=NOW, credential=Credential(Kind.SAS, None, NOW - 300))
    assert "expired 5 min ago; the server does not tell its time" in str(error)


# --- credentials


@pytest.mark.parametrize(
    ("query", "authorization", "kind"),
    [
        ("", None, Kind.NONE),
        ("snapshot=2026-01-01T00%3A00%3A00Z", None, Kind.NONE),
        ("", "Bearer x", Kind.TOKEN),
        ("", "bearer x", Kind.TOKEN),
        ("versionid=1", "SharedKey acme:x", Kind.KEY),
        ("?sv=2025-01-01&sig=x", None, Kind.SAS),
        ("sv=2025-01-01&sig=x", None, Kind.SAS),
    ],
)
def test_kinds_of_credentials(query, authorization, kind):
    assert Credential.of(query, authorization).kind is kind


MOMENTS = st.integers(946_684_800, 4_102_444_800).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@given(MOMENTS, st.sampled_from(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%MZ", "%Y-%m-%d"]), st.booleans())
def test_every_form_of_time_that_a_sas_may_have(moment, form, escaped):
    text = moment.strftime(form)
    exact = datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
    query = f"st={quote(text) if escaped else text}&se={text}&sig=x"
    assert Credential.of(query) == Credential(Kind.SAS, exact, exact)


def test_a_delegation_key_has_times_of_its_own():
    times = {"st": "2026-01-01", "skt": "2026-01-02", "se": "2026-01-09", "ske": "2026-01-08T12:00:00Z", "sig": "x"}
    found = Credential.of(urlencode(times))
    assert (found.starts, found.ends) == (datetime(2026, 1, 2, tzinfo=UTC).timestamp(), datetime(2026, 1, 8, 12, tzinfo=UTC).timestamp())


@given(st.text(), st.text())
def test_times_that_cannot_be_read_are_not_known(starts, ends):
    assert Credential.of(urlencode({"st": f"x{starts}", "se": f"x{ends}", "sig": "x"})) == POLICY


# --- whatever comes

HEADERS = st.dictionaries(st.sampled_from(["Date", "Retry-After", "x-ms-error-code", "x-ms-request-id", "RateLimit", "Location"]), st.text())
FIELDS = st.dictionaries(st.sampled_from(["st", "se", "skt", "ske", "sp", "sip", "si"]), st.one_of(st.text(), st.datetimes().map(str)))


CODES = st.none() | st.text() | st.just(SECRET) | st.sampled_from([code.value for code in StorageErrorCode])


@given(st.integers(300, 599), CODES, HEADERS, FIELDS, st.booleans(), st.booleans())
def test_any_answer_is_an_error_with_a_hint_and_without_a_secret(status, code, headers, fields, signed, listed):
    query = urlencode(fields | ({"sig": SECRET, "skoid": SECRET} if signed else {}))
    error = refusal(status, code, headers, WHAT, now=NOW, credential=Credential.of(query, f"Bearer {SECRET}"), listed=listed)
    assert isinstance(error, SourceError)
    assert error.hint
    assert error.retryable or error.code not in (Code.SOURCE_BUSY, Code.SOURCE_CHANGED)
    assert len(str(error)) < len(WHAT) + 300
    assert SECRET not in f"{error} {error.hint} {error.facts}"
    assert not any(field and field in str(error).removeprefix(WHAT) for field in fields.values() if len(field) > 12)


@pytest.mark.parametrize(
    ("headers", "azure"),
    [({"X-Ms-Request-Id": "1"}, True), ({"x-ms-error-code": "BlobNotFound"}, True), ({"Server": "nginx", "Date": "x"}, False), ({}, False)],
)
def test_who_answers(headers, azure):
    assert recognised(headers) is azure
