"""What answers to range requests mean, URLs and NO_PROXY: the pure parts of the HTTP sources."""

from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources.answers import Asked, WrongSizeError, body_length, permanent, strong, unsatisfiable, wrong_size
from nvcache.sources.http import Target, bypassed, proxy_authorization, proxy_for

ASKED = Asked("model.safetensors", "https://cdn.example", 100, 200, 1000)


def headers(**fields):
    message = Message()
    for name, value in fields.items():
        message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("status", "fields", "length"),
    [
        (206, {"content_range": "bytes 100-199/1000", "content_length": "100"}, 100),
        (206, {"content_range": "bytes 100-149/*"}, 50),
        (200, {"content_length": "1000"}, None),
        (200, {}, None),
        (200, {"content_type": "text/html", "content_length": "1000"}, None),
    ],
)
def test_answers_that_will_do(status, fields, length):
    assert body_length(status, headers(**fields), ASKED) == length


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"content_range": "bytes 99-199/1000"},
        {"content_range": "bytes 100-200/1000"},
        {"content_range": "bytes 100-99/1000"},
        {"content_range": "items 100-199/1000"},
        {"content_range": "bytes 100-199/1000", "content_length": "99"},
        {"content_range": "bytes 100-199/1000", "content_encoding": "gzip"},
        {"content_range": "bytes 100-199/1000", "content_type": "multipart/byteranges; boundary=x"},
    ],
)
def test_answers_against_the_protocol(fields):
    with pytest.raises(SourceError) as caught:
        body_length(206, headers(**fields), ASKED)
    assert caught.value.code is Code.SOURCE_PROTOCOL


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (206, {"content_range": "bytes 100-199/999"}),
        (200, {"content_length": "134"}),
        (200, {"content_length": "9" * 5000}),
        (200, {"content_length": "²"}),
    ],
)
def test_answers_about_a_file_of_another_size(status, fields):
    with pytest.raises(WrongSizeError):
        body_length(status, headers(**fields), ASKED)


@given(st.sampled_from([200, 206]), st.text(), st.text(), st.text(), st.text())
def test_no_headers_give_bytes_that_were_not_asked_for(status, span, length, kind, coding):
    fields = Message()
    try:
        for name, value in {"Content-Range": span, "Content-Length": length, "Content-Type": kind, "Content-Encoding": coding}.items():
            fields[name] = value
        got = body_length(status, fields, ASKED)
    except (SourceError, WrongSizeError):
        return
    assert got is None if status == 200 else got is not None and 0 < got <= 100


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", Code.POINTER_FILE),
        (b"\n<!DOCTYPE HTML><html>", Code.SOURCE_PROTOCOL),
        (b"<html>", Code.SOURCE_PROTOCOL),
        (b"\x00\x01", Code.SIZE_MISMATCH),
        (b"", Code.SIZE_MISMATCH),
    ],
)
def test_what_a_wrong_size_means(head, code):
    assert wrong_size(ASKED, 134, head).code is code


def test_416():
    assert unsatisfiable(headers(content_range="bytes */90"), ASKED).code is Code.SIZE_MISMATCH
    assert isinstance(unsatisfiable(headers(), ASKED), IntegrityError)
    assert unsatisfiable(headers(content_range="bytes */1000"), ASKED).code is Code.SOURCE_PROTOCOL


def test_a_416_with_a_number_that_python_does_not_read():
    assert unsatisfiable(headers(content_range=f"bytes */{'9' * 5000}"), ASKED).code is Code.SIZE_MISMATCH


def test_a_coding_is_quoted_clean():
    with pytest.raises(SourceError) as caught:
        body_length(206, headers(content_encoding="\x1b[2J"), ASKED)
    assert str(caught.value).isprintable()


def test_what_the_source_says_is_quoted_clean_and_short():
    error = permanent(403, headers(X_Error_Message="Access to this resource is disabled.\x1b[31m" + "x" * 900), ASKED, authorised=True)
    assert "disabled.[31mxxx" in str(error)
    assert len(str(error)) < 350


