"""The Hub source against a Hub that refuses, pages, redirects, moves and dies."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, errors

from nvcache.core.plan import RemoteFile
from nvcache.core.ref import parse_ref
from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources import hubclient
from nvcache.sources.base import HttpRemote, XetRemote
from nvcache.sources.http import Transport
from nvcache.sources.huggingface import HuggingFace, xet_available
from tests.integration.test_ranges_control import Proxy
from tests.support.hub import HubServer, Kind, Repo
from tests.support.tls import make_tls

TOKEN = "hf_contractSecretNeverToBePrinted"
QUICK = Transport(connect_timeout=1.0, stall_timeout=0.5, deadline=5.0)
REF = parse_ref("acme/m")
FILES: dict[str, bytes | Path] = {"config.json": b"{}", "model.safetensors": b"w" * 1000, "sub/a b.txt": b"x"}

# What huggingface_hub raises only in parts of it that no GET of the Hub's model API reaches. A new class must be put here or into the table.
ELSEWHERE = {
    *("CacheNotFound", "CorruptedCacheException", "CachedRepoTreeNotFoundError", "LocalTokenNotFoundError", "OIDCError", "DeviceCodeError"),
    *("InferenceEndpointError", "InferenceEndpointTimeoutError", "SafetensorsParsingError", "NotASafetensorsRepoError", "HFValidationError"),
    *("HfUriError", "DryRunError", "FileMetadataError", "RevisionResolutionError", "EntryNotFoundError", "LocalEntryNotFoundError"),
    *("IncompleteSnapshotError", "DDUFError", "DDUFCorruptedFileError", "DDUFExportError", "DDUFInvalidEntryNameError", "StrictDataclassError"),
    *("StrictDataclassDefinitionError", "StrictDataclassFieldValidationError", "StrictDataclassClassValidationError", "XetDownloadError"),
    *("FileDuplicationError", "CLIError", "ConfirmationError", "CLIExtensionInstallError", "SandboxError", "SandboxCommandError"),
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub that knows one token and one public model."""
    with HubServer({"acme/m": Repo(FILES)}, token=TOKEN) as server:
        yield server


def source(url: str, token: str | None = TOKEN, transport: Transport = QUICK, **options: int) -> HuggingFace:
    """The source under test."""
    return HuggingFace(url, lambda: token, transport, **options)


def refused(call: Callable[[], object]) -> SourceError:
    """The error that `call` raises, proven to hold no secret."""
    with pytest.raises(SourceError) as caught:
        call()
    assert TOKEN not in f"{caught.value!r} {caught.value.hint} {caught.value.facts}"
    return caught.value


def spoil(hub: HubServer, glob: str, kind: Kind, **options: Any) -> None:
    """Make the Hub's API answer wrongly."""
    hub.faults.add(glob, kind, origin="hub", **options)


# --- listing


def test_thousands_of_files_come_in_pages(hub: HubServer) -> None:
    """Every page is asked for, at the pinned commit, and nothing twice."""
    names = {f"part/{i:05}.json": b"{}" for i in range(3500)}
    hub.repos["acme/m"].push(names)
    found = source(hub.url)
    files = found.list(found.resolve(REF))
    assert [file.path for file in files] == sorted(names)
    pages = hub.seen("/api/models/acme/m/tree/*")
    assert len(pages) == 4
    assert len({page.query for page in pages}) == 4


def test_a_revision_with_a_slash_is_one_segment(hub: HubServer) -> None:
    """refs/pr/1 is asked for percent-encoded."""
    commit = hub.repos["acme/m"].push({"config.json": b"[]"}, name="refs/pr/1")
    resolved = source(hub.url).resolve(REF.at("refs/pr/1"))
    assert (resolved.ref.revision, resolved.name) == (commit, "refs/pr/1")


