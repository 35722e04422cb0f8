"""Runs `bench.load` at its smallest: that every loader still loads, that its result can be shown, and that what it cannot trust ends it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bench.cold import TRACE, cached, drop, warm
from bench.load import copies, main, measure
from bench.load_run import CHECKOUT
from bench.loaders import ROWS, Load, files_of
from bench.measure import MeasureError
from bench.report_load import CASES, LIMIT, plot, table
from tests.support.models import make_llama

SIZE = 2 * 10**6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model in two shards."""
    make_llama(tmp_path / "model", SIZE, 2)
    return tmp_path / "model"


def test_every_loader_gives_the_same_tensors(model: Path) -> None:
    """Each is there (`make setup` installs them), in a process of its own as in the bench, and says nothing but its result."""
    argv = [sys.executable, "-m", "bench.loaders"]
    said = [subprocess.run([*argv, row, str(model)], cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=True) for row in ROWS]
    loads = [Load(**json.loads(done.stdout)) for done in said]
    assert [load.row for load in loads] == list(ROWS)
    assert len({(load.checksum, load.bytes, load.tensors) for load in loads}) == 1
    header = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files_of(model))
    assert loads[0].bytes == sum(file.stat().st_size for file in files_of(model)) - header
    assert [done.stderr for done in said] == [""] * len(ROWS)


def test_the_smallest_run(tmp_path: Path) -> None:
    """Every case of a row is measured and shown."""
    rows = ("nvcache", "read", LIMIT)
    main(["--size", str(SIZE), "--rounds", "1", "--rows", ",".join(rows), "--work", str(tmp_path), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "load.json").read_text())
    (path,) = result["paths"].values()
    assert {name: tuple(row) for name, row in path["rows"].items()} == {"nvcache": CASES, "read": CASES, LIMIT: ("cold",)}
    assert list(path["ratios"]) == ["read"]
    assert path["of_limit"]["median"] > 0
    assert set(result["peak_pss"]) == {"nvcache", "read"}
    assert [row[0].rpartition(": ")[2] for row in table(result).rows] == list(rows)
    plot(result, tmp_path / "load")
    assert (tmp_path / "load.png").stat().st_size > 0
    assert (tmp_path / "load.svg").stat().st_size > 0


def test_two_paths(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a copy of the model while it is measured, and nothing afterwards. --json prints the result and nothing else."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    named = [word for path in paths for word in ("--path", str(path))]
    main([*named, "--model", str(model), "--rounds", "2", "--rows", "read,fio", "--work", str(tmp_path), "--out", str(tmp_path), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "load.json").read_text())
    assert list(result["paths"]) == [str(path) for path in paths]
    assert result["bytes"] == sum(file.stat().st_size for file in files_of(model))
    assert [*paths[0].iterdir(), *paths[1].iterdir()] == []
    assert len(table(result).rows) == 4


def test_a_flipped_byte_ends_the_run(model: Path, tmp_path: Path) -> None:
    """One byte of one tensor differs on one of two paths."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with copies(model, [tmp_path / "a", tmp_path / "b"]) as models:
        with files_of(models[str(tmp_path / "b")])[-1].open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        with pytest.raises(MeasureError, match=r"the tensors of read from \S+/b, cold have checksum"):
            measure(models, ["read"], 1, tmp_path)


def test_a_loader_that_fails_ends_the_run(model: Path, tmp_path: Path) -> None:
    """The error names the loader and has what it said."""
    file = files_of(model)[0]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(MeasureError, match=r"(?s)cannot load \S+ by read: .*it ends within"):
        measure({"here": model}, ["read"], 1, tmp_path)


def test_a_missing_package_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The row is left out; what is left is measured."""
    monkeypatch.setitem(ROWS["runai"].packages, "no_such_module", "its-package")
    main(["--model", str(model), "--rounds", "1", "--rows", "read,runai", "--work", str(tmp_path), "--out", str(tmp_path)])
    assert "runai is left out: pip install its-package\n" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "load.json").read_text())["peak_pss"]) == ["read"]


def test_drop_really_drops(model: Path) -> None:
    """The kernel itself, asked another way, finds the first page of each file missing; `warm` brings every page back."""
    warm(model)
    assert cached(model) > 1 - TRACE
    drop(model)
    for path in files_of(model):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            with pytest.raises(BlockingIOError):
                os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
    warm(model)
    assert cached(model) > 1 - TRACE


def test_what_cannot_be_dropped_is_said(model: Path) -> None:
    """Pages that a process maps stay in the page cache."""
    with files_of(model)[0].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert sum(mapping[:: mmap.PAGESIZE]) >= 0
        with pytest.raises(MeasureError, match="stays in the page cache"):
            drop(model)
    drop(model)


def test_the_kernel_is_not_asked_about_files_of_others() -> None:
    """It would call every page of them resident."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        Path(place, "file").write_bytes(b"x")
        os.seteuid(65534)
        try:
            with pytest.raises(MeasureError, match="belongs to another user"):
                cached(Path(place))
        finally:
            os.seteuid(0)
