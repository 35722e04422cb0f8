"""Each thing a source, a CDN or a middlebox may do wrong, done by a real server to the ranged reader."""

import hashlib
import random
import time

import pytest

from nvcache.errors import Code, IntegrityError, SourceError
from tests.support.hub import HubServer, Kind, Repo
from tests.support.lanes import KIB, Lanes, remote

WEIGHTS = random.Random(2).randbytes(700 * KIB + 13)
CONFIG = b'{"architectures": ["Llama"]}' * 40
SIZE = len(WEIGHTS)
TOKEN = "hf_" + "s" * 30


@pytest.fixture(scope="module")
def server():
    with HubServer({"acme/m": Repo({"m.safetensors": WEIGHTS, "config.json": CONFIG, "notes.html": CONFIG})}) as hub:
        yield hub


@pytest.fixture
def weights(hub):
    with Lanes(remote(hub, "m.safetensors", SIZE)) as lanes:
        yield lanes


def ranges(hub):
    return [request.range for request in hub.seen("m.safetensors", origin="cdn")]


def test_lfs_file_by_four_lanes_resolves_once_and_keeps_connections(hub, weights):
    assert weights.fetch() == WEIGHTS
    assert len(hub.seen(origin="hub")) == 1
    assert hub.bytes_sent() == SIZE
    assert all(request.headers["accept-encoding"] == "identity" for request in hub.requests)


def test_plain_file_comes_from_the_hub_itself(hub):
    with Lanes(remote(hub, "config.json", len(CONFIG))) as lanes:
        assert lanes.fetch(chunk=100) == CONFIG
    assert hub.seen(origin="cdn") == []


def test_an_empty_read_asks_nothing(hub, weights):
    weights.reader().read(5, memoryview(bytearray(0)))
    assert hub.requests == []


def test_a_range_outside_the_file_is_a_defect_of_the_caller(weights):
    with pytest.raises(ValueError, match="not inside"):
        weights.read(SIZE - 1, SIZE + 1)


@pytest.mark.parametrize("kind", [Kind.TRUNCATE, Kind.RESET])
@pytest.mark.parametrize("after", [0, 1, 300 * KIB])
def test_a_broken_body_is_taken_up_at_the_next_byte(hub, weights, kind, after):
    hub.faults.add("*", kind, after=after)
    assert weights.read() == WEIGHTS
    first, second = ranges(hub)
    assert first == f"bytes=0-{SIZE - 1}"
    # after a reset the kernel may throw away what it had received
    resumed = int(second.removeprefix("bytes=").partition("-")[0])
    assert resumed == after if kind is Kind.TRUNCATE else resumed <= after
    assert hub.seen("m.safetensors", origin="cdn")[1].headers["if-range"]


def test_the_server_restarting_between_ranges_costs_no_back_off(hub, weights):
    reader, into = weights.reader(), memoryview(bytearray(100))
    reader.read(0, into)
    hub.drop_connections()
    before = time.monotonic()
    reader.read(100, into)
    assert bytes(into) == WEIGHTS[100:200]
    assert time.monotonic() - before < 0.2


@pytest.mark.parametrize("kind", [Kind.WRONG_START, Kind.MULTIPART, Kind.GZIP, Kind.PORTAL, Kind.REDIRECT_LOOP])
def test_one_answer_against_the_protocol_is_asked_again(hub, weights, kind):
    fault = hub.faults.add("*", kind)
    assert weights.read() == WEIGHTS
    assert fault.hits == 1


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Kind.WRONG_START, r"bytes 0-\d+ were asked for, 1-"),
        (Kind.MULTIPART, "several parts"),
        (Kind.GZIP, "Content-Encoding 'gzip'"),
        (Kind.PORTAL, "web page"),
        (Kind.REDIRECT_LOOP, "more than 10 redirects"),
    ],
)
def test_answers_that_keep_breaking_the_protocol(hub, weights, kind, why):
    fault = hub.faults.add("*", kind, times=None)
    with pytest.raises(SourceError, match=why) as caught:
        weights.read(0, 100 * KIB)
    assert caught.value.code is Code.SOURCE_PROTOCOL
    assert caught.value.retryable
    assert "m.safetensors" in str(caught.value)
    assert fault.hits in (3, 3 * 10)


