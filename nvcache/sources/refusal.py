"""Which error a status is that brings no bytes: the source's own words first, then what HTTP says. Pure but for the clock; it asks nothing again."""

from __future__ import annotations

import time
from email.message import Message
from urllib.parse import urlsplit

from nvcache.core.retry import Verdict, asked_to_wait
from nvcache.errors import Code, SourceError
from nvcache.sources import answers, azure_answers
from nvcache.sources.answers import Asked
from nvcache.sources.azure_answers import NOTHING, Credential, Kind
from nvcache.sources.base import HttpRemote


def refusal(status: int, headers: Message, asked: Asked, remote: HttpRemote, verdict: Verdict, *, redirected: bool) -> SourceError:
    """The error for an answer of `status` about `remote`, which `verdict` is about; `redirected`: another origin than the remote's own gave it."""
    said = dict(headers.items())
    if status == 412 and remote.match:
        return asked.error(Code.SOURCE_CHANGED, "it was overwritten or deleted after it was listed (412)")
    credential = NOTHING if redirected else _credential(remote)
    if not redirected and (azure_answers.recognised(said) or credential.kind is Kind.SAS):
        code = headers.get("x-ms-error-code")
        return azure_answers.refusal(status, code, said, asked.what, now=time.time(), credential=credential, listed=remote.match)
    if verdict is Verdict.PERMANENT:
        return answers.permanent(status, headers, asked, authorised=credential.kind is not Kind.NONE)
    wait = asked_to_wait(said, time.time())
    error = asked.error(Code.SOURCE_BUSY if verdict is Verdict.THROTTLE or wait is not None else Code.SOURCE_FAILED, f"it answers {status}")
    error.retry_after_s = wait
    return error


def _credential(remote: HttpRemote) -> Credential:
    authorization = next((value for name, value in remote.headers if name.lower() == "authorization"), None)
    return Credential.of(urlsplit(remote.url).query, authorization)
