"""Prefetching really fills the page cache, in order, within its budget."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.client import pagecache
from nvcache.client.pagecache import PIECE, prefetch, resident

SIZE = 24 * 2**20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory on a disk: a RAM file system has no page cache to fill."""
    path = Path(tempfile.mkdtemp(prefix="nv-cache-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


def cold_file(path: Path, size: int = SIZE) -> Path:
    """A file whose pages are not in the page cache."""
    path.write_bytes(os.urandom(2**20) * (size // 2**20) + b"x" * (size % 2**20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb") as file:
        assert resident(file.fileno(), 0, size) == 0.0
    return path


def pages_missing(path: Path) -> int:
    """How many pages of the file are not in the page cache."""
    with path.open("rb") as file:
        return sum(resident(file.fileno(), point, 1) == 0.0 for point in range(0, os.fstat(file.fileno()).st_size, 4096))


def test_every_page_is_there_afterwards(folder: Path) -> None:
    path = cold_file(folder / "model.safetensors", SIZE + 5)
    report = prefetch(path, threads=2)
    assert pages_missing(path) == 0
    assert (report.files, report.bytes, report.left_out) == (1, SIZE + 5, 0)
    assert report.read + report.already_cached == SIZE + 5
    assert report.read > 0.9 * SIZE
    assert report.rate > 0


def test_what_is_there_is_not_read_again(folder: Path) -> None:
    path = cold_file(folder / "model.safetensors")
    prefetch(path)
    again = prefetch(path)
    assert (again.already_cached, again.read) == (SIZE, 0)


def test_a_directory_with_links_and_empty_files(folder: Path) -> None:
    cold_file(folder / "a.safetensors")
    (folder / "sub").mkdir()
    (folder / "sub" / "empty").touch()
    (folder / "config.json").write_text("{}")
    report = prefetch(folder)
    assert (report.files, report.bytes) == (3, SIZE + 2)
    assert pages_missing(folder / "a.safetensors") == 0


def test_the_limit_is_kept(folder: Path) -> None:
    path = cold_file(folder / "x.bin")
    report = prefetch(path, limit_bytes=2**20)
    assert report.read == 0  # the piece is larger than the limit
    assert report.left_out + report.already_cached == SIZE
    assert prefetch(path, limit_bytes=PIECE).left_out == 0


def test_no_memory_means_nothing_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "x.bin")
    monkeypatch.setattr(pagecache, "available", lambda: 0)
    assert prefetch(path).read == 0


def test_shards_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    for name in ("layer-10.bin", "layer-2.bin", "b.safetensors", "a.safetensors", "unlisted.safetensors"):
        (tmp_path / name).touch()
    index = {
        "weight_map": {"w1": "b.safetensors", "w2": "a.safetensors", "w3": "b.safetensors", "w4": "missing.safetensors", "w5": "../../etc/passwd"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    names = [path.name for path in pagecache._in_order(tmp_path)]
    assert names == ["b.safetensors", "a.safetensors", "layer-2.bin", "layer-10.bin", "model.safetensors.index.json", "unlisted.safetensors"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 7}}'])
def test_a_broken_index_only_loses_the_order(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert prefetch(tmp_path).files == 2


def test_a_missing_file_and_no_threads_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prefetch(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 threads"):
        prefetch(tmp_path, threads=0)
