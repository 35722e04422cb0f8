"""The files of timelines: appended, bounded, whole after a crash in a write, and no link is followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nvcache.core.timeline import LIMIT, Event, Kind, to_bytes, to_line
from nvcache.errors import DiskError
from nvcache.store.layout import Layout
from nvcache.store.root import Root
from nvcache.store.timeline import DAEMON, Timelines
from tests.unit.store.helpers import new_store

SLUG = "hf--org--name"
FETCHED = Event(1.0, Kind.FETCHED, 2.0, 3, 4, "https://hub.example", job="1-a", revision="abc")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_store(tmp_path / "store")


@pytest.fixture
def files(layout: Layout) -> Timelines:
    return Timelines(layout)


def test_what_is_appended_is_read_back_in_order(files: Timelines, layout: Layout) -> None:
    later = Event(5.0, Kind.READY, 4.0)
    files.append(SLUG, [later])
    files.append(SLUG, [FETCHED, later])
    assert files.read(SLUG) == [FETCHED, later, later]
    assert files.read("hf--org--other") == []
    assert stat.S_IMODE(layout.timeline(SLUG).stat().st_mode) == 0o600
    assert stat.S_IMODE(layout.timelines.stat().st_mode) == 0o700


def test_every_place_a_write_can_stop_at_costs_one_line(files: Timelines, layout: Layout) -> None:
    line = to_line(FETCHED)
    for length in range(len(line)):
        layout.timeline(SLUG).write_bytes(line + line[:length])
        files.append(SLUG, [Event(9.0, Kind.READY)])
        assert files.read(SLUG) == [FETCHED, Event(9.0, Kind.READY)]


def test_it_never_grows_beyond_its_bound(files: Timelines, layout: Layout) -> None:
    for number in range(3000):
        files.append(SLUG, [Event(float(number), Kind.CHECKED, what="x" * 100)])
        assert layout.timeline(SLUG).stat().st_size <= LIMIT + 1000
    events = files.read(SLUG)
    assert events[-1].at == 2999.0
    assert events[0].at > 0
    assert [event.at for event in events] == [float(number) for number in range(int(events[0].at), 3000)]
    assert os.listdir(layout.tmp) == []


def test_one_batch_beyond_the_bound_is_cut_as_well(files: Timelines, layout: Layout) -> None:
    files.append(SLUG, [Event(float(number), Kind.CHECKED, what="x" * 100) for number in range(900)])
    assert layout.timeline(SLUG).stat().st_size <= LIMIT
    assert files.read(SLUG)[-1].at == 899.0


def test_names_are_by_age_and_forgotten_ones_are_gone(files: Timelines, layout: Layout) -> None:
    for age, name in enumerate(["b", "a", "c"]):
        files.append(name, [FETCHED])
        os.utime(layout.timeline(name), (age, age))
    files.append(DAEMON, [FETCHED])
    layout.timeline("d").mkdir()
    assert files.names() == ["b", "a", "c"]
    files.remove("a")
    files.remove("a")
    assert files.names() == ["b", "c"]


def test_no_link_is_followed(files: Timelines, layout: Layout, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(to_bytes([FETCHED]))
    layout.timeline(SLUG).symlink_to(outside)
    with pytest.raises(DiskError, match="cannot note what happened to"):
        files.append(SLUG, [FETCHED])
    with pytest.raises(DiskError, match="cannot read what happened to"):
        files.read(SLUG)
    assert outside.read_bytes() == to_bytes([FETCHED])


def test_a_sweep_keeps_them_and_an_older_store_gets_the_folder(files: Timelines, layout: Layout) -> None:
    files.append(SLUG, [FETCHED])
    root = Root.open(layout.root)
    root.sweep()
    root.close()
    assert files.read(SLUG) == [FETCHED]
    files.remove(SLUG)
    layout.timelines.rmdir()
    Root.open(layout.root).close()
    assert layout.timelines.is_dir()
