"""Runs the benches in a virtual machine at their smallest: every row runs there and the results can be shown. It judges no figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import load_vm, report_load_vm, report_sweep, sweep
from bench.loaders import ROWS

pytestmark = pytest.mark.slow


def test_loading(tmp_path: Path) -> None:
    """Every row gives the same bytes (the bench checks that itself) from the OS disk and from stripes."""
    load_vm.main(["--size", "32MB", "--most", "2", "--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "load-vm.json").read_text())
    assert result["left_out"] == {}
    assert {place: set(rows) for place, rows in result["places"].items()} == {place: {*ROWS, "fio"} for place in ("OS disk", "1", "2")}
    assert {row[0] for row in report_load_vm.table(result).rows} == {*ROWS, "fio"}
    report_load_vm.plot(result, tmp_path / "load-vm")
    assert (tmp_path / "load-vm.svg").stat().st_size > 10000


def test_sweeping(tmp_path: Path) -> None:
    """Each array is read in both ways at each read-ahead, the defaults' among them."""
    sweep.main(["--size", "16MiB", "--chunks", "64KiB", "--read-aheads", "128KiB", "--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "sweep.json").read_text())
    defaults = result["defaults"]
    assert [(row["filesystem"], row["chunk"]) for row in result["rows"]] == [
        (kind, chunk) for chunk in (65536, defaults["chunk"]) for kind in ("xfs", "ext4")
    ]
    assert result["read_aheads"] == [131072, defaults["read_ahead"]]
    assert all(len(row[reader]) == 2 for row in result["rows"] for reader in report_sweep.READERS)
    shown = report_sweep.table(result).rows
    assert len(shown) == 8
    assert sum("**" in cell for row in shown for cell in row) == 2
    report_sweep.plot(result, tmp_path / "sweep")
    assert (tmp_path / "sweep.svg").stat().st_size > 10000