def test_another_total_is_another_file(hub, weights):
    hub.faults.add("*", Kind.WRONG_TOTAL)
    with pytest.raises(IntegrityError, match=f"listed with {SIZE:,} bytes and has {SIZE + 1:,}") as caught:
        weights.read(0, 100)
    assert caught.value.code is Code.SIZE_MISMATCH


@pytest.mark.parametrize("lie", [SIZE - 1, SIZE + 1, 10 * SIZE])
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_listing_that_lies_about_the_size(hub, lie, lanes):
    with Lanes(remote(hub, "m.safetensors", lie)) as readers, pytest.raises(IntegrityError) as caught:
        readers.fetch(lanes=lanes)
    assert caught.value.code is Code.SIZE_MISMATCH


def test_416_inside_the_file_means_that_it_is_shorter(hub, weights):
    hub.faults.add("*", Kind.UNSATISFIABLE)
    with pytest.raises(IntegrityError, match=f"has {SIZE - 1:,}") as caught:
        weights.read(SIZE - 100, SIZE)
    assert caught.value.code is Code.SIZE_MISMATCH


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_pointer_instead_of_the_file_is_named(hub, weights, lanes):
    hub.faults.add("*", Kind.POINTER, times=None)
    with pytest.raises(IntegrityError, match="git-lfs pointer") as caught:
        weights.fetch(lanes=lanes)
    assert caught.value.code is Code.POINTER_FILE


def test_a_pointer_from_a_server_that_honours_ranges_is_named(hub):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
    hub.repos["acme/p"] = Repo({"m.safetensors": pointer}, lfs=lambda path, size: False)
    with Lanes(remote(hub, "m.safetensors", SIZE, repo="acme/p")) as lanes, pytest.raises(IntegrityError) as caught:
        lanes.read(0, 64 * KIB)
    assert caught.value.code is Code.POINTER_FILE
    with Lanes(remote(hub, "m.safetensors", SIZE, repo="acme/p")) as lanes, pytest.raises(IntegrityError) as caught:
        lanes.read(64 * KIB, 128 * KIB)
    assert caught.value.code is Code.SIZE_MISMATCH
    assert "pointer" in caught.value.hint


def test_a_page_of_the_repository_is_no_portal(hub):
    hub.faults.add("*.html", Kind.IGNORE_RANGE)
    with Lanes(remote(hub, "notes.html", len(CONFIG))) as lanes:
        assert lanes.read() == CONFIG


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
def test_errors_that_pass(hub, weights, status):
    hub.faults.add("*", Kind.STATUS, status=status, times=2)
    assert weights.read() == WEIGHTS


def test_errors_that_do_not_pass_end_at_the_deadline(hub):
    hub.faults.add("*", Kind.STATUS, status=500, times=None)
    before = time.monotonic()
    with Lanes(remote(hub, "m.safetensors", SIZE), deadline=1.0) as lanes, pytest.raises(SourceError, match="answers 500") as caught:
        lanes.read()
    assert caught.value.code is Code.SOURCE_FAILED
    assert caught.value.retryable
    assert time.monotonic() - before < 30


def test_a_deadline_already_past_still_tells_what_the_source_says(hub):
    hub.faults.add("*", Kind.STATUS, status=500, times=None)
    with Lanes(remote(hub, "m.safetensors", SIZE), deadline=0.0) as lanes, pytest.raises(SourceError, match="answers 500") as caught:
        lanes.read()
    assert caught.value.code is Code.SOURCE_FAILED


@pytest.mark.parametrize(("kind", "style"), [(Kind.THROTTLE, "ratelimit"), (Kind.THROTTLE, "retry-after"), (Kind.BUSY, "retry-after")])
def test_a_throttle_is_waited_out_once_for_all_lanes(hub, kind, style):
    told = []
    fault = hub.faults.add("*", kind, seconds=1, style=style)
    before = time.monotonic()
    with Lanes(remote(hub, "m.safetensors", SIZE), on_pause=lambda origin, seconds: told.append((origin, seconds))) as lanes:
        assert lanes.fetch() == WEIGHTS
    assert 1.0 <= time.monotonic() - before < 30
    assert fault.hits == 1
    assert told == [(hub.cdn_url, 1.0)]


def test_a_retry_after_in_the_form_of_a_date(hub, weights):
    hub.faults.add("*", Kind.BUSY, seconds=2, style="date")
    before = time.monotonic()
    assert weights.read() == WEIGHTS
    assert 0.9 <= time.monotonic() - before < 30


