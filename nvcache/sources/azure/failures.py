"""What the SDK raises, as `SourceError`: answers by the table of `azure_answers`, the rest by `CODES`. It quotes no URL, header or library's text."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import requests
from azure.core.exceptions import AzureError

from nvcache.errors import Code, SourceError
from nvcache.sources.azure.place import Anonymous, Bearer, Grant, Key, Sas
from nvcache.sources.azure_answers import NOTHING, Credential, Kind, refusal
from nvcache.sources.http import tls_hint

CODES: dict[str, Code] = {
    "ServiceRequestError": Code.SOURCE_UNREACHABLE,
    "ServiceResponseError": Code.SOURCE_UNREACHABLE,
    "ServiceResponseTimeoutError": Code.SOURCE_STALLED,
    "IncompleteReadError": Code.SOURCE_FAILED,
    "AzureError": Code.SOURCE_PROTOCOL,
}
"""What is raised without an answer to judge by: by the name of the exception's class or of its nearest base."""

_OPEN = "give a credential for this account: an identity, a SAS or a key; if it is open to all, its network rules may refuse this node's address"


@dataclass(frozen=True, slots=True)
class Attempt:
    """What was tried (it completes "cannot …"), at which origin, by which right; `listed`: it is about a blob that a listing had."""

    doing: str
    origin: str
    grant: Grant
    listed: bool = False

    def explain(self, error: AzureError) -> SourceError:
        """The SDK's error as ours."""
        response = getattr(error, "response", None)
        if response is None:
            return self._unanswered(error)
        if response.status_code < 400:
            return self.no_service()
        code = response.headers.get("x-ms-error-code") or getattr(error, "error_code", None)
        named = str(getattr(code, "value", code)) if code else None
        found = refusal(
            response.status_code,
            named,
            response.headers,
            f"cannot {self.doing}",
            now=time.time(),
            credential=described(self.grant),
            listed=self.listed,
        )
        if isinstance(self.grant, Anonymous) and self.grant.tried and found.code is Code.SOURCE_FORBIDDEN:
            said = f"{response.status_code} {named or ''}".strip()
            return self._error(found.code, f"no credential: {self.grant.tried}; anonymous: refused ({said})", hint=_OPEN, retryable=False)
        if response.status_code not in (401, 403):
            return found
        text = f"{found}, {used(self.grant)}"
        return SourceError(found.code, text, hint=found.hint, retryable=found.retryable, retry_after_s=found.retry_after_s)

    def no_service(self) -> SourceError:
        """Somebody else answers."""
        hint = "check the address; a proxy or a captive portal may answer in its place"
        return self._error(Code.SOURCE_PROTOCOL, f"{self.origin} does not answer as Blob Storage does", hint=hint, retryable=False)

    def _unanswered(self, error: AzureError) -> SourceError:
        code = next(CODES[base.__name__] for base in type(error).__mro__ if base.__name__ in CODES)
        for cause in _causes(error):
            match cause:
                case requests.exceptions.ProxyError():
                    return self._error(Code.SOURCE_UNREACHABLE, f"the proxy to {self.origin} does not let us through, or cannot be reached")
                case ssl.SSLCertVerificationError():
                    return self._error(Code.SOURCE_TLS, f"the certificate of {self.origin} cannot be trusted: {cause.verify_message}")
                case ssl.SSLError():
                    return self._error(Code.SOURCE_TLS, f"{self.origin} does not speak TLS as it should: {cause.reason}", hint=tls_hint(cause))
                case socket.gaierror():
                    why = f"{self.origin} has no address: there is no such account, or DNS fails here ({cause.strerror})"
                    return self._error(Code.SOURCE_UNREACHABLE, why)
                case OSError() if cause.strerror:
                    return self._error(code, f"{self.origin}: {cause.strerror}")
        why = {
            Code.SOURCE_STALLED: f"{self.origin} stopped answering",
            Code.SOURCE_UNREACHABLE: f"no connection to {self.origin}, or it broke",
            Code.SOURCE_FAILED: f"{self.origin} broke off its answer",
        }.get(code, f"{self.origin}: {type(error).__name__}")
        return self._error(code, why)

    def _error(self, code: Code, why: str, *, hint: str | None = None, retryable: bool | None = None) -> SourceError:
        return SourceError(code, f"cannot {self.doing}: {why}", hint=hint, retryable=retryable)


def described(grant: Grant) -> Credential:
    """What the table of answers needs to know of it."""
    match grant:
        case Key():
            return Credential(Kind.KEY)
        case Sas():
            return Credential.of(grant.text)
        case Bearer():
            return Credential(Kind.TOKEN)
        case Anonymous():
            return NOTHING


def used(grant: Grant) -> str:
    """It in words, with where it comes from."""
    match grant:
        case Key():
            return f"signed with the account key from {grant.source}"
        case Sas():
            return f"with the SAS from {grant.source}"
        case Bearer():
            return "with the node's identity"
        case Anonymous():
            return "anonymously"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What led to `error`; the SDK and urllib3 keep it in attributes and arguments as well."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        cause = waiting.pop()
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [*cause.args, cause.__context__, cause.__cause__, getattr(cause, "inner_exception", None)]
