"""Blobs: links as the reference count, removal, quarantine, who uses them."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvcache.errors import Code, IntegrityError
from nvcache.store import files
from nvcache.store.blobs import Blobs
from nvcache.store.layout import Layout
from tests.unit.store.helpers import add_blob, new_store, noise, sha256

DATA = noise(5000)
DIGEST = sha256(DATA)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = new_store(tmp_path / "store")
    add_blob(layout, DATA)
    return layout


@pytest.fixture
def blobs(layout: Layout) -> Blobs:
    return Blobs(layout)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "view").mkdir()
    fd = os.open(tmp_path / "view", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_blob_is_there_only_with_its_size_and_as_a_file(layout: Layout, blobs: Blobs) -> None:
    assert blobs.has(DIGEST, len(DATA))
    assert not blobs.has(DIGEST, len(DATA) + 1)
    assert not blobs.has("a" * 64, 0)
    layout.blob("a" * 64).symlink_to(layout.blob(DIGEST))
    assert not blobs.has("a" * 64, len(DATA))
    layout.blob("b" * 64).mkdir()
    assert not blobs.has("b" * 64, 4096)
    assert [found for found, _, _ in blobs.walk()] == [DIGEST]


def test_a_link_is_the_blob_and_twice_is_once(layout: Layout, blobs: Blobs, folder: int, tmp_path: Path) -> None:
    for _ in range(2):
        blobs.link(DIGEST, "a.bin", dir_fd=folder)
        assert (tmp_path / "view" / "a.bin").samefile(layout.blob(DIGEST))
        assert list(blobs.walk()) == [(DIGEST, len(DATA), 2)]


def test_whatever_has_the_name_is_replaced_and_not_followed(layout: Layout, blobs: Blobs, folder: int, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "view" / "a.bin").symlink_to(tmp_path / "victim")
    blobs.link(DIGEST, "a.bin", dir_fd=folder)
    assert (tmp_path / "view" / "a.bin").samefile(layout.blob(DIGEST))
    assert (tmp_path / "victim").read_text() == "mine"
    assert os.listdir(layout.tmp) == []


@pytest.mark.parametrize("there", [False, True])
def test_too_many_links_become_a_copy(
    layout: Layout, blobs: Blobs, folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    if there:
        (tmp_path / "view" / "a.bin").write_text("old")
    monkeypatch.setattr(os, "link", full)
    blobs.link(DIGEST, "a.bin", dir_fd=folder)
    copy = tmp_path / "view" / "a.bin"
    assert copy.read_bytes() == DATA
    assert not copy.samefile(layout.blob(DIGEST))
    assert blobs.shown(DIGEST, copy.lstat())
    assert stat.S_IMODE(copy.stat().st_mode) == 0o444
    assert os.listdir(layout.tmp) == []


def test_a_blob_that_is_not_there_cannot_be_linked(blobs: Blobs, folder: int, layout: Layout) -> None:
    with pytest.raises(IntegrityError, match="not in the store") as caught:
        blobs.link("a" * 64, "a.bin", dir_fd=folder)
    assert caught.value.code is Code.DEGRADED
    layout.blob("a" * 64).symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="not a regular file"):
        blobs.link("a" * 64, "a.bin", dir_fd=folder)


def test_only_what_nobody_links_keeps_or_just_made_is_garbage(blobs: Blobs, folder: int) -> None:
    assert list(blobs.unreferenced(set(), grace=0)) == [(DIGEST, len(DATA))]
    assert list(blobs.unreferenced({DIGEST}, grace=0)) == []
    assert list(blobs.unreferenced(set())) == []
    assert not blobs.remove_if_unreferenced(DIGEST)
    blobs.link(DIGEST, "a.bin", dir_fd=folder)
    assert list(blobs.unreferenced(set(), grace=0)) == []
    assert not blobs.remove_if_unreferenced(DIGEST, grace=0)
    os.unlink("a.bin", dir_fd=folder)
    assert blobs.remove_if_unreferenced(DIGEST, grace=0)
    assert not blobs.remove_if_unreferenced(DIGEST, grace=0)
    assert list(blobs.walk()) == []


def test_the_grace_period_ends_and_a_clock_set_back_does_not_keep_garbage_for_ever(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for shift, garbage in ((300, False), (700, True), (-300, False), (-700, True)):
        monkeypatch.setattr(time, "time", lambda shift=shift: now + shift)
        assert bool(list(blobs.unreferenced(set()))) is garbage


def test_removal_and_linking_never_lose_a_linked_blob(layout: Layout, blobs: Blobs, folder: int, tmp_path: Path) -> None:
    """One thread links as fast as it can, another removes: a link that succeeded always has the blob behind it."""
    stop = threading.Event()
    removed = 0

    def remove() -> None:
        nonlocal removed
        deadline = time.monotonic() + 60
        while not stop.is_set():
            assert time.monotonic() < deadline
            removed += blobs.remove_if_unreferenced(DIGEST, grace=0)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(remove)
        try:
            for number in itertools.count():
                if running.done() or (number >= 200 and removed >= 20):
                    break
                try:
                    blobs.link(DIGEST, f"{number}.bin", dir_fd=folder)
                except IntegrityError:
                    add_blob(layout, DATA)
                    continue
                assert layout.blob(DIGEST).exists()
                os.unlink(f"{number}.bin", dir_fd=folder)
        finally:
            stop.set()
        running.result(timeout=10)


def test_removal_waits_for_the_folder_and_looks_again(layout: Layout, blobs: Blobs, folder: int) -> None:
    fd = os.open(layout.blob(DIGEST).parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # as a committer in another process
        with ThreadPoolExecutor(1) as thread:
            removal = thread.submit(blobs.remove_if_unreferenced, DIGEST, grace=0)
            os.link(layout.blob(DIGEST), "late", dst_dir_fd=folder)
            assert not removal.done()
            fcntl.flock(fd, fcntl.LOCK_UN)
            assert removal.result(timeout=10) is False
    finally:
        os.close(fd)


def test_quarantine_keeps_the_bytes_and_says_why(layout: Layout, blobs: Blobs) -> None:
    moved = blobs.quarantine(DIGEST, "chunk 3 went bad")
    assert moved == layout.quarantine / DIGEST
    assert moved.read_bytes() == DATA
    assert (layout.quarantine / f"{DIGEST}.note").read_text() == "chunk 3 went bad\n"
    assert not blobs.has(DIGEST, len(DATA))
    assert blobs.used_bytes() == 0
    assert blobs.quarantined_bytes() >= len(DATA)
    with pytest.raises(IntegrityError, match="cannot quarantine"):
        blobs.quarantine(DIGEST, "again")
    add_blob(layout, DATA)
    blobs.quarantine(DIGEST, "again")
    assert (layout.quarantine / f"{DIGEST}.note").read_text() == "again\n"


def test_a_full_disk_keeps_no_bad_blob_in_place(layout: Layout, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_all", full)
    assert blobs.quarantine(DIGEST, "bad").read_bytes() == DATA
    assert not layout.blob(DIGEST).exists()
    assert os.listdir(layout.quarantine) == [DIGEST]


def test_what_nobody_waits_for_leaves_the_quarantine_with_its_note(layout: Layout, blobs: Blobs) -> None:
    other = add_blob(layout, DATA + b"!")
    for digest in (DIGEST, other):
        blobs.quarantine(digest, "bad")
    (layout.quarantine / f"{'a' * 64}.note").write_text("its blob is gone")
    (layout.quarantine / "state").mkdir()
    blobs.drop_quarantined({other})
    assert sorted(os.listdir(layout.quarantine)) == sorted([other, f"{other}.note", "state"])
    blobs.drop_quarantined(())
    assert os.listdir(layout.quarantine) == ["state"]


def test_the_size_of_thousands_of_blobs_is_known_at_once(layout: Layout, blobs: Blobs) -> None:
    for number in range(2_500):
        name = f"{number % 256:02x}{number:062x}"
        os.close(os.open(layout.blob(name), os.O_CREAT | os.O_WRONLY, 0o444))
    began = time.process_time()
    assert blobs.used_bytes() == len(DATA)
    assert time.process_time() - began < 0.25  # so that ten thousand take less than a second


def test_the_kernel_tells_who_has_a_blob_open_or_mapped(layout: Layout, blobs: Blobs, tmp_path: Path) -> None:
    assert blobs.in_use(DIGEST) is False
    os.link(layout.blob(DIGEST), tmp_path / "other-name")
    with (tmp_path / "other-name").open("rb") as file:
        assert blobs.in_use(DIGEST) is True
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert blobs.in_use(DIGEST) is True
    mapped.close()
    assert blobs.in_use(DIGEST) is False
    assert blobs.in_use("a" * 64) is False


def test_asking_who_uses_a_blob_survives_one_who_opens_it_just_then(layout: Layout) -> None:
    """The kernel signals the holder of a lease that is broken, by default with a signal that kills."""
    script = (
        "import sys; from pathlib import Path\n"
        "from nvcache.store.blobs import Blobs; from nvcache.store.layout import Layout\n"
        "blobs = Blobs(Layout(Path(sys.argv[1])))\n"
        "print(sum(blobs.in_use(sys.argv[2]) is True for _ in range(20000)))"
    )
    asking = subprocess.Popen([sys.executable, "-c", script, str(layout.root), DIGEST], stdout=subprocess.PIPE, text=True)
    opened = 0
    while asking.poll() is None:
        layout.blob(DIGEST).open("rb").close()
        opened += 1
    out, _ = asking.communicate(timeout=60)
    assert asking.returncode == 0
    assert int(out) > 0
    assert opened > 100
