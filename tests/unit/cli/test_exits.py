"""Exit codes by cause: the table is whole, and commands use it."""

from __future__ import annotations

import pytest

from nvcache.cli.exits import EXIT_OF, MEANING, Exit, exit_of, worst
from nvcache.errors import Code
from tests.support.stub_daemon import problem


def test_every_code_has_an_exit_code_and_every_exit_code_a_meaning():
    assert set(EXIT_OF) == set(Code)
    assert set(MEANING) == set(Exit)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("bad-reference", 2),
        ("store-locked", 2),
        ("repository-not-found", 3),
        ("unknown-model", 3),
        ("gated", 4),
        ("bad-token", 4),
        ("source-stalled", 5),
        ("digest-mismatch", 6),
        ("too-large", 7),
        ("disk-full", 7),
        ("timeout", 8),
        ("daemon-unreachable", 9),
        ("leased", 10),
        ("ambiguous-revision", 10),
        ("disk-io", 11),
        ("cancelled", 130),
        ("a-code-of-a-later-version", 1),
    ],
)
def test_exit_codes_that_scripts_rely_on(code, expected):
    assert exit_of(code) == expected


def test_the_worst_of_several_is_what_needs_a_person():
    assert worst([Exit.OK, Exit.TIMEOUT, Exit.SOURCE]) is Exit.SOURCE
    assert worst([Exit.SOURCE, Exit.INTEGRITY, Exit.SPACE]) is Exit.INTEGRITY
    assert worst([Exit.OK, Exit.OK]) is Exit.OK
    assert worst([]) is Exit.OK
    for one in Exit:
        assert worst([Exit.OK, one]) is one


@pytest.mark.parametrize("code", [code for code in Code if EXIT_OF[code] is not Exit.OK])
def test_a_problem_of_the_daemon_becomes_message_hint_and_exit_code(stub, run, code):
    stub.answer("GET /v1/models", (503, problem(str(code), "cannot list models: for the test", hint="do this")))
    ran = run("ls")
    assert ran.code == EXIT_OF[code]
    assert ran.err.splitlines() == ["nvcache: cannot list models: for the test", "hint: do this"]
    assert ran.out == ""