@pytest.mark.parametrize(("etag", "name"), [('"a"', '"a"'), ("a", "a"), ('W/"a"', None), (None, None), ("", None)])
def test_strong_etags(etag, name):
    assert strong(etag) == name


# --- URLs


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("https://huggingface.co/a/b?x=1#f", "https://huggingface.co", "/a/b?x=1"),
        ("http://user:pw@127.0.0.1:80", "http://127.0.0.1", "/"),
        ("http://[::1]:8080/x", "http://[::1]:8080", "/x"),
        ("https://h/a b/ü?q=a b", "https://h", "/a%20b/%C3%BC?q=a%20b"),
        ("https://h/a%20b", "https://h", "/a%20b"),
        ("https://bücher.example/", "https://xn--bcher-kva.example", "/"),
    ],
)
def test_urls(url, origin, path):
    target = Target.parse(url)
    assert (target.origin, target.path) == (origin, path)
    assert "pw" not in repr(target)
    assert target.path not in repr(target) or path == "/"


@pytest.mark.parametrize("url", ["", "ftp://h/x", "https:///x", "http://h:99999/", "http://[::1", "/x", "https://me:s3cr3t/x@h/"])
def test_what_is_no_url(url):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the standard library words it
        Target.parse(url)
    assert "s3cr3t" not in str(raised.value), "of a password with a slash"


def test_relative_locations():
    here = Target.parse("https://hub.example/org/m/resolve/c/f?x=1")
    assert here.join("/api/resolve-cache/f").origin == "https://hub.example"
    assert here.join("other").path == "/org/m/resolve/c/other"
    assert here.join("//cdn.example/f").origin == "https://cdn.example"


@given(st.text(max_size=60))
def test_any_location_is_a_target_or_a_value_error(location):
    try:
        target = Target.parse("https://hub.example/x").join(location)
    except ValueError:
        return
    assert target.path.isascii()
    assert not any(ord(character) <= 32 for character in target.path)


# --- proxies


@pytest.mark.parametrize(
    ("host", "rules", "bypass"),
    [
        ("hub.example", "*", True),
        ("hub.example", "example", True),
        ("hub.example", ".example", True),
        ("hub.example", "a.b, HUB.example", True),
        ("hub.example", "ub.example", False),
        ("example", ".example", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "11.0.0.0/8 10.1.2.3", True),
        ("10.1.2.3", "2.3", False),
        ("::1", "[::1]", True),
        ("fd00::5", "fd00::/8", True),
        ("10.1.2.3", "10.0.0.0/99", False),
        ("hub.example", "", False),
        ("hub.example", ",", False),
    ],
)
def test_no_proxy(host, rules, bypass):
    assert bypassed(host, rules) is bypass


def test_the_choice_of_proxy():
    target = Target.parse("https://hub.example/x")
    assert proxy_for(target, {"https": "proxy:3128", "all": "http://other"}) == "http://proxy:3128"
    assert proxy_for(target, {"http": "http://proxy", "all": "http://other:1"}) == "http://other:1"
    assert proxy_for(target, {"http": "http://proxy"}) is None
    assert proxy_for(target, {"all": "http://proxy", "no": "hub.example"}) is None


@pytest.mark.parametrize("proxy", ["socks5://u:secret@h:1", "https://u:secret@h", "http://u:sec/ret@h", "http://u:p@h:secret"])
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(proxy):
    with pytest.raises(ValueError, match="not the URL of an http:// proxy") as caught:
        proxy_for(Target.parse("https://hub.example/x"), {"all": proxy})
    assert "sec" not in str(caught.value)


def test_proxy_credentials():
    assert proxy_authorization("http://h:1") == {}
    assert proxy_authorization("http://u:p%40ss@h:1") == {"Proxy-Authorization": "Basic dTpwQHNz"}
