"""Errors: every code is explained and used, and every message in the source is of one form."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvcache
from nvcache import errors
from nvcache.errors import FACTS, Code, NvcacheError

SOURCE = Path(nvcache.__file__).parent
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, NvcacheError)}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every place in the source where one of our errors is made."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if name in CLASSES:
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def opening(node: ast.expr) -> str | None:
    """How a message begins, where it is written out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr) and node.values:
        return opening(node.values[0])
    return None


def test_every_code_is_explained() -> None:
    assert set(FACTS) == set(Code)
    for code, facts in FACTS.items():
        assert code == code.lower().replace("_", "-")
        for text in (facts.meaning, facts.hint):
            assert text, code
            assert not text.endswith("."), code
            assert text[0] in "`/" or text[0].islower() or text.split()[0].isupper(), code


def test_messages_begin_with_what_cannot_be_done() -> None:
    found = [(where, opening(call.args[1])) for where, call in calls() if len(call.args) > 1]
    assert len(found) > 30
    assert [(where, text) for where, text in found if text is not None and not text.startswith("cannot ")] == []


def test_no_message_is_a_full_stop_sentence() -> None:
    ends = [(where, call.args[1]) for where, call in calls() if len(call.args) > 1]
    assert [where for where, node in ends if isinstance(node, ast.Constant) and str(node.value).endswith(".")] == []


@pytest.mark.parametrize("code", Code)
def test_an_error_knows_its_hint_and_whether_to_ask_again(code: Code) -> None:
    error = NvcacheError(code, "cannot do it: why")
    assert (str(error), error.hint, error.retryable) == ("cannot do it: why", FACTS[code].hint, FACTS[code].retryable)
    other = NvcacheError(code, "cannot", hint="do this", retryable=not error.retryable, retry_after_s=3, facts={"a": 1})
    assert (other.hint, other.retryable, other.retry_after_s, other.facts) == ("do this", not error.retryable, 3, {"a": 1})
