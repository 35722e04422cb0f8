"""Runs `bench.many` and `bench.clients` at their smallest: that they still run and that their results can be shown. It judges no figure."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import clients, many, report_clients, report_many


def test_the_smallest_store_of_many_models(tmp_path: Path) -> None:
    """Every question is asked of every kind of start, and the table and the plot have them all."""
    small = ["--models", "3", "--files", "8", "--rounds", "1", "--asked", "2", "--commands", "1"]
    many.main([*small, "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "many.json").read_text())
    assert (result["models"], result["files"]) == (3, 8)
    assert set(result["ready"]) == ({"warm", "cold"} if os.access(many.CACHES, os.W_OK) else {"warm"})
    assert {found["asked"] for found in result["answers"].values()} == {2}
    assert {name.split()[1] for name in result["commands"]} == {"ls", "path"}
    assert all(parts["daemon"]["median"] > 0 for parts in result["memory"].values())
    shown = [row[0] for row in report_many.table(result).rows]
    assert all(any(name in row for row in shown) for name in (*result["answers"], *result["commands"]))
    report_many.plot(result, tmp_path / "many")
    assert (tmp_path / "many.svg").stat().st_size > 0


def test_the_smallest_crowd(tmp_path: Path) -> None:
    """Every client says what it was answered, in both turns, and nothing but ready."""
    small = ["--size", "200MB", "--clients", "4", "--rate", "20", "--seconds", "2"]
    clients.main([*small, "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "clients.json").read_text())
    assert list(result["turns"]) == list(clients.TURNS)
    for turn in result["turns"].values():
        assert turn["errors"] == 0, turn["first_errors"]
        assert turn["all"]["answers"] == sum(found["answers"] for found in turn["kinds"].values()) > 0
        assert turn["fills"] > 0
    assert [row[0].rpartition(": ")[2] for row in report_clients.table(result).rows].count("all") == 2
    report_clients.plot(result, tmp_path / "clients")
    assert (tmp_path / "clients.svg").stat().st_size > 0


@pytest.mark.parametrize("words", [["--models", "0"], ["--rounds", "-1"], ["--files", "many"]])
def test_what_is_no_number_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """In a line, before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        many.main(words)
    assert ended.value.code == 2
    assert "is not a whole number from 1" in capsys.readouterr().err
