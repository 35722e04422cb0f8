"""How sizes, times and tables look."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from nvcache.cli import output


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (90_868_376, "90.9 MB"),
        (999_949_999, "999.9 MB"),
        (999_999_999, "1.0 GB"),
        (3.2e15, "3200.0 TB"),
    ],
)
def test_sizes_are_decimal_and_never_show_a_thousand_of_a_unit(count, text):
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3600, "1:00:00 h"), (7385, "2:03:05 h")],
)
def test_durations(seconds, text):
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (None, "-"),
        ("2025-01-02T00:00:00Z", "just now"),
        ("2025-01-02T00:00:05Z", "just now"),  # a clock that is ahead
        ("2025-01-01T23:55:00.000Z", "5 min ago"),
        ("2025-01-01T20:00:00Z", "4 h ago"),
        ("2024-12-30T00:00:00Z", "3 d ago"),
    ],
)
def test_ages(moment, text):
    assert output.ago(moment, datetime(2025, 1, 2, tzinfo=UTC)) == text


def test_a_table_in_a_pipe_is_never_cut_and_knows_no_markup(capsys):
    name = "hf://org/" + "x" * 300 + "[red]"
    output.table(["MODEL", "SIZE"], [(name, "1.0 GB")], right=["SIZE"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split() == ["MODEL", "SIZE"]
    assert lines[1].split() == [name, "1.0", "GB"]


def test_json_keeps_letters_and_one_line_mode(capsys):
    output.as_json({"ref": "ä"}, line=True)
    assert capsys.readouterr().out == '{"ref": "ä"}\n'
    output.as_json({"a": [1]})
    assert json.loads(capsys.readouterr().out) == {"a": [1]}


def test_progress_phrases():
    progress = {"bytes_total": 200, "bytes_done": 199, "rate": 1e9, "eta_s": 40.0}
    assert output.percent(progress) == 99
    assert output.going(progress) == "99% at 1.0 GB/s, 40 s left"
    assert output.going({**progress, "rate": 0.0, "eta_s": None}) == "99%"
    assert output.going(None) == ""
    assert output.going({**progress, "bytes_total": 0}) == ""
