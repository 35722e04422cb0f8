"""Re-verification finds exactly the bad chunks and leaves the page cache as it was."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from nvcache.errors import DiskError
from nvcache.store import scrub
from nvcache.store.files import aligned_buffer
from nvcache.store.pagecache import resident
from nvcache.store.scrub import check_chunks, digest_blob
from tests.unit.store.helpers import CHUNK, chunk_digests, noise, sha256

SIZE = 5 * CHUNK + 99
DATA = noise(SIZE)
PAGES = -(-SIZE // mmap.PAGESIZE)
BOTH = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


def check(path: Path, *, direct: bool = True, size: int = SIZE, stop_after: int = 99) -> tuple[list[int], list[int]]:
    """The bad chunks, and those looked at."""
    seen: list[int] = []
    with aligned_buffer(CHUNK) as memory, memoryview(memory) as buffer:
        found = check_chunks(
            path,
            size,
            chunk_digests(DATA[:size]),
            chunk_size=CHUNK,
            buffer=buffer,
            stop=lambda: len(seen) >= stop_after,
            direct=direct,
            on_chunk=lambda index, _: seen.append(index),
        )
    return found.bad, seen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


@BOTH
def test_a_sound_file_is_sound(path: Path, direct: bool) -> None:
    assert check(path, direct=direct) == ([], [0, 1, 2, 3, 4, 5])


@BOTH
@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, SIZE - 1])
def test_one_flipped_bit_is_one_bad_chunk(path: Path, direct: bool, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([DATA[at] ^ 4]))
    assert check(path, direct=direct)[0] == [at // CHUNK]


@BOTH
def test_a_truncated_file_is_bad_from_there(path: Path, direct: bool) -> None:
    os.truncate(path, 3 * CHUNK + 1)
    assert check(path, direct=direct)[0] == [3, 4, 5]


def test_a_missing_file_is_bad_as_a_whole(tmp_path: Path) -> None:
    assert check(tmp_path / "gone") == ([0, 1, 2, 3, 4, 5], [])


def test_a_symlink_is_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(DiskError, match="cannot verify link"):
        check(tmp_path / "link")


@BOTH
def test_a_part_is_read_alone(path: Path, direct: bool) -> None:
    with path.open("r+b") as file:
        for at in (CHUNK, 3 * CHUNK):
            file.seek(at)
            file.write(bytes([DATA[at] ^ 4]))
    seen: list[int] = []
    part = chunk_digests(DATA)[2 * 8 : 4 * 8]
    with aligned_buffer(CHUNK) as memory, memoryview(memory) as buffer:
        found = check_chunks(
            path,
            SIZE,
            part,
            first=2,
            chunk_size=CHUNK,
            buffer=buffer,
            stop=lambda: False,
            direct=direct,
            on_chunk=lambda index, _: seen.append(index),
        )
    assert (found.bad, seen) == ([3], [2, 3])


@BOTH
@pytest.mark.parametrize("warm", [set(), {0, 2, 5}, set(range(6))], ids=["cold", "some", "all"])
def test_no_page_comes_or_goes(path: Path, direct: bool, warm: set[int]) -> None:
    """Chunks that were in memory stay there, and no other comes."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(file.fileno(), 0, SIZE) != bytes(PAGES):
            pytest.skip("this file system is page cache")
        for index in warm:
            os.pread(file.fileno(), CHUNK, index * CHUNK)
        before = resident(file.fileno(), 0, SIZE)
        assert before is not None
        assert before.count(1) == sum(-(-min(CHUNK, SIZE - index * CHUNK) // mmap.PAGESIZE) for index in warm)
        assert check(path, direct=direct)[0] == []
        assert resident(file.fileno(), 0, SIZE) == before


def test_it_stops_when_told(path: Path) -> None:
    path.write_bytes(bytes(SIZE))
    assert check(path, stop_after=2) == ([0, 1], [0, 1])


def test_an_empty_file_has_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert check(tmp_path / "empty", size=0) == ([], [])


@BOTH
def test_digests_are_taken(path: Path, direct: bool) -> None:
    done: list[int] = []
    found = digest_blob(path, SIZE, chunk_size=CHUNK, stop=lambda: False, direct=direct, on_chunk=done.append)
    assert found == (sha256(DATA), chunk_digests(DATA))
    assert done == [CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK, 5 * CHUNK, SIZE]
    assert digest_blob(path, SIZE, chunk_size=CHUNK, stop=lambda: True, direct=direct, on_chunk=done.append) is None


def test_digests_of_a_file_that_is_too_short_or_empty(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot read blob"):
        digest_blob(path, SIZE + 1, chunk_size=CHUNK, stop=lambda: False, on_chunk=lambda _: None)
    (tmp_path / "empty").touch()
    assert digest_blob(tmp_path / "empty", 0, stop=lambda: False, on_chunk=lambda _: None) == (sha256(b""), b"")


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no memory"), OSError(errno.ENODEV, "no mapping"), ValueError("cut short")])
def test_that_residency_cannot_be_told_says_nothing_about_the_bytes(path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(scrub, "resident", fails)
    assert check(path)[0] == []


def test_a_machine_that_is_short_of_memory_makes_no_chunk_bad(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(scrub, "read_at", short)
    with pytest.raises(DiskError) as raised:
        check(path)
    assert raised.value.facts["errno"] == "ENOMEM"
