"""Durable writes, preallocation, direct I/O and the mapping of errors, on real files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from nvcache.errors import Code, DiskError, NvcacheError, SpaceError
from nvcache.store import files


def test_a_durable_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    files.durable_write(target, b"one")
    before = target.stat().st_ino
    files.durable_write(target, b"two", 0o600)
    assert target.read_bytes() == b"two"
    assert target.stat().st_ino != before
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_durable_write_ignores_the_umask_and_uses_the_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    old = os.umask(0o077)
    try:
        files.durable_write(tmp_path / "x", b"1", temp=tmp_path / "tmp")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644
    assert os.listdir(tmp_path / "tmp") == []


def test_a_durable_write_that_cannot_rename_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "full").touch()
    with pytest.raises(DiskError, match="cannot write"):
        files.durable_write(tmp_path / "x", b"1")
    assert os.listdir(tmp_path) == ["x"]


def test_a_durable_write_replaces_a_symlink_instead_of_following_it(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x").symlink_to("victim")
    files.durable_write(tmp_path / "x", b"new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, SpaceError, Code.DISK_FULL),
        (errno.EDQUOT, SpaceError, Code.DISK_FULL),
        (errno.EIO, DiskError, Code.DISK_IO),
        (errno.ENODATA, DiskError, Code.DISK_IO),
        (errno.EROFS, DiskError, Code.DISK_IO),
    ],
)
def test_errors_are_mapped(number: int, kind: type[NvcacheError], code: Code) -> None:
    with pytest.raises(kind, match=r"^cannot write the thing: ") as caught, files.disk_errors("write the thing"):
        raise OSError(number, os.strerror(number))
    assert caught.value.code is code


def test_preallocation_takes_the_space(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        files.preallocate(file.fileno(), 10 * 2**20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 10 * 2**20
        assert os.fstat(file.fileno()).st_size == 10 * 2**20


def test_what_never_fits_is_refused_with_numbers_and_the_space_given_back(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        with pytest.raises(SpaceError, match=r"cannot reserve 1,152,921,504,606,846,976 bytes: the file system has [\d,]+ bytes free") as caught:
            files.preallocate(file.fileno(), 2**60)
        assert caught.value.facts["need"] == 2**60
        assert os.fstat(file.fileno()).st_blocks == 0


def test_a_directory_gets_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        files.make_dir(tmp_path / "d", 0o755)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o755
    files.make_dir(tmp_path / "d", 0o700)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700


def test_reading_at_an_offset_fills_the_buffer_or_fails(tmp_path: Path) -> None:
    data = os.urandom(3 * files.BLOCK + 100)
    (tmp_path / "x").write_bytes(data)
    buffer = memoryview(files.aligned_buffer(2 * files.BLOCK))
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        assert files.set_direct(fd, True)
        files.read_at(fd, 2 * files.BLOCK, buffer, files.BLOCK + 100)
        assert buffer[: files.BLOCK + 100] == data[2 * files.BLOCK :]
        with pytest.raises(OSError, match="ends too early") as caught:
            files.read_at(fd, 2 * files.BLOCK, buffer, files.BLOCK + 101)
        assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)


def test_reading_falls_back_when_direct_io_is_refused(tmp_path: Path) -> None:
    data = os.urandom(files.BLOCK)
    (tmp_path / "x").write_bytes(data)
    crooked = memoryview(files.aligned_buffer(2 * files.BLOCK))[1 : files.BLOCK + 1]  # not on a page: the kernel says EINVAL
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        files.set_direct(fd, True)
        files.read_at(fd, 0, crooked, files.BLOCK)
    finally:
        os.close(fd)
    assert bytes(crooked) == data
