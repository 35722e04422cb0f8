"""One bounded JSON request to a Hub, and the one table from its refusals to `SourceError`. It knows no model and reads no environment.

huggingface_hub supplies the HTTP client (httpx under 1.x, httpx2 under 2.x) and reads the Hub's refusals (`hf_raise_for_status`). `HfApi` is not
used: its calls share one client per process (so proxies and CA could not be given), `list_repo_tree` takes no time limit, sleeps as long as a 429
asks and sends the token wherever a `Link` points, and every call looks for tokens and telemetry settings in the environment.
"""

from __future__ import annotations

import importlib
import random
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin

from huggingface_hub import errors, is_offline_mode
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # public, but re-exported without `as`

from nvcache.core.retry import Verdict, asked_to_wait, backoff, classify
from nvcache.errors import Code, SourceError
from nvcache.logs import mask
from nvcache.sources.http import Target, Transport, UnreadableCaError, proxy_for, tls_context

http: Any = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # httpx or httpx2, whichever the library speaks

SILENCE_S = 10.0  # longest wait for a connection or for the next bytes of an answer; a whole answer may take three times as long
PATIENCE_S = 8.0  # waiting between tries that one call does itself; longer asks are the caller's to wait out
TRIES = 3
BODY_LIMIT = 64 * 2**20
REDIRECTS = 5

CODES: dict[str, Code] = {
    "OfflineModeIsEnabled": Code.SOURCE_UNREACHABLE,
    "GatedRepoError": Code.GATED,
    "DisabledRepoError": Code.SOURCE_FORBIDDEN,
    "RepositoryNotFoundError": Code.REPOSITORY_NOT_FOUND,
    "RevisionNotFoundError": Code.REVISION_NOT_FOUND,
    "RemoteEntryNotFoundError": Code.FILE_NOT_FOUND,
    "BadRequestError": Code.SOURCE_PROTOCOL,
    "HfHubHTTPError": Code.SOURCE_FAILED,  # `_by_status` knows better
    # what the HTTP client raises, without an answer to judge by
    "ConnectTimeout": Code.SOURCE_UNREACHABLE,
    "ProxyError": Code.SOURCE_UNREACHABLE,
    "NetworkError": Code.SOURCE_UNREACHABLE,
    "TimeoutException": Code.SOURCE_STALLED,
    "RemoteProtocolError": Code.SOURCE_FAILED,
    "HTTPError": Code.SOURCE_PROTOCOL,
    "InvalidURL": Code.SOURCE_PROTOCOL,
}
"""By the name of the exception's class or of its nearest base, because the classes differ between versions of the library."""

_STATUS = {401: Code.BAD_TOKEN, 403: Code.SOURCE_FORBIDDEN, 407: Code.SOURCE_UNREACHABLE, 451: Code.SOURCE_FORBIDDEN}


@dataclass(frozen=True, slots=True)
class Answer:
    """The JSON of one answer, and the URL of the next page if there is one."""

    content: Any
    next_url: str | None