def test_a_moved_branch_does_not_move_what_was_resolved(hub: HubServer) -> None:
    """Listing and bytes are asked for by commit."""
    found = source(hub.url)
    before = found.resolve(REF)
    hub.repos["acme/m"].push({"other.json": b"[]"})
    assert [file.path for file in found.list(before)] == sorted(FILES)
    assert found.resolve(REF).ref.revision != before.ref.revision
    remote = found.locate(before, found.list(before)[0])
    assert isinstance(remote, HttpRemote)
    assert f"/resolve/{before.ref.revision}/config.json" in remote.url


def test_a_commit_is_taken_at_its_word(hub: HubServer) -> None:
    """A full commit id needs no request, so a pinned model resolves while the Hub is away."""
    assert source(hub.url).resolve(REF.at("a" * 40)).ref.revision == "a" * 40
    assert not hub.requests


def test_locating_a_file_asks_nothing(hub: HubServer) -> None:
    """The resolve URL follows from the listing; the token goes into a header, re-read each time."""
    tokens = iter([TOKEN, TOKEN, "hf_rotated", None])
    found = HuggingFace(hub.url, lambda: next(tokens), QUICK)
    resolved = found.resolve(REF)
    file = found.list(resolved)[2]
    asked = len(hub.requests)
    rotated, anonymous = found.locate(resolved, file), found.locate(resolved, file)
    assert isinstance(rotated, HttpRemote)
    assert isinstance(anonymous, HttpRemote)
    assert rotated.headers == (("Authorization", "Bearer hf_rotated"),)
    assert anonymous.headers == ()
    assert rotated.url.endswith("/sub/a%20b.txt")
    assert rotated.origin == hub.url
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    "entry",
    [
        '{"type": "file", "path": "x", "size": -1, "oid": "%s"}' % ("a" * 40),
        '{"type": "file", "path": "x", "size": 1, "oid": "../../etc"}',
        '{"type": "file", "path": 7, "size": 1, "oid": "%s"}' % ("a" * 40),
        '{"type": "file", "path": "x", "size": 1}',
        '"x"',
        '{"type": "file", "path": "x", "size": 1, "oid": "", "lfs": {"oid": "%s", "size": "big"}}' % ("b" * 64),
    ],
)
def test_a_listing_of_another_shape_is_refused(hub: HubServer, entry: str) -> None:
    """What is not of the protocol is named as such, whatever is wrong with it."""
    spoil(hub, "/api/models/acme/m/tree/*", Kind.STATUS, status=200, headers={"Content-Type": "application/json"}, body=f"[{entry}]".encode())
    found = source(hub.url)
    assert refused(lambda: found.list(found.resolve(REF))).code is Code.SOURCE_PROTOCOL


def test_a_listing_that_contradicts_itself_is_refused(hub: HubServer) -> None:
    """One path, two contents; the same entry twice is harmless."""
    entries = ['{"type": "file", "path": "x", "size": 1, "oid": "%s"}' % (char * 40) for char in "aab"]
    for body in (entries[:2], entries):
        spoil(hub, "/api/models/acme/m/tree/*", Kind.STATUS, status=200, body=f"[{','.join(body)}]".encode())
    found = source(hub.url)
    resolved = found.resolve(REF)
    assert len(found.list(resolved)) == 1
    with pytest.raises(IntegrityError) as caught:
        found.list(resolved)
    assert caught.value.code is Code.LISTING_CONFLICT


# --- refusals


def test_private_missing_gated_and_bad_token_are_told_apart(hub: HubServer) -> None:
    """By what the Hub says, and by whether a token was sent."""
    hub.repos["acme/private"] = Repo(FILES, private=True)
    private = parse_ref("acme/private")
    assert source(hub.url).resolve(private).ref.pinned
    hidden = refused(lambda: source(hub.url, None).resolve(private))
    assert (hidden.code, hidden.retryable) == (Code.REPOSITORY_NOT_FOUND, False)
    assert "no token is set" in str(hidden)
    missing = refused(lambda: source(hub.url).resolve(parse_ref("acme/gone")))
    assert missing.code is Code.REPOSITORY_NOT_FOUND
    assert "account may not see it" in str(missing)
    wrong = refused(lambda: source(hub.url, "hf_wrongwrong").resolve(REF))
    assert (wrong.code, wrong.retryable) == (Code.BAD_TOKEN, False)
    assert "hf_wrong" not in str(wrong)


