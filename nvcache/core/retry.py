"""When to try again: what an HTTP status means, how long a server asks to wait, and the back-off schedule. It sleeps nowhere and reads no clock."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from enum import StrEnum

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 30.0
_PARAMETER = re.compile(r";\s*([a-z]+)\s*=\s*(\d{1,9})(?!\d)")


class Verdict(StrEnum):
    """What to do about a status that is no success and no redirect."""

    TRANSIENT = "transient"  # try again after a back-off
    THROTTLE = "throttle"  # the origin asks to slow down: everybody waits
    RELOCATE = "relocate"  # a signed URL ran out: ask for a new one
    PERMANENT = "permanent"


def classify(status: int, *, redirected: bool) -> Verdict:
    """The verdict on `status`; `redirected`: it came from a URL that a redirect led to, which may be signed and expire (RFC 9110 §15.5)."""
    if status == 429:
        return Verdict.THROTTLE
    if status in (408, 425) or status >= 500:
        return Verdict.TRANSIENT
    return Verdict.RELOCATE if redirected and status in (401, 403, 410) else Verdict.PERMANENT


def asked_to_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a 429 or 503 with these `headers` asks for, or None if it does not say. Header names in any case.

    `now` (unix seconds) is what an HTTP date is compared with where the server does not tell its own time in `Date`.
    """
    found = {name.lower(): value for name, value in headers.items()}
    sent = http_date(found.get("date"))
    waits = [retry_after(found.get("retry-after"), now if sent is None else sent), rate_limit(found.get("ratelimit"), found.get("ratelimit-policy"))]
    return max((wait for wait in waits if wait is not None), default=None)


def retry_after(value: str | None, now: float) -> float | None:
    """`Retry-After` in seconds from `now`: a number or an HTTP date (RFC 9110 §10.2.3); a date that is past is 0, what cannot be read None."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    until = http_date(text)
    return None if until is None else max(0.0, until - now)


def rate_limit(limit: str | None, policy: str | None = None) -> float | None:
    """Seconds until an exhausted quota is renewed: `"resolvers";r=0;t=172` → 172. None while every quota has something left (`r` > 0).

    The Hub sends `RateLimit` with every answer (draft-ietf-httpapi-ratelimit-headers). Without `t` the window `w` of `RateLimit-Policy` counts.
    """
    waits = []
    for item in (limit or "").split(","):
        parameters = dict(_PARAMETER.findall(item))
        if parameters.get("r") and int(parameters["r"]) == 0:
            window = max((int(w) for name, w in _PARAMETER.findall(policy or "") if name == "w"), default=0)
            waits.append(float(parameters.get("t", window)))
    return max(waits, default=None)


def backoff(failures: int, fraction: float, most: float = LAST_BACKOFF_S) -> float:
    """Seconds to wait after `failures` (≥ 1) fruitless tries: 0.5 s doubling up to `most`; `fraction` (0…1, random) takes up to half of it off."""
    full = min(most, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 10))
    return full * (1 - fraction / 2)


def http_date(value: str | None) -> float | None:
    """The date of a header (RFC 9110 §5.6.7) as unix seconds, or None if it is none."""
    try:
        return parsedate_to_datetime(value or "").timestamp()
    except (ValueError, OverflowError):
        return None
