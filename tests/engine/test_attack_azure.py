"""Blobs whose server, publisher or neighbours mean harm, and what an operator's secrets are worth then. Each of these broke something once."""

from __future__ import annotations

import hashlib
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from azure.core.credentials import AccessToken

from nvcache.core.published import MANIFEST, SUMS, Published, parse_sums
from nvcache.core.ref import parse_ref
from nvcache.core.states import ModelState
from nvcache.engine import persist
from nvcache.engine.status import JobStatus
from nvcache.errors import Code, RequestError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.identity import Identity, NoTokenError
from nvcache.sources.azure.place import Place, secret_for, trusted
from nvcache.sources.http import Transport
from tests.engine.conftest import Bed, end_of, ready, run, until, weights, wish
from tests.support.serving import LoopbackServer

ONE, TWO = weights(1, 9_000_000), weights(2, 9_000_000)
SENT = {"x-ms-request-id": "1"}
ROW = (
    "<Blob><Name>{name}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified><Etag>{etag}</Etag>"
    "<Content-Length>{size}</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
)


Say = Callable[["_Handler", str, dict[str, list[str]]], bool]


@dataclass
class Service(LoopbackServer):
    """A blob service that says what it is told to: one container with blobs (name → ETag and content), and `answer` to say something else.

    `honest` serves conditions as it should; without it a range is served whatever If-Match says, and no ETag is sent.
    """

    blobs: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    honest: bool = True
    instead: Say = lambda *_: False
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler, None)

    __hash__ = object.__hash__

    @property
    def url(self) -> str:
        """The model's reference."""
        return f"http://127.0.0.1:{self.server_port}/acme/models/m"

    @property
    def given(self) -> dict[str, Any]:
        """Settings to reach it with."""
        return {"az_credential": "anonymous"}

    def put(self, name: str, content: bytes) -> None:
        """Put or overwrite a blob of the model."""
        self.blobs[f"m/{name}"] = (f"0x{len(self.asked):04X}{hashlib.sha256(content).hexdigest()[:12]}", content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_GET(self) -> None:
        """A listing, or a range of a blob."""
        url, service = urlsplit(self.path), self.server
        fields = parse_qs(url.query)
        service.asked.append((self.path, dict(self.headers.items())))
        if service.instead(self, unquote(url.path), fields):
            return None
        if fields.get("comp") == ["list"]:
            start = fields.get("prefix", [""])[0]
            rows = [
                ROW.format(name=name, etag=tag, size=len(content)) for name, (tag, content) in sorted(service.blobs.items()) if name.startswith(start)
            ]
            body = f'<?xml version="1.0"?><EnumerationResults><Blobs>{"".join(rows)}</Blobs><NextMarker /></EnumerationResults>'
            return self.say(200, {"Content-Type": "application/xml"}, body.encode())
        tag, content = service.blobs[unquote(url.path).removeprefix("/acme/models/")]
        match = self.headers.get("If-Match", "").strip('"')
        if service.honest and match and match != tag:
            return self.say(412, {"x-ms-error-code": "ConditionNotMet"}, b"")
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("x-ms-range") or self.headers.get("Range") or "bytes=0-")
        assert span is not None
        start, stop = int(span[1]), min(len(content), int(span[2] or len(content)) + 1)
        etag = {"ETag": f'"{tag}"'} if service.honest else {}
        more = {
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "x-ms-blob-type": "BlockBlob",
            "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}",
        }
        return self.say(206, etag | more, content[start:stop])

    def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send an answer."""
        self.send_response_only(status)
        for name, value in (SENT | headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are recorded, not printed."""


@pytest.fixture
def service() -> Iterator[Service]:
    """One that serves."""
    made = Service()
    made.start("blob-service")
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize(
    "url",
    [
        r"https://ours.evil.example\.blob.core.windows.net/models/m",  # urllib3 ends the host at the backslash, urllib does not
        "https://ours.evil.example%5C.blob.core.windows.net/models/m",
        "https://ours.evil.example%2F.blob.core.windows.net/models/m",
        "https://ours.evil.example\uff3c.blob.core.windows.net/models/m",
        "https://ours.evil.example .blob.core.windows.net/models/m",
        "https://ours.evil.example;x.blob.core.windows.net/models/m",
    ],
)
def test_a_host_that_libraries_read_differently_is_none(url: str) -> None:
    """Or the token would go to another host than the one that was judged."""
    with pytest.raises(RequestError, match="no host name"):
        parse_ref(url)
    place = Place(url.removesuffix("/models/m"), "ours", "models", "m/")
    assert not trusted(place, Access())
    assert secret_for(place, Access(account="ours", sas="sv=1&sig=x", key="a2V5"))[0] is None
    assert not trusted(Place("https://ours.blob.core.windows.net:8443/ours", "ours", "models", ""), Access())
    assert trusted(Place("https://ours.blob.core.windows.net", "ours", "models", ""), Access())