@pytest.mark.parametrize(
    ("status", "token", "text"),
    [(401, None, "no token is set"), (401, TOKEN, "does not open it"), (403, TOKEN, "not on the list")],
)
def test_gated_says_what_is_lacking(hub: HubServer, status: int, token: str | None, text: str) -> None:
    """A Hub that gates its API as well."""
    spoil(hub, "/api/*", Kind.STATUS, status=status, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
    error = refused(lambda: source(hub.url, token).resolve(REF))
    assert (error.code, error.retryable) == (Code.GATED, False)
    assert text in str(error)


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (403, {"X-Error-Message": "Access to this resource is disabled."}, Code.SOURCE_FORBIDDEN),
        (403, {}, Code.SOURCE_FORBIDDEN),
        (451, {}, Code.SOURCE_FORBIDDEN),
        (404, {"X-Error-Code": "RevisionNotFound"}, Code.REVISION_NOT_FOUND),
        (404, {}, Code.REPOSITORY_NOT_FOUND),
        (400, {}, Code.SOURCE_PROTOCOL),
        (418, {}, Code.SOURCE_FAILED),
        (401, {}, Code.BAD_TOKEN),
        (511, {}, Code.SOURCE_PROTOCOL),
    ],
)
def test_permanent_refusals_are_not_tried_again(hub: HubServer, status: int, headers: dict[str, str], code: Code) -> None:
    """One request, one code."""
    spoil(hub, "/api/*", Kind.STATUS, status=status, headers=headers, times=None)
    error = refused(lambda: source(hub.url).resolve(REF))
    assert (error.code, error.retryable) == (code, False)
    assert len(hub.requests) == 1


def test_what_the_server_says_is_quoted_short_and_masked(hub: HubServer) -> None:
    """The reason helps; a secret or a novel in it does not."""
    said = f"ask sales, Bearer {TOKEN} " + "x" * 500
    spoil(hub, "/api/*", Kind.STATUS, status=403, headers={"X-Error-Message": said})
    error = refused(lambda: source(hub.url).resolve(REF))
    assert "ask sales" in str(error)
    assert len(str(error)) < 400


def test_a_captive_portal_is_not_taken_for_a_hub(hub: HubServer) -> None:
    """HTML with status 200."""
    spoil(hub, "/api/*", Kind.PORTAL)
    error = refused(lambda: source(hub.url).resolve(REF))
    assert error.code is Code.SOURCE_PROTOCOL
    assert "text/html" in str(error)
    spoil(hub, "/api/*", Kind.STATUS, status=200, body=b'{"detail": "hello"}')
    assert refused(lambda: source(hub.url).resolve(REF)).code is Code.SOURCE_PROTOCOL


def test_a_token_no_header_may_hold_is_refused_before_it_is_sent(hub: HubServer) -> None:
    """A token file with rubbish in it; its content must not reach a message."""
    error = refused(lambda: source(hub.url, "hf_two\nlines").resolve(REF))
    assert error.code is Code.BAD_TOKEN
    assert "two" not in str(error)
    assert not hub.requests


# --- trying again


@pytest.mark.parametrize("kind", [Kind.BUSY, Kind.THROTTLE])
def test_a_short_pause_is_waited_out(hub: HubServer, kind: Kind) -> None:
    """One second of Retry-After, then the answer."""
    spoil(hub, "/api/*", kind, seconds=1)
    began = time.monotonic()
    assert source(hub.url).resolve(REF).ref.pinned
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("style", ["retry-after", "ratelimit"])
def test_a_long_pause_is_handed_to_the_caller(hub: HubServer, style: str) -> None:
    """The Hub's window of minutes is not slept through inside a call."""
    spoil(hub, "/api/*", Kind.THROTTLE, seconds=172, style=style)
    began = time.monotonic()
    error = refused(lambda: source(hub.url).resolve(REF))
    assert (error.code, error.retryable) == (Code.SOURCE_BUSY, True)
    assert error.retry_after_s == pytest.approx(172, abs=1)
    assert time.monotonic() - began < 60