def test_a_wait_beyond_the_deadline_is_not_begun(hub):
    hub.faults.add("*", Kind.THROTTLE, seconds=250, style="ratelimit", times=None)
    before = time.monotonic()
    with Lanes(remote(hub, "m.safetensors", SIZE)) as lanes, pytest.raises(SourceError) as caught:
        lanes.read()
    assert caught.value.code is Code.SOURCE_BUSY
    assert 200 < caught.value.retry_after_s < 300
    assert time.monotonic() - before < 30


def test_a_throttle_without_a_time_is_backed_off_from(hub, weights):
    fault = hub.faults.add("*", Kind.THROTTLE, style="none", times=2)
    assert weights.read() == WEIGHTS
    assert fault.hits == 2


@pytest.mark.parametrize("status", [401, 403, 410])
def test_a_url_that_expires_mid_file_is_resolved_anew_and_read_on(hub, weights, status):
    hub.faults.add("*", Kind.EXPIRE, after=300 * KIB, status=status)
    assert weights.read() == WEIGHTS
    assert len(hub.seen(origin="hub")) == 2
    assert ranges(hub)[-1] == f"bytes={300 * KIB}-{SIZE - 1}"
    assert hub.bytes_sent() == SIZE


def test_four_lanes_resolve_an_expired_url_once(hub, weights):
    readers = [weights.reader() for _ in range(4)]
    into = memoryview(bytearray(10))
    for reader in readers:
        reader.read(0, into)
    hub.expire_urls()
    assert weights.fetch() == WEIGHTS
    assert len(hub.seen(origin="hub")) == 2


def test_fresh_urls_that_are_refused_too_are_an_error(hub, weights):
    hub.url_life_s = -1
    try:
        with pytest.raises(SourceError, match="signed URLs are refused") as caught:
            weights.read()
    finally:
        hub.url_life_s = 3600
    assert caught.value.code is Code.SOURCE_FORBIDDEN
    assert not caught.value.retryable
    assert len(hub.seen(origin="hub")) == 2


def test_a_new_url_for_other_content_is_refused(hub, weights):
    reader, into = weights.reader(), memoryview(bytearray(10))
    reader.read(0, into)
    hub.expire_urls()
    hub.faults.add("*/resolve/*", Kind.STATUS, origin="hub", status=302, headers={"Location": hub.cdn_url + "/x", "X-Linked-Etag": '"other"'})
    hub.faults.add("/x", Kind.STATUS, origin="cdn", status=206, headers={"Content-Range": f"bytes 10-19/{SIZE}"}, body=b"0123456789")
    with pytest.raises(SourceError, match="other content") as caught:
        reader.read(10, into)
    assert caught.value.code is Code.SOURCE_CHANGED


def test_an_etag_that_changes_between_ranges(hub, weights):
    reader = weights.reader()
    reader.read(0, memoryview(bytearray(10)))
    hub.faults.add("*", Kind.CHANGED, times=None)
    with pytest.raises(SourceError, match="ETag") as caught:
        reader.read(10, memoryview(bytearray(10)))
    assert caught.value.code is Code.SOURCE_CHANGED
    assert hub.seen("m.safetensors", origin="cdn")[-1].status == 200  # by If-Range


def test_a_validator_known_beforehand_is_sent_and_held_to(hub):
    with Lanes(remote(hub, "config.json", len(CONFIG), validator='"not-this-one"')) as lanes, pytest.raises(SourceError) as caught:
        lanes.read(0, 10)
    assert caught.value.code is Code.SOURCE_CHANGED
    assert hub.requests[0].headers["if-range"] == '"not-this-one"'


def test_the_pinned_commit_is_read_on_when_the_branch_moves(hub):
    hub.repos["acme/v"] = repo = Repo({"m.safetensors": WEIGHTS})
    with Lanes(remote(hub, "m.safetensors", SIZE, repo="acme/v")) as lanes:
        first = lanes.read(0, 100)
        repo.push({"m.safetensors": WEIGHTS[::-1]})
        hub.expire_urls()
        assert first + lanes.read(100) == WEIGHTS


def test_a_flipped_byte_passes_here_and_is_left_to_the_digest(hub, weights):
    hub.faults.add("*", Kind.FLIP, after=1000)
    got = weights.read()
    assert got[1000] == WEIGHTS[1000] ^ 0xFF
    assert hashlib.sha256(got).digest() != hashlib.sha256(WEIGHTS).digest()


