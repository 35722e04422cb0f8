"""What a status and its headers mean for the next try."""

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.retry import LAST_BACKOFF_S, Verdict, asked_to_wait, backoff, classify, rate_limit, retry_after

NOW = 1_767_225_600.0


@pytest.mark.parametrize(
    ("status", "redirected", "verdict"),
    [
        (429, False, Verdict.THROTTLE),
        (408, False, Verdict.TRANSIENT),
        (500, True, Verdict.TRANSIENT),
        (503, False, Verdict.TRANSIENT),
        (401, True, Verdict.RELOCATE),
        (403, True, Verdict.RELOCATE),
        (410, True, Verdict.RELOCATE),
        (401, False, Verdict.PERMANENT),
        (403, False, Verdict.PERMANENT),
        (404, True, Verdict.PERMANENT),
        (416, False, Verdict.PERMANENT),
    ],
)
def test_statuses(status, redirected, verdict):
    assert classify(status, redirected=redirected) is verdict


@given(st.integers(0, 999_999_999))
def test_retry_after_in_seconds(seconds):
    assert retry_after(f" {seconds} ", NOW) == seconds


@given(st.integers(-(10**6), 10**6))
def test_retry_after_as_a_date_is_never_negative(seconds):
    assert retry_after(formatdate(NOW + seconds, usegmt=True), NOW) == max(0, seconds)


@pytest.mark.parametrize("value", [None, "", "soon", "-3", "1.5", "9" * 30, "Thu, 99 Foo 2026 00:00:00 GMT", "٣"])
def test_unreadable_retry_after_says_nothing(value):
    assert retry_after(value, NOW) is None


@given(st.text())
def test_no_header_breaks_the_parsers(text):
    for wait in (retry_after(text, NOW), rate_limit(text, text)):
        assert wait is None or wait >= 0


@pytest.mark.parametrize(
    ("limit", "policy", "wait"),
    [
        ('"resolvers";r=0;t=172', None, 172),
        ('"resolvers";r=2998;t=172', None, None),
        ('"api";r=3;t=9, "resolvers";r=0;t=40, "pages";r=0;t=12', None, 40),
        ('"resolvers"; r=0 ; t=7', None, 7),
        ('"resolvers";r=0', '"fixed window";"resolvers";q=3000;w=300', 300),
        ('"resolvers";r=0', None, 0),
        ("", None, None),
        (None, None, None),
    ],
)
def test_rate_limit(limit, policy, wait):
    assert rate_limit(limit, policy) == wait


def test_the_longer_wish_counts_whatever_the_case_of_the_names():
    assert asked_to_wait({"RETRY-AFTER": "5", "ratelimit": '"resolvers";r=0;t=60'}, NOW) == 60
    assert asked_to_wait({"Retry-After": "5", "RateLimit": '"resolvers";r=1;t=60'}, NOW) == 5
    assert asked_to_wait({"Server": "x"}, NOW) is None


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_backoff_is_positive_bounded_and_grows(failures, fraction):
    wait = backoff(failures, fraction)
    assert 0.25 <= wait <= LAST_BACKOFF_S
    assert backoff(failures + 1, fraction) >= wait
    assert backoff(failures, 0) / 2 <= wait <= backoff(failures, 0)
