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
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.97, "10 s"), (10, "10 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3600, "1:00:00 h"), (7385, "2:03:05 h")],
)
def test_durations(seconds, text):
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (None, "-"),
        ("2025-01-02T00:00:00Z", "just now"),
        ("2025-01-02T00:00:05Z", "just now"),  # a clock that is ahead
        ("2025-01-02T00:00:40Z", "in 40 s"),
        ("2025-01-02T00:09:59.500Z", "in 9 min"),
        ("2025-01-03T02:00:00Z", "in 1 d"),
        ("2025-01-01T23:55:00.000Z", "5 min ago"),
        ("2025-01-01T20:00:00Z", "4 h ago"),
        ("2024-12-30T00:00:00Z", "3 d ago"),
    ],
)
def test_ages(moment, text):
    assert output.ago(moment, datetime(2025, 1, 2, tzinfo=UTC)) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s left"), (9.4, "9 s left"), (10.2, "10 s left"), (185, "3:05 min left")])
def test_what_remains(seconds, text):
    assert output.left(seconds) == text


def test_counts_and_moments():
    assert [output.count(number, "file") for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert output.moment(None) == "-"
    assert output.moment("2025-01-02T03:04:05.999+02:00").startswith("2025-01-02T01:04:05Z (")


def test_a_table_in_a_pipe_is_never_cut_and_knows_no_markup(capsys):
    name = "hf://org/" + "x" * 300 + "[red]"
    output.table(["MODEL", "SIZE"], [(name, "1.0 GB")], right=["SIZE"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split() == ["MODEL", "SIZE"]
    assert lines[1].split() == [name, "1.0", "GB"]


def test_columns_in_a_pipe_stand_below_each_other(capsys):
    output.table(
        ["MODEL", "SIZE", "PIN"], [("a", "1.0 GB", ""), ("模型", "10.0 GB", "pinned"), ("e\u0301", output.state("ready"), "")], right=["SIZE"]
    )
    assert capsys.readouterr().out == "MODEL     SIZE  PIN\na       1.0 GB\n模型   10.0 GB  pinned\ne\u0301        ready\n"


def test_json_keeps_letters_and_one_line_mode(capsys):
    output.as_json({"ref": "ä"}, line=True)
    assert capsys.readouterr().out == '{"ref": "ä"}\n'
    output.as_json({"a": [1]})
    assert json.loads(capsys.readouterr().out) == {"a": [1]}


def test_what_would_fool_a_terminal_is_escaped(capsys):
    name = "a\x1b[2J\x9b31m\u202eb\u2028c\nd\udcff é 模"
    output.table(["FILE"], [(name,)])
    assert capsys.readouterr().out.splitlines()[1] == r"a\u001b[2J\u009b31m\u202eb\u2028c\u000ad\udcff é 模"
    output.fields([("warning", name)])
    assert capsys.readouterr().out == r"warning  a\u001b[2J\u009b31m\u202eb\u2028c\u000ad\udcff é 模" + "\n"
    output.as_json({"path": name})
    out = capsys.readouterr().out
    assert json.loads(out) == {"path": name}
    assert not set(out) & set("\x1b\x9b\u202e\u2028\udcff")
    output.complain(name.replace("\n", ""), None)
    assert capsys.readouterr().err.startswith(r"nvcache: a\u001b[2J\u009b31m\u202eb")


def test_progress_phrases():
    progress = {"bytes_total": 200, "bytes_done": 199, "rate": 1e9, "eta_s": 40.0}
    assert output.percent(progress) == 99
    assert output.going(progress) == "99% at 1.0 GB/s, 40 s left"
    assert output.going({**progress, "rate": 0.0, "eta_s": None}) == "99%"
    assert output.going(None) == ""
    assert output.going({**progress, "bytes_total": 0}) == ""