def test_server_errors_are_tried_a_few_times(hub: HubServer) -> None:
    """Twice wrong, then right; always wrong is an error that may be tried later."""
    spoil(hub, "/api/*", Kind.STATUS, status=502, times=2)
    assert source(hub.url).resolve(REF).ref.pinned
    spoil(hub, "/api/*", Kind.STATUS, status=500, times=None)
    error = refused(lambda: source(hub.url).resolve(REF))
    assert (error.code, error.retryable) == (Code.SOURCE_FAILED, True)


@pytest.mark.parametrize(("kind", "seconds"), [(Kind.STALL, 30), (Kind.TRICKLE, 0.2)])
def test_a_hub_that_stalls_is_left(hub: HubServer, kind: Kind, seconds: float) -> None:
    """Silence, or a byte now and then, in the middle of an answer."""
    spoil(hub, "/api/models/acme/m/tree/*", kind, after=1, seconds=seconds, times=None)
    found = source(hub.url)
    resolved = found.resolve(REF)
    began = time.monotonic()
    error = refused(lambda: found.list(resolved))
    assert error.retryable
    assert error.code in (Code.SOURCE_STALLED, Code.SOURCE_FAILED)
    assert time.monotonic() - began < 25


def test_nobody_listens() -> None:
    """Refused connections: bounded, retryable."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    began = time.monotonic()
    error = refused(lambda: source(url).resolve(REF))
    assert (error.code, error.retryable) == (Code.SOURCE_UNREACHABLE, True)
    assert time.monotonic() - began < 30


def test_somebody_listens_and_never_answers() -> None:
    """A black hole: bounded, retryable."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        error = refused(lambda: source(f"http://127.0.0.1:{server.getsockname()[1]}").resolve(REF))
    assert (error.code, error.retryable) == (Code.SOURCE_STALLED, True)
    assert time.monotonic() - began < 30


def test_a_name_that_does_not_resolve() -> None:
    """DNS says no."""
    assert refused(lambda: source("http://no-such-host.invalid").resolve(REF)).code is Code.SOURCE_UNREACHABLE


def test_offline_mode_of_the_library_is_respected(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1 (read by the library when it is imported) forbids requests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(lambda: source(hub.url).resolve(REF))
    assert error.code is Code.SOURCE_UNREACHABLE
    assert "HF_HUB_OFFLINE" in str(error)
    assert not hub.requests


# --- where the token goes


def test_the_token_is_sent_to_the_endpoint_only(hub: HubServer) -> None:
    """A redirect and a next page that lead to another origin go without it."""
    elsewhere = HubServer({"acme/m": hub.repos["acme/m"]})
    with elsewhere:
        commit = hub.repos["acme/m"].commit
        spoil(hub, "/api/models/acme/m/revision/*", Kind.STATUS, status=307, headers={"Location": f"{elsewhere.url}/api/models/acme/m"})
        page = {"Link": f'<{elsewhere.url}/api/models/acme/m/tree/{commit}?recursive=true>; rel="next"'}
        spoil(hub, "/api/models/acme/m/tree/*", Kind.STATUS, status=200, headers=page, body=b"[]")
        found = source(hub.url)
        assert len(found.list(found.resolve(REF))) == len(FILES)
        assert len(elsewhere.requests) == 2
        assert not [request for request in elsewhere.requests if "authorization" in request.headers]
        assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in hub.requests)


def test_a_redirect_on_the_same_origin_keeps_it(hub: HubServer) -> None:
    """A renamed repository answers with a relative 307."""
    hub.repos["acme/old"] = Repo({})
    spoil(hub, "/api/models/acme/old/*", Kind.STATUS, status=307, headers={"Location": "/api/models/acme/m"})
    assert source(hub.url).resolve(parse_ref("acme/old")).ref.revision == hub.repos["acme/m"].commit
    assert hub.requests[-1].headers["authorization"] == f"Bearer {TOKEN}"


