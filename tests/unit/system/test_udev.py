"""The listing of devices that come and go, and the end of a wait. The kernel's own events are in tests/integration."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from time import monotonic

import pytest

from nvcache.system import udev
from nvcache.system.udev import Hotplug


def block(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "sys/class/block" / name).mkdir(parents=True)
    return folder / "sys"


def test_another_device_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udev, "_monitor", lambda: None)
    with Hotplug(block(tmp_path, "nvme0n1", "nvme1n1")) as watch:
        assert not watch.wait(0.05)
        (tmp_path / "sys/class/block/nvme1n1").rename(tmp_path / "old")  # so that its inode is not given to the next
        assert watch.wait(0.05)
        block(tmp_path, "nvme1n1")
        assert watch.wait(0.05)
        (tmp_path / "sys/class/block/nvme1n1").rename(tmp_path / "older")
        block(tmp_path, "nvme1n1")
        assert watch.wait(0.05)
        assert not watch.wait(0.05)


def test_a_wait_ends_when_woken(tmp_path: Path) -> None:
    with Hotplug(block(tmp_path)) as watch:
        timer = threading.Timer(0.2, watch.wake)
        timer.start()
        begun = monotonic()
        while watch.wait(30):  # a device of another test may come first
            pass
        assert 0.1 < monotonic() - begun < 25
        timer.join()
        for _ in range(100_000):  # more than its buffer holds
            watch.wake()
        while watch.wait(30):
            pass
        assert monotonic() - begun < 28
    watch.wake()


def test_without_libudev_the_listing_is_polled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyudev

    def failing(*_: object) -> object:
        raise ImportError("No library named udev")

    monkeypatch.setattr(pyudev, "Context", failing)
    monkeypatch.setattr(udev, "POLL", 0.05)
    with Hotplug(block(tmp_path)) as watch:
        timer = threading.Timer(0.2, block, (tmp_path, "nvme0n1"))
        timer.start()
        assert watch.wait(5)
        timer.join()


def test_events_that_were_lost_count_as_news_and_the_listing_goes_on(tmp_path: Path) -> None:
    with Hotplug(block(tmp_path)) as watch:
        monitor = watch._monitor
        if monitor is None:
            pytest.fail("no events on this machine")
        for number, left in ((105, True), (9, False)):  # ENOBUFS, EBADF

            def failing(timeout: float, number: int = number) -> object:
                raise OSError(number, os.strerror(number))

            monitor.poll = failing
            assert watch._events()
            assert (watch._monitor is not None) is left
        block(tmp_path, "nvme0n1")
        assert watch.wait(2)
