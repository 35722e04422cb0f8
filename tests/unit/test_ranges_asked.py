"""What a range request asks for (RFC 9110 §13, §14)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.api.ranges import Span, asked

TAG = '"abc"'
WHOLE = Span(200, 0, 1000)


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", Span(206, 0, 1)),
        ("bytes=0-499", Span(206, 0, 500)),
        ("bytes=500-", Span(206, 500, 500)),
        ("bytes=-1", Span(206, 999, 1)),
        ("bytes=-5000", Span(206, 0, 1000)),
        ("bytes=999-5000", Span(206, 999, 1)),
        ("BYTES= 1-2 ", Span(206, 1, 2)),
        ("bytes=1000-", Span(416)),
        ("bytes=1000-1001", Span(416)),
        ("bytes=-0", Span(416)),
        ("bytes=5-4", WHOLE),
        ("bytes=-", WHOLE),
        ("bytes=a-b", WHOLE),
        ("bytes=0-1,5-6", WHOLE),
        ("lines=0-1", WHOLE),
        ("bytes=" + "9" * 30 + "-", WHOLE),
        ("", WHOLE),
    ],
)
def test_ranges(header: str, span: Span) -> None:
    assert asked({"range": header}, TAG, 1000) == span


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if-range": TAG, "range": "bytes=0-1"}, 206),
        ({"if-range": '"other"', "range": "bytes=0-1"}, 200),
        ({"if-range": f"W/{TAG}", "range": "bytes=0-1"}, 200),  # only a strong one will do
        ({"if-range": "Sat, 29 Oct 1994 19:43:31 GMT", "range": "bytes=0-1"}, 200),
        ({"if-none-match": TAG}, 304),
        ({"if-none-match": f'"x", W/{TAG}'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"x"', "range": "bytes=0-1"}, 206),
        ({"if-match": f'"x", {TAG}', "range": "bytes=0-1"}, 206),
        ({"if-match": "*"}, 200),
        ({"if-match": '"x"', "range": "bytes=0-1"}, 412),
        ({"if-match": f"W/{TAG}"}, 412),
    ],
)
def test_conditions(headers: dict[str, str], status: int) -> None:
    assert asked(headers, TAG, 1000).status == status


def test_an_empty_blob_has_no_range() -> None:
    assert asked({"range": "bytes=0-0"}, TAG, 0) == Span(416)
    assert asked({}, TAG, 0) == Span(200, 0, 0)
    assert Span(416).content_range(0) == "bytes */0"


@given(header=st.text() | st.from_regex(r"bytes=\d{0,4}-\d{0,4}", fullmatch=True), size=st.integers(0, 3000))
def test_whatever_is_asked_the_answer_lies_inside(header: str, size: int) -> None:
    span = asked({"range": header}, TAG, size)
    assert span.status in (200, 206, 416)
    assert 0 <= span.start <= span.start + span.length <= size
    assert (span.status == 206) <= (span.length > 0)
    if span.status == 206:
        assert span.content_range(size) == f"bytes {span.start}-{span.start + span.length - 1}/{size}"
