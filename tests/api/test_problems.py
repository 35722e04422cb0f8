"""The table from codes to HTTP statuses is whole, and a problem document says what RFC 9457 and docs/errors.md promise."""

from __future__ import annotations

import json

import pytest

from nvcache.api import problems
from nvcache.engine.status import ErrorInfo
from nvcache.errors import FACTS, Code, SourceError


def test_every_code_has_a_status_and_facts() -> None:
    assert set(problems.STATUS) == set(Code)
    assert set(FACTS) == set(Code)
    assert all(400 <= status < 600 for status in problems.STATUS.values())


@pytest.mark.parametrize("code", list(Code))
def test_every_code_makes_a_whole_document(code: Code) -> None:
    response = problems.reply(problems.plain(code, "cannot do it: a test"))
    document = json.loads(response.body)
    assert response.media_type == "application/problem+json"
    assert document == {
        "type": f"urn:nvcache:error:{code}",
        "title": FACTS[code].meaning,
        "status": response.status_code,
        "detail": "cannot do it: a test",
        "code": code,
        "hint": FACTS[code].hint,
        "retryable": FACTS[code].retryable,
        "retry_after_s": None,
    }


def test_facts_are_members_but_never_replace_the_documents_own() -> None:
    error = SourceError(Code.SOURCE_BUSY, "cannot list: busy", retry_after_s=2.1, facts={"origin": "https://hub", "status": 429, "code": "other"})
    response = problems.reply(ErrorInfo.of(error))
    document = json.loads(response.body)
    assert (document["origin"], document["status"], document["code"]) == ("https://hub", 503, "source-busy")
    assert document["retry_after_s"] == 2.1
    assert response.headers["retry-after"] == "3"


def test_a_missing_token_is_asked_for() -> None:
    response = problems.reply(problems.plain(Code.UNAUTHORIZED, "cannot GET /: no token"))
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