def test_redirects_end(hub: HubServer) -> None:
    """A loop is an error, not a hang."""
    spoil(hub, "/api/*", Kind.REDIRECT_LOOP, times=None)
    assert refused(lambda: source(hub.url).resolve(REF)).code is Code.SOURCE_PROTOCOL


def test_nothing_is_taken_from_the_process_environment(hub: HubServer, tmp_path: Path) -> None:
    """No implicit token, no proxy, no telemetry, nothing written below HF_HOME; and workers do not load the library."""
    script = f"""
import sys
from nvcache.core.ref import parse_ref
from nvcache.sources.open import open_remote
from nvcache.sources.huggingface import HuggingFace, Transport
assert "huggingface_hub" not in sys.modules
found = HuggingFace({hub.url!r}, lambda: None, Transport())
print(len(found.list(found.resolve(parse_ref("acme/m")))))
assert not [name for name in sys.modules if name in ("huggingface_hub.hf_api", "numpy", "torch")]
"""
    nowhere = "http://127.0.0.1:9"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_TOKEN": "hf_implicit", "HTTP_PROXY": nowhere, "ALL_PROXY": nowhere}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(len(FILES)), "")
    assert not list(tmp_path.iterdir())
    assert {request.path.split("/")[2] for request in hub.requests} == {"models"}
    assert all("authorization" not in request.headers and "torch" not in request.headers["user-agent"] for request in hub.requests)


# --- TLS and proxies


def test_a_private_ca_is_trusted_when_given(tmp_path: Path) -> None:
    """And only then; a file that is no bundle is named."""
    tls = make_tls(tmp_path)
    with HubServer({"acme/m": Repo(FILES)}, tls=tls) as hub:
        assert source(hub.url, transport=replace(QUICK, ca_file=str(tls.cert))).resolve(REF).ref.pinned
        error = refused(lambda: source(hub.url).resolve(REF))
        assert (error.code, error.retryable) == (Code.SOURCE_TLS, False)
        assert hub.url in str(error)
        for bad in ("gone.pem", "empty.pem"):
            (tmp_path / "empty.pem").touch()
            broken = refused(lambda bad=bad: source(hub.url, transport=replace(QUICK, ca_file=str(tmp_path / bad))).resolve(REF))  # type: ignore[misc]
            assert broken.code is Code.SOURCE_TLS
            assert bad in str(broken)


def test_plain_http_on_a_tls_port_is_told(hub: HubServer) -> None:
    """https:// in HF_ENDPOINT, http on the port."""
    assert refused(lambda: source(hub.url.replace("http://", "https://")).resolve(REF)).code is Code.SOURCE_TLS


def test_never_from_https_to_http(tmp_path: Path) -> None:
    """A redirect may not take TLS away."""
    tls = make_tls(tmp_path)
    with HubServer({"acme/m": Repo(FILES)}, tls=tls) as hub:
        spoil(hub, "/api/*", Kind.DOWNGRADE)
        error = refused(lambda: source(hub.url, transport=replace(QUICK, ca_file=str(tls.cert))).resolve(REF))
    assert (error.code, error.retryable) == (Code.SOURCE_PROTOCOL, False)


def test_proxies_are_honoured(hub: HubServer, tmp_path: Path) -> None:
    """Plain requests go through it whole, TLS through CONNECT, with its credentials; NO_PROXY goes past it."""
    tls = make_tls(tmp_path)
    with Proxy() as proxy, HubServer({"acme/m": Repo(FILES)}, tls=tls) as secure:
        for server in (hub, secure):
            through = replace(QUICK, ca_file=str(tls.cert), proxies={"all": proxy.url})
            assert source(server.url, transport=through).resolve(REF).ref.pinned
            past = replace(through, proxies={"all": proxy.url, "no": "127.0.0.1"})
            assert source(server.url, transport=past).resolve(REF).ref.pinned
        assert [line.split()[0] for line, _ in proxy.seen] == ["GET", "CONNECT"]
        assert all(known for _, known in proxy.seen)


