"""Runs `bench.cold_start` at its smallest: every row loads the model, the source away where it must be, and leaves nothing. It judges no figure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cold_start import PARTS, ROWS, main
from bench.measure import MeasureError
from bench.outage import kill, refused
from bench.report_cold_start import plot, table


def test_the_smallest_run(tmp_path: Path) -> None:
    """Every row loads the same bytes (the bench checks that, and the source, after each run); afterwards no process and no copy is left."""
    disk, os_disk = tmp_path / "disk", tmp_path / "os"
    places = ["--work", str(tmp_path / "work"), "--store", str(disk), "--os-disk", str(os_disk), "--out", str(tmp_path)]
    main(["--size", "2MB", "--rounds", "1", *places])
    assert using(tmp_path) == []
    assert [*disk.iterdir(), *os_disk.iterdir()] == []
    result = json.loads((tmp_path / "cold-start.json").read_text())
    assert {name: row["source"] for name, row in result["rows"].items()} == {
        "nvcache": "away",
        "nvcache, only the pod": "away",
        "hf download + load": "there",
        "load from the OS disk": "away",
    }
    assert set(result["ratios"]) == {row.name for row in ROWS[1:]}
    for row in result["rows"].values():
        assert list(row["median_run"]) == list(PARTS)
        assert sum(row["median_run"].values()) == pytest.approx(row["total"]["median"])
        assert min(row["median_run"].values()) >= 0
        assert row["core_seconds"]["min"] > 0
        assert row["peak_pss"] > 50 * 10**6  # torch alone takes more
    assert [row[0] for row in table(result).rows] == list(result["rows"])
    plot(result, tmp_path / "cold-start")
    assert (tmp_path / "cold-start.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "cold-start.svg").read_text().count("<!-- model there -->") == 1


def test_a_source_that_answers_ends_the_bench() -> None:
    """What listens is seen; when it has gone, that is seen too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MeasureError, match="takes connections"):
            refused(url)
    refused(url)


def test_a_kill_waits_for_descendants(tmp_path: Path) -> None:
    """A child of the killed process that ends by itself, when its standard input ends, is waited for."""
    parent = [sys.executable, "-c", "import subprocess as s; c = s.Popen(['cat'], stdin=s.PIPE); print(flush=True); c.wait()"]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, env={"HOME": str(tmp_path)}) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has its child
        assert len(using(tmp_path)) == 2
        kill(process.pid)
        process.wait(10)
    assert using(tmp_path) == []


def using(directory: Path) -> list[str]:
    """The living processes whose arguments or environment name `directory`; everything that the bench starts has its home or its files there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            named = (process / "cmdline").read_text(errors="replace") + (process / "environ").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended, or is another user's
        if str(directory) in named:
            found.append(f"{process.name}: {named}")
    return found