class HubClient:
    """GETs JSON for one call of a source. A context manager, for one thread; connections live as long as it does.

    `token` goes to `endpoint`'s own scheme, host and port only.
    """

    def __init__(self, endpoint: str, token: str | None, transport: Transport) -> None:
        self._origin = Target.parse(endpoint).origin
        self._token = token
        self._transport = transport
        self._silence = min(SILENCE_S, transport.stall_timeout)
        self._clients: dict[str | None, Any] = {}  # by proxy
        self._stack = ExitStack()
        self._waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def get(self, url: str, doing: str) -> Answer:
        """The answer to GET `url`. `doing` completes "cannot …" in errors. Raises `SourceError`, after a few tries where trying again may help."""
        for failures in range(1, TRIES + 1):
            try:
                return self._once(url, doing)
            except SourceError as error:
                pause = error.retry_after_s or backoff(failures, random.random())  # noqa: S311 - jitter
                if not error.retryable or error.code is Code.SOURCE_PROTOCOL or failures == TRIES or self._waited + pause > PATIENCE_S:
                    raise
                self._waited += pause
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _once(self, url: str, doing: str) -> Answer:
        try:
            response = self._follow(url, doing)
            hf_raise_for_status(response)
        except (http.HTTPError, http.InvalidURL, errors.OfflineModeIsEnabled) as error:
            raise self._explain(error, doing) from None  # a library's text may quote headers
        try:
            return Answer(response.json(), _next_page(response))
        except ValueError:
            kind = response.headers.get("content-type", "")[:40]
            raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {self._origin} answers with {kind or 'something'} instead of JSON") from None

    def _follow(self, url: str, doing: str) -> Any:
        """The first answer that is no redirect. The token stays behind when the origin changes, and nothing leads from https to http."""
        for _ in range(REDIRECTS + 1):
            response = self._fetch(url, doing)
            if not response.has_redirect_location:
                return response
            target = urljoin(url, response.headers["location"])
            if not target.startswith("https://" if url.startswith("https://") else ("http://", "https://")):
                raise SourceError(
                    Code.SOURCE_PROTOCOL, f"cannot {doing}: {self._origin} redirects to {target.partition(':')[0][:20]}", retryable=False
                )
            url = target
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {self._origin} redirects more than {REDIRECTS} times")

    def _fetch(self, url: str, doing: str) -> Any:
        """One request and its whole answer, bounded in bytes and time."""
        if is_offline_mode():
            raise errors.OfflineModeIsEnabled
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": self._transport.user_agent}
        target = _target(url, doing)
        if self._token and target.origin == self._origin:
            headers["authorization"] = f"Bearer {self._token}"
        deadline = time.monotonic() + 3 * self._silence
        body = bytearray()
        with self._client(target, doing).stream("GET", url, headers=headers) as answer:
            for piece in answer.iter_raw():
                body += piece
                if time.monotonic() > deadline:
                    raise http.ReadTimeout("no whole answer in time")
                if len(body) > BODY_LIMIT:
                    raise http.DecodingError(f"the answer is longer than {BODY_LIMIT >> 20} MiB")
            return http.Response(answer.status_code, headers=answer.headers, content=bytes(body), request=answer.request)

    def _client(self, target: Target, doing: str) -> Any:
        """The client for `target`, made at its first use: through the proxy that is meant for it, trusting the given CA."""
        try:
            proxy = proxy_for(target, self._transport.proxies)
            trusted = tls_context(self._transport.ca_file)
        except ValueError as error:
            raise SourceError(Code.SOURCE_UNREACHABLE, f"cannot {doing}: {error}", retryable=False) from None
        except UnreadableCaError as error:
            raise SourceError(Code.SOURCE_TLS, f"cannot {doing}: the certificates in {self._transport.ca_file} cannot be read") from error
        if proxy not in self._clients:
            limits = http.Timeout(self._silence, connect=min(SILENCE_S, self._transport.connect_timeout))
            client = http.Client(verify=trusted, proxy=proxy, trust_env=False, timeout=limits)
            self._clients[proxy] = self._stack.enter_context(client)
        return self._clients[proxy]

    def _explain(self, error: Exception, doing: str) -> SourceError:
        """The library's exception as ours. It quotes the server's own message, never a URL or a header of the request."""
        code, retryable, pause = code_of(type(error)), None, None
        response = getattr(error, "response", None)
        said = ""
        if response is None:
            code, why = self._without_answer(error, code)
            retryable = False if isinstance(error, errors.OfflineModeIsEnabled) else None
        else:
            said = _said(response)
            code, why, retryable, pause = self._by_status(response, code, said)
        news = said and said not in why and code is not Code.REPOSITORY_NOT_FOUND  # "Repository not found" says less than we do
        text = f"cannot {doing}: {why}" + (f" ({said})" if news else "")
        return SourceError(code, text, retryable=retryable, retry_after_s=pause)

    def _without_answer(self, error: Exception, code: Code) -> tuple[Code, str]:
        for cause in _chain(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Code.SOURCE_TLS, f"the certificate of {self._origin} cannot be trusted: {cause.verify_message}"
            if isinstance(cause, ssl.SSLError):
                return Code.SOURCE_TLS, f"{self._origin} does not speak TLS as it should: {cause.reason}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return code, "HF_HUB_OFFLINE is set in the daemon's environment"
        if isinstance(error, http.ConnectTimeout | http.PoolTimeout):
            return code, f"no connection to {self._origin} in time"
        if isinstance(error, http.TimeoutException):
            return code, f"{self._origin} stopped answering"
        if isinstance(error, http.LocalProtocolError):
            return code, "the request cannot be expressed in HTTP"
        return code, mask(f"{self._origin}: {error}")

    def _by_status(self, response: Any, code: Code, said: str) -> tuple[Code, str, bool | None, float | None]:
        """Code, reason, whether to try again and after how many seconds; the Hub answers 401 to much that is no matter of credentials."""
        status = response.status_code
        pause = asked_to_wait(response.headers, time.time())
        sent = "authorization" in response.request.headers
        match classify(status, redirected=False):
            case Verdict.THROTTLE:
                return Code.SOURCE_BUSY, f"{self._origin} asks to slow down (429)", True, pause
            case Verdict.TRANSIENT if status == 511:
                return Code.SOURCE_PROTOCOL, "the network wants a login first (511)", False, None
            case Verdict.TRANSIENT:
                return (Code.SOURCE_BUSY if pause else Code.SOURCE_FAILED), f"{self._origin} answers {status}", True, pause
            case _:
                pass
        if status == 401 and sent and "credentials" in said.lower():
            return Code.BAD_TOKEN, "the Hub does not know the token", None, None
        if code is Code.GATED:
            return code, _gated(status, sent=sent), None, None
        if code is Code.REPOSITORY_NOT_FOUND or (status == 401 and not sent):
            hidden = "it is private and the token's account may not see it" if sent else "it is private and no token is set"
            return Code.REPOSITORY_NOT_FOUND, f"no such repository at {self._origin}, or {hidden}", None, None
        if status == 404 and code is Code.SOURCE_FAILED:
            return Code.REPOSITORY_NOT_FOUND, f"{self._origin} has no such repository or revision (404)", None, None
        if code is Code.SOURCE_FAILED:
            code = _STATUS.get(status, code)
        return code, f"{self._origin} answers {status}", False, None


def code_of(kind: type[BaseException]) -> Code:
    """The code of an exception class, by the nearest of its bases that the table names. Raises KeyError for one it does not."""
    return next(CODES[base.__name__] for base in kind.__mro__ if base.__name__ in CODES)


def _target(url: str, doing: str) -> Target:
    try:
        return Target.parse(url)
    except ValueError:
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: it leads to what is no http(s) URL", retryable=False) from None


def _gated(status: int, *, sent: bool) -> str:
    if not sent:
        return "the model is gated, and no token is set"
    if status == 403:
        return "the model is gated, and the token's account is not on the list of those who may have it"
    return "the model is gated, and the token does not open it"


def _said(response: Any) -> str:
    """The server's own reason, from its header or its JSON: one short printable line."""
    text = response.headers.get("x-error-message", "")
    if not text and "json" in response.headers.get("content-type", ""):
        found = re.search(rb'"error"\s*:\s*"([^"\\]{1,200})', response.content)
        text = found[1].decode("utf-8", "replace") if found else ""
    return mask("".join(char for char in text if char.isprintable())[:200]).strip().rstrip(".")


def _next_page(response: Any) -> str | None:
    """The URL of the next page (RFC 8288 `Link: <…>; rel="next"`), which may be relative."""
    link = response.links.get("next", {}).get("url")
    return urljoin(str(response.request.url), link) if link else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