def test_a_proxy_that_refuses_is_named_without_its_password(tmp_path: Path) -> None:
    """407 of a proxy is not 407 of the Hub."""
    with Proxy(refuse=407) as proxy:
        error = refused(lambda: source("https://127.0.0.1:1", transport=replace(QUICK, proxies={"https": proxy.url})).resolve(REF))
    assert error.code is Code.SOURCE_UNREACHABLE
    assert "407" in str(error)
    assert "p%40ss" not in f"{error!r}"


# --- files over the limit of plain HTTP


def test_large_files_need_xet(hub: HubServer) -> None:
    """By the injected limit; what is refused says why."""
    found = source(hub.url, http_limit=999)
    resolved = found.resolve(REF)
    small, large, _ = found.list(resolved)
    assert not found.needs_xet(small)
    assert found.needs_xet(large)
    error = refused(lambda: found.locate(resolved, large))
    assert (error.code, error.retryable) == (Code.NEEDS_XET, False)
    assert "no Xet hash" in str(error)


def test_large_files_are_located_in_xet_storage(hub: HubServer) -> None:
    """With the token that the Hub gives for the commit, and the way to renew it."""
    assert xet_available()
    body = b'{"casUrl": "https://cas.example.invalid", "accessToken": "xetSecret", "exp": 1900000000}'
    spoil(hub, "/api/models/acme/m/xet-read-token/*", Kind.STATUS, status=200, body=body)
    hub.repos["acme/m"].xet["model.safetensors"] = "c" * 64
    found = source(hub.url, http_limit=999)
    resolved = found.resolve(REF)
    remote = found.locate(resolved, found.list(resolved)[1])
    assert isinstance(remote, XetRemote)
    assert (remote.hash, remote.size, remote.endpoint, remote.token_expiry) == ("c" * 64, 1000, "https://cas.example.invalid", 1900000000)
    assert remote.refresh_headers == (("Authorization", f"Bearer {TOKEN}"),)
    assert "Secret" not in repr(remote)


def test_without_hf_xet_the_extra_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint says what to install."""
    monkeypatch.setattr("nvcache.sources.huggingface.xet_available", lambda: False)
    found = source(hub.url, http_limit=1)
    resolved = found.resolve(REF)
    error = refused(lambda: found.locate(resolved, RemoteFile("big", 2, "t", xet="c" * 64)))
    assert error.code is Code.NEEDS_XET
    assert "nvcache[xet]" in error.hint


# --- the table


def test_every_exception_of_the_library_is_mapped() -> None:
    """A class that a new version of huggingface_hub brings fails this test until somebody has thought about it."""
    classes = {kind.__name__: kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)}
    for name in classes.keys() - ELSEWHERE:
        assert isinstance(hubclient.code_of(classes[name]), Code), name
    assert not ELSEWHERE & hubclient.CODES.keys()


def test_every_exception_of_its_http_client_is_mapped() -> None:
    """The same for httpx or httpx2, whichever the library speaks."""
    kinds = [kind for _, kind in inspect.getmembers(hubclient.http, inspect.isclass) if issubclass(kind, Exception)]
    requests = [kind for kind in kinds if issubclass(kind, hubclient.http.HTTPError | hubclient.http.InvalidURL)]
    assert len(requests) > 15
    assert all(isinstance(hubclient.code_of(kind), Code) for kind in requests)


def test_parallel_calls_share_nothing(hub: HubServer) -> None:
    """Threads with different fates at once: one Hub is dead, one lives."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"http://127.0.0.1:{server.getsockname()[1]}"
    results: list[object] = []

    def ask(url: str) -> None:
        try:
            results.append(source(url).resolve(REF).ref.revision)
        except SourceError as error:
            results.append(error.code)

    threads = [threading.Thread(target=ask, args=(url,)) for url in [hub.url, dead] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(map(str, results)) == sorted([hub.repos["acme/m"].commit] * 4 + [str(Code.SOURCE_UNREACHABLE)] * 4)
