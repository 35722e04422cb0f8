"""What a refusal by Azure Blob Storage means: one table from its error codes to `SourceError`, with what to do. Pure; it asks and retries nothing.

Both the ranged reader and the source that calls the SDK use it. Codes, statuses and causes are those of Microsoft's public REST reference of the
storage services: "Common REST API error codes", "Blob service error codes", "SAS error codes", "Authorize with Shared Key" (a request's date may be
15 minutes off) and "Create a service SAS" (`st`, `se`, `skt`, `ske`: ISO 8601 in UTC). Two are sent but not listed there:
PublicAccessNotPermitted and KeyBasedAuthenticationNotPermitted. The emulator Azurite says AuthorizationFailure of every SAS that it does not take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from urllib.parse import parse_qs

from nvcache.core.retry import Verdict, asked_to_wait, classify, http_date
from nvcache.errors import Code, SourceError

CLOCKS_AGREE_S = 60.0


class Kind(StrEnum):
    """What a request was authorised by."""

    TOKEN = "token"  # noqa: S105 - a word for messages
    KEY = "key"
    SAS = "SAS"
    NONE = "no credential"


@dataclass(frozen=True, slots=True)
class Credential:
    """What is known of a credential without holding it: its kind and, of a SAS that says so, from when to when it is valid (unix seconds)."""

    kind: Kind = Kind.NONE
    starts: float | None = None
    ends: float | None = None

    @classmethod
    def of(cls, query: str, authorization: str | None = None) -> Credential:
        """That of a request with this URL query (or SAS, with or without `?`) and Authorization header."""
        fields = parse_qs(query.removeprefix("?"))
        if "sig" in fields:  # of a user-delegation SAS, the key that signed it has times of its own
            return cls(Kind.SAS, max(_moments(fields, "st", "skt"), default=None), min(_moments(fields, "se", "ske"), default=None))
        if authorization is None:
            return cls()
        return cls(Kind.TOKEN if authorization.lower().startswith("bearer ") else Kind.KEY)


NOTHING = Credential()


@dataclass(frozen=True, slots=True)
class Meaning:
    """What one of Azure's error codes means, for a message and for docs."""

    code: Code
    why: str
    hint: str


