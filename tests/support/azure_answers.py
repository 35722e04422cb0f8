"""What Azure's Blob service answers when it refuses, in its own words, for a test server to answer. It serves nothing.

The form of the answers is that of Azure's REST reference ("Status and error codes").
"""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

from tests.support.faults import Fault, Kind

INSTEAD = (Kind.STATUS, Kind.THROTTLE, Kind.BUSY)
OTHER_MD5 = "1B2M2Y8AsgTpgAmY7PhCfg=="  # of nothing
UNAUTHENTICATED = "Server failed to authenticate the request."


def refusal(status: int, code: str, message: str = "as the test wishes", *, detail: str = "", skew_s: float = 0) -> dict[str, Any]:
    """The options of a fault of `Kind.STATUS` that is Azure's error `code`; its clock is `skew_s` seconds ahead of ours."""
    more = f"<AuthenticationErrorDetail>{detail}</AuthenticationErrorDetail>" if detail else ""
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{message}\nRequestId:test</Message>{more}</Error>'
    headers = {"Content-Type": "application/xml", "x-ms-error-code": code}
    if status == 401:
        headers["WWW-Authenticate"] = (
            "Bearer authorization_uri=https://login.microsoftonline.com/t/oauth2/authorize resource_id=https://storage.azure.com"
        )
    return {"status": status, "headers": headers, "body": body.encode(), "skew_s": skew_s}


def expired_sas() -> dict[str, Any]:
    """The answer to a SAS that has expired."""
    detail = "Signature not valid in the specified time frame: Start [x] - Expiry [y] - Current [z]"
    return refusal(403, "AuthenticationFailed", UNAUTHENTICATED, detail=detail)


def expired_token() -> dict[str, Any]:
    """The answer to a bearer token that has expired."""
    return refusal(401, "InvalidAuthenticationInfo", UNAUTHENTICATED, detail="Lifetime validation failed. The token is expired.")


def wrong_clock(skew_s: float) -> dict[str, Any]:
    """The answer to a shared key whose signed date is too far from the service's clock, which is `skew_s` seconds ahead of ours."""
    return refusal(403, "AuthenticationFailed", UNAUTHENTICATED, detail="The Date header in the request is incorrect.", skew_s=skew_s)


def instead(fault: Fault) -> dict[str, Any]:
    """The answer of a fault in `INSTEAD`."""
    if fault.kind is Kind.STATUS:
        return {"status": fault.status, "headers": fault.headers, "body": fault.body, "skew_s": fault.skew_s}
    if fault.kind is Kind.BUSY:
        options = refusal(503, "ServerBusy", "Egress is over the account limit.")
    else:
        options = refusal(429, "TooManyRequests", "The request rate is over the limit.")
    after = {"retry-after": f"{fault.seconds:.0f}", "date": formatdate(time.time() + fault.seconds, usegmt=True)}.get(fault.style)
    if after:
        options["headers"]["Retry-After"] = after
    return options