def test_ranges_without_an_etag_are_not_believed(bed: Bed, service: Service) -> None:
    """A service that ignores If-Match and names no version may send the first half of one blob and the second of another."""
    service.put("model.safetensors", ONE)
    service.honest = False
    ranges: list[str] = []

    def swap(_: _Handler, path: str, fields: dict[str, list[str]]) -> bool:
        ranges.extend([path] if not fields else [])
        if len(ranges) == 2:
            service.blobs["m/model.safetensors"] = (service.blobs["m/model.safetensors"][0], TWO)
        return False

    service.instead = swap

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(service.url)))
            assert all(content in (ONE, TWO) for content in bed.shown().values())
            assert ended.error is not None
            assert ended.error.code is Code.SOURCE_PROTOCOL

    run(test())


def test_a_commit_is_not_shown_twice(bed: Bed, service: Service) -> None:
    """A manifest that names the 40 digits under which an earlier revision of the same prefix is shown does not take its place."""
    service.put("model.safetensors", ONE)
    service.put("config.json", b"{}")

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            first = await ready(engine, service.url, alias="acme/large")
            files = {"model.safetensors": TWO, "config.json": b"{}"}
            for name, content in files.items():
                service.put(name, content)
            described = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
            service.put(MANIFEST, Published("hf://acme/large", first.revision[:40], described).to_json())
            await ready(engine, service.url, alias="acme/large")
            snapshots = bed.store / "hub/models--acme--large/snapshots"
            assert (snapshots / first.revision[:40] / "model.safetensors").read_bytes() == ONE
            assert len(list(snapshots.iterdir())) == 2

    run(test())


def test_an_old_revision_without_digests_does_not_refuse_the_new_one(bed: Bed, service: Service) -> None:
    """Digests were published meanwhile: whoever requires them gets the new revision, not an error about the old one."""
    service.put("model.safetensors", ONE)

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            assert (await ready(engine, service.url)).unproven == 1
            service.put(SUMS, f"{hashlib.sha256(ONE).hexdigest()}  model.safetensors\n".encode())
            model = await ready(engine, service.url, require_digest=True)
            assert (model.state, model.unproven) == (ModelState.READY, 0)

    run(test())


def test_a_plan_of_an_earlier_run_is_held_to_the_settings_of_this_one(bed: Bed, service: Service) -> None:
    """Digests are required since: what the plan has no digests for is not made ready."""
    service.put("model.safetensors", ONE)
    stopped, reached = threading.Event(), threading.Event()

    def hold(_: _Handler, __: str, fields: dict[str, list[str]]) -> bool:
        if not fields and not stopped.is_set():
            reached.set()
            stopped.wait(30)
        return False

    service.instead = hold

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            await engine.ensure(wish(service.url))
            await until(reached.is_set, bool)
        stopped.set()
        async with bed.engine(require_digest=True, **service.given) as engine:
            jobs = await until(engine.jobs, lambda jobs: any(job.state.ended for job in jobs))
            assert [job.error.code for job in jobs if job.error] == [Code.NO_DIGEST]
            assert bed.shown() == {}
        async with bed.engine(**service.given) as engine:
            assert engine.jobs() == []

    run(test())


def test_a_pinned_revision_that_was_overwritten_is_not_tried_for_ever(bed: Bed, service: Service) -> None:
    """Its blobs do not come back: nothing of it is left to be resumed, restart after restart."""
    service.put("model.safetensors", ONE)

    def overwrite(_: _Handler, __: str, fields: dict[str, list[str]]) -> bool:
        if not fields:
            service.put("model.safetensors", TWO)
        return False

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            model = await ready(engine, service.url)
            await engine.remove(model.entry)
            service.instead = overwrite
            ended = await end_of(engine, await engine.ensure(wish(f"{service.url}@{model.revision}")))
            assert ended.error is not None
            assert ended.error.code is Code.SOURCE_CHANGED
        assert not list((bed.store / "ingest/plans").iterdir())

    run(test())