_LEASED = Meaning(Code.SOURCE_FORBIDDEN, "somebody holds a lease on it", "wait for the lease to end, or break it: az storage blob lease break …")
_NO_LEASE = Meaning(Code.SOURCE_FORBIDDEN, "the lease it is asked under is none of its leases any more", "ask again without the lease")
MEANINGS = {
    "AuthorizationSourceIPMismatch": Meaning(
        Code.SOURCE_FORBIDDEN,
        "the SAS is not for this node's address",
        "make a SAS whose sip includes the address that the node's traffic leaves from",
    ),
    "AuthorizationProtocolMismatch": Meaning(
        Code.SOURCE_FORBIDDEN, "the SAS is for https only", "name the account by its https:// URL, or make a SAS whose spr includes http"
    ),
    "AuthorizationServiceMismatch": Meaning(
        Code.SOURCE_FORBIDDEN, "the account SAS is not for the Blob service", "make an account SAS whose ss includes b"
    ),
    "AuthorizationResourceTypeMismatch": Meaning(
        Code.SOURCE_FORBIDDEN,
        "the SAS is not for this type of resource",
        "make an account SAS whose srt includes c (to list) and o (to read), or one of the container: sr=c",
    ),
    "InsufficientAccountPermissions": Meaning(
        Code.SOURCE_FORBIDDEN, "the account does not allow this operation", "check the account's status and locks; it may be a read-only secondary"
    ),
    "KeyBasedAuthenticationNotPermitted": Meaning(
        Code.SOURCE_FORBIDDEN,
        "the account takes neither its key nor a SAS that the key signed",
        "use an identity, or a user-delegation SAS; or set allowSharedKeyAccess on the account",
    ),
    "PublicAccessNotPermitted": Meaning(
        Code.SOURCE_FORBIDDEN, "the account gives nothing to anonymous readers", "give a credential: an identity or a SAS"
    ),
    "AccountIsDisabled": Meaning(Code.SOURCE_FORBIDDEN, "the storage account is disabled", "enable it; its subscription may have ended"),
    "BlobArchived": Meaning(
        Code.ARCHIVED, "the blob is in the archive tier", "bring it back first (it takes hours): az storage blob set-tier --tier Hot …"
    ),
    "BlobBeingRehydrated": Meaning(
        Code.ARCHIVED, "the blob is on its way out of the archive tier", "wait, hours if need be: az storage blob show … names its archiveStatus"
    ),
    "BlobNotFound": Meaning(
        Code.FILE_NOT_FOUND, "there is no such blob, snapshot or version", "list the prefix: az storage blob list --include vs --prefix …"
    ),
    "ContainerNotFound": Meaning(Code.REPOSITORY_NOT_FOUND, "there is no such container", "check the account and the container after az://"),
    "ContainerBeingDeleted": Meaning(
        Code.REPOSITORY_NOT_FOUND,
        "the container is being deleted",
        "restore it, if soft delete is on; its name is free again after 30 s at the earliest",
    ),
    "ContainerDisabled": Meaning(Code.SOURCE_FORBIDDEN, "the container is disabled", "ask the administrator of the storage account"),
    "ResourceNotFound": Meaning(Code.REPOSITORY_NOT_FOUND, "there is no such account, container or blob", "check what follows az://"),
    "InvalidResourceName": Meaning(
        Code.REPOSITORY_NOT_FOUND,
        "the container's name is none that Azure has",
        "a container has 3 to 63 lower-case letters, digits and single hyphens",
    ),
    "InvalidQueryParameterValue": Meaning(
        Code.REVISION_NOT_FOUND, "it does not take the snapshot or version asked for", "list them: az storage blob list --include vs --prefix …"
    ),
    "InvalidRange": Meaning(Code.SOURCE_CHANGED, "the blob is shorter than it was when listed", "ask again: it is listed anew"),
    "ConditionNotMet": Meaning(Code.SOURCE_CHANGED, "the blob was overwritten or deleted after it was listed", "ask again: it is listed anew"),
    "BlobAlreadyExists": Meaning(Code.SOURCE_CHANGED, "somebody wrote it after it was listed", "ask again: it is listed anew"),
    "InvalidBlockList": Meaning(
        Code.SOURCE_CHANGED, "blocks that were sent for it are gone: somebody wrote it meanwhile", "ask again: it is listed anew"
    ),
    "InvalidBlobOrBlock": Meaning(
        Code.SOURCE_FORBIDDEN,
        "another tool's upload of it was begun and not finished",
        "let that upload finish, or delete what there is of the blob; Azure forgets such blocks after a week",
    ),
    "InvalidBlobType": Meaning(Code.SOURCE_FORBIDDEN, "it is a page or append blob", "delete it, or choose another prefix"),
    "BlobImmutableDueToPolicy": Meaning(
        Code.SOURCE_FORBIDDEN, "the container's policy forbids to change it", "choose another prefix, or wait until the policy's time is over"
    ),
    "Md5Mismatch": Meaning(Code.DIGEST_MISMATCH, "other bytes arrived than were sent", "it is sent again; look at the network, and at the memory"),
    "ServerBusy": Meaning(
        Code.SOURCE_BUSY,
        "the account is over its limit of requests or egress",
        "it is tried again; limit the bandwidth, or spread models over accounts",
    ),
    "OperationTimedOut": Meaning(Code.SOURCE_FAILED, "the operation took the service too long", "it is tried again; look at Azure's status page"),
    "InternalError": Meaning(Code.SOURCE_FAILED, "the service has an error", "it is tried again; look at Azure's status page"),
    "LeaseIdMissing": _LEASED,
    "LeaseIdMismatchWithBlobOperation": _LEASED,
    "LeaseNotPresentWithBlobOperation": _NO_LEASE,
    "LeaseLost": _NO_LEASE,
}
_DELETED = Meaning(Code.SOURCE_CHANGED, "the blob was deleted after it was listed", "ask again: it is listed anew")
_ANONYMOUS = Meaning(
    Code.SOURCE_FORBIDDEN, "there is no such container, or none for anonymous readers", "give a credential: an identity or a SAS; else check the name"
)
_NETWORK = Meaning(
    Code.SOURCE_FORBIDDEN,
    "most often the account's network rules refuse this node's address",
    "look at the networking of the storage account: allow the node's subnet or address, or use its private endpoint",
)
_PERMISSIONS = {
    Kind.SAS: Meaning(
        Code.SOURCE_FORBIDDEN,
        "the SAS does not allow this operation",
        "make one with the permissions r and l (r, l, a, c, w and d to write: sp=racwdl)",
    ),
    Kind.TOKEN: Meaning(
        Code.SOURCE_FORBIDDEN,
        "the identity has no data role that allows this",
        "assign it Storage Blob Data Reader (to write: Contributor) on the account or container; that takes some minutes. Owner is no data role",
    ),
}
_NO_ROLE = Meaning(Code.SOURCE_FORBIDDEN, "the credential does not allow this operation", "use an identity with the role Storage Blob Data Reader")
_RENEW = {
    Kind.SAS: "give a SAS that is valid now; its file or secret is read again at every try",
    Kind.KEY: "check the account's key or connection string, and the clock: Azure refuses a request dated more than 15 minutes off",
    Kind.TOKEN: "a fresh token is asked for at every try; check that the identity is of the account's tenant, and the clock",
}
_BY_STATUS = {
    401: Code.SOURCE_FORBIDDEN,
    403: Code.SOURCE_FORBIDDEN,
    404: Code.FILE_NOT_FOUND,
    410: Code.FILE_NOT_FOUND,
    429: Code.SOURCE_BUSY,
    503: Code.SOURCE_BUSY,
}


