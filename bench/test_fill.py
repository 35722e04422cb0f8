"""Runs `bench.fill` at its smallest, once for each kind of origin: that it still runs and that its result can be shown. It judges no figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.fill import main, names_of
from bench.report_fill import table


@pytest.mark.parametrize(
    ("source", "choice", "stem", "origin"),
    [
        ("hub", ["--http"], "fill-http", "nginx"),
        ("azure", ["--origin", "nginx", "--tls"], "fill-azure-nginx-tls", "nginx"),
        ("azure", ["--origin", "azurite"], "fill-azure-azurite-http", "Azurite"),
    ],
)
def test_the_smallest_run(source: str, choice: list[str], stem: str, origin: str, tmp_path: Path) -> None:
    """Every row leaves the origin's bytes (the bench checks that itself), and the table has a line for each."""
    main(["--source", source, *choice, "--size", "2MB", "--rounds", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert (result["origin"], list(result["rows"])) == (origin, list(names_of(source)))
    assert set(result["ratios"]) == set(result["rows"]) - {"nvcache"}
    assert [row[0] for row in table(result).rows] == list(names_of(source))
