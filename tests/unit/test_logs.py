"""Logs: one line a record, with its context, and no credential in any of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nvcache import logs

words = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=12, max_size=40)
secrets = st.text("abcdefghijklmnopqrstuvwxyz0123456789%+/=_-~.:@ ", min_size=8, max_size=30).map(lambda text: f"S3cret{text}S3cret")
SHAPES = (
    "https://cdn.example/a/b?X-Amz-Expires=3600&X-Amz-Signature={}&x=1",
    "https://account.blob.core.windows.net/c/b?sv=2024-01-01&sig={}",
    "GET /c/b?sp=r&sig={} HTTP/1.1",
    "GET /a/b?X-Amz-Expires=3600&X-Amz-Signature={} HTTP/1.1",
    "see 'https://cdn.example/x?Policy={}' and more",
    "https://cdn.example/x?any-name-at-all={}",
    "https://somebody:{}@proxy.example:3128/",
    "https://{}@hub.example/x?a=b",
    "http://somebody:{}@hub.example/x?a=b",
    "Authorization: Bearer {}",
    "authorization: Basic {}",
    "{{'Authorization': 'Bearer {}', 'X': '1'}}",
    "('authorization', 'Bearer {}')",
    '{{"Proxy-Authorization": "Basic {}"}}',
    "sent bearer {} to it",
)


@given(st.sampled_from(SHAPES), secrets, st.text(max_size=10))
@example(SHAPES[0], "S3cretabcS3cret", "")
def test_no_credential_survives(shape: str, secret: str, around: str) -> None:
    text = f"{around} {shape.format(quote(secret, safe='' if '@' in shape or '?' in shape else '+/=~._-'))} {around}"
    assert "S3cret" not in logs.mask(text)


@given(words.filter(lambda word: len(word) >= 20), st.sampled_from(["hf_", "api_org_"]))
def test_no_hub_token_survives_anywhere(word: str, prefix: str) -> None:
    assert word not in logs.mask(f"cannot use token {prefix}{word}: refused")


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach http://127.0.0.1:8090/api/models/org/name/tree/main: refused",
        "see https://hub.example:443/a?",
        "fetching hf://org/name@main with hf_transfer and hf_hub_download",
        "model file:///srv/models@" + "a" * 64,
        "mail somebody@example.org about the basic authorization scheme",
        "is it ready? yes & no",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert logs.mask(text) == text


@given(st.text(max_size=60))
def test_masking_twice_changes_nothing_more(text: str) -> None:
    assert logs.mask(logs.mask(text)) == logs.mask(text)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The root logger is put back as it was."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


SECRET = "https://cdn.example/x?sig=abc"


def test_json_lines_carry_context_and_facts_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("info", "json")
    with logs.context(model="hf--org--name"), logs.context(job="j1"):
        logging.getLogger("nvcache.test").warning(
            "cannot fetch\n%s",
            SECRET,
            extra={"facts": {"size": 5, "url": SECRET, "deep": [{"u": (SECRET,)}], "level": "none", "error": ValueError(SECRET)}},
        )
    logging.getLogger("nvcache.test").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert "abc" not in line
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    hidden = "https://cdn.example/x?***"
    assert record == {
        "level": "warning",
        "logger": "nvcache.test",
        "message": f"cannot fetch\n{hidden}",
        "model": "hf--org--name",
        "job": "j1",
        "size": 5,
        "url": hidden,
        "deep": [{"u": [hidden]}],
        "error": hidden,
    }


@pytest.mark.parametrize("style", ["json", "console", "auto"])
def test_traces_hold_no_secret(capsys: pytest.CaptureFixture[str], style: str) -> None:
    logs.setup("info", style)
    try:
        int(SECRET)
    except ValueError:
        logging.getLogger("nvcache.test").exception("a defect")
    written = capsys.readouterr().err
    assert "ValueError" in written
    assert "abc" not in written


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("debug", "console")
    with logs.context(model="m"):
        logging.getLogger("nvcache.test").info("ready", extra={"facts": {"seconds": 1.5, "url": SECRET}})
    assert capsys.readouterr().err[8:] == " info    ready model=m seconds=1.5 url=https://cdn.example/x?***\n"
