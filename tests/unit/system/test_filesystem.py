"""Refusals to make a file system, users of a device, and what must not be fatal. Real file systems are made in tests/integration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from nvcache.errors import Code, DiskError
from nvcache.system import filesystem
from nvcache.system.run import Tools
from tests.support.recorded import build

PROC = Path("/proc")


def test_nothing_is_made_where_nothing_can_be_seen(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="ENOENT") as found:
        filesystem.make(Tools(), str(tmp_path / "gone"), "ext4", striped=False)
    assert found.value.code is Code.DISKS_REFUSED


def test_a_search_that_hangs_tells_what_it_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The map of the second process is a FIFO: reading it does not end, as with a process whose memory cannot be looked at."""
    for pid in ("10", "20"):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(f"user{pid}\n")
    (tmp_path / "10/maps").write_text("7f00-7f01 r--p 00000000 08:1f 12 /data/file\n")
    os.mkfifo(tmp_path / "20/maps")
    begun = monotonic()
    with caplog.at_level(logging.WARNING):
        assert filesystem.holders(tmp_path, "8:31", seconds=0.3) == ["10 user10"]
    assert monotonic() - begun < 30
    assert "no answer" in caplog.text
    os.close(os.open(tmp_path / "20/maps", os.O_WRONLY))


def test_at_most_ten_are_named(tmp_path: Path) -> None:
    for pid in range(1, 30):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "maps").write_text("7f00-7f01 r--p 00000000 08:1f 12 /data/file\n")
    assert filesystem.holders(tmp_path, "8:31") == [f"{pid} ?" for pid in range(1, 11)]


def program(folder: Path, name: str, text: str) -> Tools:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return Tools(f"{folder}:/usr/bin:/bin")


def test_a_module_that_cannot_be_loaded_is_not_fatal(tmp_path: Path) -> None:
    filesystem.modprobe(Tools("/nowhere"), "raid0")
    filesystem.modprobe(program(tmp_path, "modprobe", "echo FATAL >&2; exit 1"), "raid0")
    filesystem.modprobe(program(tmp_path, "modprobe", f"echo $* > {tmp_path}/calls"), "raid0")
    assert (tmp_path / "calls").read_text() == "raid0\n"


def test_settling(tmp_path: Path) -> None:
    kernel = build(tmp_path, {})
    tools = program(tmp_path, "udevadm", f"echo $* >> {tmp_path}/calls; exit 1")
    filesystem.settle(tools, kernel)
    assert not (tmp_path / "calls").exists()  # nobody to wait for
    (tmp_path / "run/udev/control").touch()
    filesystem.settle(tools, kernel, 7)
    assert (tmp_path / "calls").read_text() == "settle --timeout=7\n"


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.parent), lambda path: path.write_text("")])
def test_what_is_no_directory_is_not_sealed(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """The end of a teardown, where `mount` leads elsewhere by a link."""
    point = tmp_path / "mnt"
    make(point)
    filesystem.seal(point, sealed=False)
    filesystem.seal(point, sealed=True)
    (tmp_path / "new").touch()