def test_a_relative_redirect_keeps_the_token(hub):
    hub.resolve_cache, hub.token = True, TOKEN
    try:
        with Lanes(remote(hub, "config.json", len(CONFIG), token=TOKEN)) as lanes:
            assert lanes.fetch(chunk=100) == CONFIG
    finally:
        hub.resolve_cache, hub.token = False, None
    assert [request.path.split("/")[1] for request in hub.requests[:3]] == ["acme", "api", "api"]
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in hub.requests)


def test_no_token_reaches_the_cdn_nor_an_error(hub, capfd):
    with Lanes(remote(hub, "m.safetensors", SIZE, token=TOKEN), deadline=1.0) as lanes:
        assert lanes.fetch() == WEIGHTS
        hub.faults.add("*", Kind.STATUS, status=500, times=None)
        with pytest.raises(SourceError) as caught:
            lanes.read()
    assert hub.seen(origin="hub")[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert all("authorization" not in request.headers for request in hub.seen(origin="cdn"))
    for text in (str(caught.value), repr(caught.value), repr(caught.value.facts), *capfd.readouterr()):
        assert TOKEN not in text
        assert "Signature" not in text


@pytest.mark.parametrize(
    ("options", "token", "code"),
    [
        ({"private": True}, None, Code.REPOSITORY_NOT_FOUND),
        ({"gated": True}, None, Code.GATED),
        ({"gated": True, "granted": False}, TOKEN, Code.GATED),
        ({}, "hf_wrong", Code.BAD_TOKEN),
    ],
)
def test_refusals_of_the_hub_are_permanent_and_named(hub, options, token, code):
    hub.repos["acme/g"] = Repo({"config.json": CONFIG}, **options)
    hub.token = TOKEN
    try:
        with Lanes(remote(hub, "config.json", len(CONFIG), repo="acme/g", token=token)) as lanes, pytest.raises(SourceError) as caught:
            lanes.read()
    finally:
        hub.token = None
    assert caught.value.code is code
    assert not caught.value.retryable
    assert len(hub.requests) == 1
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (403, {}, Code.SOURCE_FORBIDDEN),
        (401, {}, Code.SOURCE_FORBIDDEN),
        (404, {}, Code.FILE_NOT_FOUND),
        (404, {"X-Error-Code": "RevisionNotFound"}, Code.REVISION_NOT_FOUND),
        (404, {"X-Error-Code": "EntryNotFound"}, Code.FILE_NOT_FOUND),
        (410, {}, Code.FILE_NOT_FOUND),
        (451, {}, Code.SOURCE_FORBIDDEN),
        (418, {}, Code.SOURCE_FAILED),
        (304, {}, Code.SOURCE_FAILED),
    ],
)
def test_other_refusals_are_permanent_too(hub, status, headers, code):
    hub.faults.add("*", Kind.STATUS, origin="hub", status=status, headers=headers)
    with Lanes(remote(hub, "config.json", len(CONFIG))) as lanes, pytest.raises(SourceError) as caught:
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (code, False)


def test_a_redirect_to_nowhere(hub, weights):
    hub.faults.add("*", Kind.STATUS, origin="hub", status=302, headers={"Location": "gopher://x/"}, times=None)
    with pytest.raises(SourceError, match="no http") as caught:
        weights.read()
    assert caught.value.code is Code.SOURCE_PROTOCOL


def test_nobody_listens(hub):
    gone = remote(hub, "m.safetensors", SIZE)
    gone = type(gone)(hub.url.rsplit(":", 1)[0] + ":1/x", SIZE, name="m.safetensors")
    with Lanes(gone, deadline=1.0) as lanes, pytest.raises(SourceError, match="refused") as caught:
        lanes.read()
    assert (caught.value.code, caught.value.retryable) == (Code.SOURCE_UNREACHABLE, True)


def test_a_name_that_does_not_exist(hub):
    with Lanes(type(remote(hub, "x", 1))("http://nowhere.invalid/x", 1, name="x"), deadline=0.6) as lanes, pytest.raises(SourceError) as caught:
        lanes.read()
    assert caught.value.code is Code.SOURCE_UNREACHABLE
    assert "resolved" in str(caught.value)