def test_an_hour_is_the_most_that_a_source_may_ask_for(bed: Bed, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A declared model is not given up for a Retry-After of thirty years."""
    monkeypatch.setattr(persist, "RETRY_FIRST", 0.05)
    monkeypatch.setattr(persist, "LONGEST_ASKED", 0.1)
    service.put("model.safetensors", ONE)

    def busy(handler: _Handler, _: str, fields: dict[str, list[str]]) -> bool:
        if len(service.asked) == 1:
            handler.say(503, {"Retry-After": "999999999"}, b"")
        return len(service.asked) == 1

    service.instead = busy

    async def test() -> None:
        async with bed.engine(models=[{"ref": service.url}], **service.given) as engine:
            await until(engine.models, lambda models: any(model.state is ModelState.READY for model in models))

    run(test())


LONG = b"y" * 100_000
FILE = b'{"path": "%s", "size": %s, "sha256": "%s"}'
COPY = b'{"nvcache_manifest": 1, "model": "hf://a/b", "commit": null, "files": [%s]}'


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"nvcache_manifest": "unfinished", "model": "x\\n%s"}' % LONG,
        COPY % (FILE % (LONG, b"1", b"0" * 64)),
        b"[" * 100_000,
        b"\xff\xfe",
        COPY % (FILE % (b"a", b"9" * 5000, b"0")),
    ],
)
def test_a_manifest_does_not_fill_the_log(bed: Bed, service: Service, manifest: bytes) -> None:
    """Whatever stands in it, the error is one short line."""
    service.put("model.safetensors", ONE)
    service.put(MANIFEST, manifest)

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(service.url)))
            assert ended.error is not None
            assert ended.error.code is not Code.INTERNAL
            assert len(ended.error.message) < 1000
            assert "\n" not in ended.error.message

    run(test())


def test_sums_that_contradict_themselves_are_refused() -> None:
    """One name, two digests: neither is believed. The same line twice says nothing new."""
    one, two = f"{'1' * 64}  a\n", f"{'2' * 64}  ./a\n"
    assert len(parse_sums((one + one).encode())) == 1
    with pytest.raises(ValueError, match="again"):
        parse_sums((one + two).encode())


@pytest.mark.parametrize(
    "row",
    [
        "<Blob></Blob>",
        "<Blob><Name></Name></Blob>",
        "<Blob><Name>m/model.safetensors</Name></Blob>",
        "<Blob><Name>m/model.safetensors</Name><Properties><Etag>x</Etag></Properties></Blob>",
        ROW.format(name="m/model.safetensors", etag="x&#10;Evil: y", size=10),
        ROW.format(name="m/model.safetensors", etag="x\u20ac", size=10),
        ROW.format(name="m/model.safetensors", etag="x", size=-1),
        ROW.format(name="m/model.safetensors", etag="x", size="9" * 30),
        ROW.format(name="m/model.safetensors", etag="x", size="nan"),
        ROW.format(name="elsewhere.safetensors", etag="x", size=10),
        ROW.format(name="m/../../model.safetensors", etag="x", size=10),
        ROW.format(name="m/%00.safetensors", etag="x", size=1).replace("<Name>", '<Name Encoded="true">'),
    ],
)
def test_a_listing_that_is_none_is_no_defect_of_ours(bed: Bed, service: Service, row: str) -> None:
    """It is refused as what it is, before or when its bytes are asked for."""

    def listing(handler: _Handler, _: str, fields: dict[str, list[str]]) -> bool:
        if fields.get("comp") == ["list"]:
            body = f'<?xml version="1.0"?><EnumerationResults><Blobs>{row}</Blobs><NextMarker /></EnumerationResults>'
            handler.say(200, {"Content-Type": "application/xml"}, body.encode())
        else:
            handler.say(404, {"x-ms-error-code": "BlobNotFound"}, b"")
        return True

    service.instead = listing

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            job = await engine.ensure(wish(service.url, include=["*"]))
            assert isinstance(job, JobStatus)
            ended = await end_of(engine, job)
            assert ended.error is not None
            assert ended.error.code is not Code.INTERNAL, ended.error
            assert bed.shown() == {}

    run(test())


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (403, b"<Error><Code>AuthorizationFailure</Code><Message>" + b"a" * (40 * 2**20) + b"</Message></Error>", Code.SOURCE_FORBIDDEN),
        (500, b"<Error>" + b"<a>" * (5 * 2**20), Code.SOURCE_FAILED),
        (200, b"<EnumerationResults>" + b"<a>" * (5 * 2**20), Code.SOURCE_UNREACHABLE),
    ],
)
def test_an_answer_does_not_fill_the_memory(bed: Bed, service: Service, status: int, body: bytes, code: Code) -> None:
    """The daemon parses it: 15 MB of tags took 2.4 GB and half a minute in which nobody else was answered."""

    def answer(handler: _Handler, _: str, __: dict[str, list[str]]) -> bool:
        with suppress(OSError):  # it is not read to its end
            handler.say(
                status, {"Content-Type": "application/xml", "x-ms-error-code": "AuthorizationFailure" if status == 403 else "InternalError"}, body
            )
        return True

    service.instead = answer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def test() -> None:
        async with bed.engine(**service.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(service.url)))
            assert ended.error is not None
            assert ended.error.code is code

    run(test())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10


class _Stuck:
    """An identity whose server does not come to an end."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def get_token(self, *_: str, **__: Any) -> AccessToken:
        """A token, in the end."""
        self.goes_on.wait(30)
        return AccessToken("t", 2**40)


def test_a_token_that_does_not_come_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits as long as a Retry-After says, with all who want a token, and the Hub's callers, behind it."""
    monkeypatch.setattr("nvcache.sources.azure.identity.ANSWER_S", 0.3)
    stuck = _Stuck()
    identity = Identity(Transport(), stuck)
    for most in (1.0, 0.2):
        began = time.monotonic()
        with pytest.raises(NoTokenError, match="no answer") as caught:
            identity.token()
        assert caught.value.failing
        assert time.monotonic() - began < most
    stuck.goes_on.set()
    for thread in threading.enumerate():
        if thread.name == "identity":
            thread.join(5)
    assert identity.token() == "t"