def recognised(headers: Mapping[str, str]) -> bool:
    """Whether an answer with these headers is Azure's own, and not that of a proxy or a gateway."""
    return not {"x-ms-error-code", "x-ms-request-id"}.isdisjoint(name.lower() for name in headers)


def refusal(
    status: int,
    code: str | None,
    headers: Mapping[str, str],
    what: str,
    *,
    now: float,
    credential: Credential = NOTHING,
    listed: bool = False,
) -> SourceError:
    """The error for an answer of `status` with Azure's error `code`, if it named one; `retryable` and `retry_after_s` are set.

    `what` begins the message: "cannot fetch x from y". `now` is this node's time in unix seconds. `listed`: it is about a blob that a listing had, so
    that its absence is a change. bad-token means that the same request may pass with a fresh credential.
    """
    named = code if code and re.fullmatch(r"[A-Za-z0-9]{1,60}", code) else ""
    sent = http_date({name.lower(): value for name, value in headers.items()}.get("date"))
    meaning = _meaning(status, named, credential, _Clocks(now, sent), listed)
    again = classify(status, redirected=False) is not Verdict.PERMANENT or meaning.code in (Code.SOURCE_CHANGED, Code.SOURCE_BUSY)
    said = f"{status} {named}".strip()
    error = SourceError(meaning.code, f"{what}: {meaning.why} ({said})", hint=meaning.hint or None, retryable=again)
    error.retry_after_s = asked_to_wait(headers, now)
    return error


@dataclass(frozen=True, slots=True)
class _Clocks:
    """This node's time and the one the server sent with its answer, if it did (unix seconds)."""

    ours: float
    theirs: float | None

    @property
    def judge(self) -> float:
        """The time that validity is judged by."""
        return self.ours if self.theirs is None else self.theirs

    def __str__(self) -> str:
        ahead = self.ours - self.judge
        if self.theirs is None:
            return "the server does not tell its time"
        if abs(ahead) < CLOCKS_AGREE_S:
            return "the clocks agree"
        return f"this node's clock is {_span(ahead)} {'ahead of' if ahead > 0 else 'behind'} the server's"


def _meaning(status: int, named: str, credential: Credential, clocks: _Clocks, listed: bool) -> Meaning:
    anonymous = credential.kind is Kind.NONE
    match named:
        case "NoAuthenticationInformation" | "ResourceNotFound" if anonymous:
            return _ANONYMOUS
        case "AuthenticationFailed" | "InvalidAuthenticationInfo" | "NoAuthenticationInformation":
            return _unproven(credential, clocks)
        case "AuthorizationFailure":
            return _unproven(credential, clocks) if _may_be_out_of_date(credential, clocks) else _NETWORK
        case "AuthorizationPermissionMismatch":
            return _PERMISSIONS.get(credential.kind, _NO_ROLE)
        case "BlobNotFound" if listed:
            return _DELETED
        case _ if named in MEANINGS:
            return MEANINGS[named]
    if (status == 401 and not anonymous) or (status == 403 and not named and credential.kind is Kind.SAS):
        return _unproven(credential, clocks)
    return Meaning(_BY_STATUS.get(status, Code.SOURCE_FAILED), "it fails" if status >= 500 else "it refuses", "")


def _may_be_out_of_date(credential: Credential, clocks: _Clocks) -> bool:
    """Whether a SAS is outside its time, or does not tell it: a stored access policy may."""
    return credential.kind is Kind.SAS and (credential.ends is None or _out_of_date(credential, clocks) is not None)


def _out_of_date(credential: Credential, clocks: _Clocks) -> str | None:
    if credential.ends is not None and clocks.judge >= credential.ends:
        return f"the SAS expired {_span(clocks.judge - credential.ends)} ago"
    if credential.starts is not None and clocks.judge < credential.starts:
        return f"the SAS is not valid for another {_span(credential.starts - clocks.judge)}"
    return None


def _unproven(credential: Credential, clocks: _Clocks) -> Meaning:
    """The credential itself is not taken: too old, too early, or wrong."""
    if credential.kind is Kind.NONE:
        return Meaning(Code.SOURCE_FORBIDDEN, "it wants to know who asks", _ANONYMOUS.hint)
    why = _out_of_date(credential, clocks)
    if why is None:
        cause = "not valid yet, out of date, or wrong" if credential.ends is None else "it is not out of date, so wrong, revoked or cut short"
        why = f"the {credential.kind} is refused: {cause}"
    return Meaning(Code.BAD_TOKEN, f"{why}; {clocks}", _RENEW[credential.kind])


def _moments(fields: Mapping[str, list[str]], *names: str) -> list[float]:
    """Those of the fields that hold a time, as unix seconds."""
    found = []
    for value in (value for name in names for value in fields.get(name, ())):
        with suppress(ValueError):
            moment = datetime.fromisoformat(value)
            found.append((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    return found


def _span(seconds: float) -> str:
    whole = abs(seconds)
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if whole >= 2 * size:
            return f"{whole / size:.0f} {unit}"
    return f"{whole:.0f} s"
