"""Prefetching really fills the page cache, in order, within its budget."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench.cold import cached, drop
from nvcache.client import Model, prefetch, reading
from nvcache.client.mapping import large_pages, map_file
from nvcache.client.memory import Room
from nvcache.client.order import in_order
from nvcache.client.reading import PIECE
from nvcache.client.residency import resident

SIZE = 24 * 2**20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory on a disk: a RAM file system has no page cache to fill."""
    path = Path(tempfile.mkdtemp(prefix="nv-cache-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no large pages for files, what is asked for goes through WILLNEED and sendfile."""
    monkeypatch.setattr(reading, "LARGE_PAGES", False)


@pytest.fixture(params=["large pages", "small pages"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Both ways of asking."""
    if request.param == "small pages":
        request.getfixturevalue("small_pages")


def share(handle: int, offset: int, length: int, samples: int) -> float:
    look = resident(handle, offset, length, samples)
    assert look is not None
    return look.share


def cold_file(path: Path, size: int = SIZE) -> Path:
    """A file whose pages are not in the page cache."""
    path.write_bytes(os.urandom(2**20) * (size // 2**20) + b"x" * (size % 2**20))
    drop(path.parent)
    return path


def near(size: int) -> object:
    """As good as samples are: a look leaves pages behind, which the next one may find."""
    return pytest.approx(size, abs=PIECE // 4)


def there(path: Path) -> bool:
    """Whether the file is in the page cache, but for a few pages: some machines reclaim idle ones at any time (DAMON)."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        pages = range(0, os.fstat(file.fileno()).st_size, 4096)
        return sum(share(file.fileno(), point, 1, 1) for point in pages) > 0.95 * len(pages)


@pytest.mark.usefixtures("either_way")
def test_every_page_is_there_afterwards(folder: Path) -> None:
    path = cold_file(folder / "model.safetensors", SIZE + 5)
    report = prefetch(path, threads=2)
    assert there(path)
    assert (report.files, report.bytes, report.left_out, report.notes) == (1, SIZE + 5, 0, ())
    assert report.read + (report.already_cached or 0) == SIZE + 5
    assert report.cached == near(SIZE)
    assert report.read > 0.9 * SIZE
    assert report.threads == 2
    assert report.rate > 0


@pytest.mark.usefixtures("either_way")
def test_what_is_there_is_not_read_again(folder: Path) -> None:
    path = cold_file(folder / "model.safetensors")
    prefetch(path)
    again = prefetch(path)
    assert (again.already_cached, again.read, again.cached) == (near(SIZE), near(0), near(SIZE))


@pytest.mark.usefixtures("either_way")
def test_a_hole_is_filled(folder: Path) -> None:
    path = cold_file(folder / "model.safetensors", 4 * PIECE)
    prefetch(path)
    with path.open("rb") as file:
        for _ in range(20):  # the kernel keeps back what it is just working on
            os.posix_fadvise(file.fileno(), PIECE, 2 * PIECE, os.POSIX_FADV_DONTNEED)
            if cached(folder) < 0.51:
                break
    report = prefetch(path)
    assert there(path)
    assert report.read == near(2 * PIECE)
    assert report.already_cached == 4 * PIECE - report.read


def test_a_directory_with_links_and_empty_files(folder: Path) -> None:
    cold_file(folder / "a.safetensors")
    (folder / "sub").mkdir()
    (folder / "sub" / "empty").touch()
    (folder / "config.json").write_text("{}")
    report = prefetch(folder)
    assert (report.files, report.bytes) == (3, SIZE + 2)
    assert there(folder / "a.safetensors")


@pytest.mark.usefixtures("either_way")
def test_the_limit_is_kept_and_the_beginning_is_what_is_there(folder: Path) -> None:
    path = cold_file(folder / "x.bin", 3 * PIECE)
    report = prefetch(path, limit_bytes=PIECE + 5)
    assert (report.read, report.left_out, report.limit) == (near(PIECE), near(2 * PIECE), PIECE + 5)
    assert report.notes == (f"stopped after reading {report.read / 1e6:.0f} MB: the next piece would pass limit_bytes",)
    with path.open("rb") as file:
        assert share(file.fileno(), 0, PIECE, 32) == pytest.approx(1.0, abs=0.1)
    assert prefetch(path).left_out == 0
    assert there(path)


def test_no_memory_means_nothing_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "x.bin")
    monkeypatch.setattr(reading, "room", lambda: Room(0, 0))
    report = prefetch(path)
    assert (report.read, report.left_out) == (0, near(SIZE))
    assert report.notes == ("stopped after reading 0 MB: more would not fit into this process's memory",)


def test_what_left_the_page_cache_again_is_told(folder: Path) -> None:
    path = cold_file(folder / "x.bin", 3 * PIECE)
    with reading.reading([path]) as begun:
        begun.wait()
        drop(folder)
        assert begun.report().notes == ("some of it has left the page cache again: memory is short",)


@pytest.mark.usefixtures("either_way")
def test_memory_that_gets_short_meanwhile_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "x.bin", 3 * PIECE)
    left = [Room(2**40, 2**40)]
    monkeypatch.setattr(reading, "room", lambda: left.pop() if left else Room(0, 0))
    monkeypatch.setattr(reading, "LOOK_EVERY", PIECE)
    report = prefetch(path)
    assert (report.read, report.left_out) == (near(2 * PIECE), near(PIECE))
    assert "memory got short meanwhile" in report.notes[0]


@pytest.mark.usefixtures("either_way")
def test_what_is_cached_is_not_pushed_out_for_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "x.bin", 4 * PIECE)
    monkeypatch.setattr(reading, "room", lambda: Room(2 * PIECE, 0))  # what is inactive counts as available
    assert prefetch(path).read == near(2 * PIECE)
    again = prefetch(path)
    assert (again.already_cached, again.limit) == (near(2 * PIECE), near(0))
    assert again.read < PIECE / 2


@pytest.mark.usefixtures("small_pages")
def test_a_disk_that_stops_answering_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "x.bin")
    answers = threading.Event()
    monkeypatch.setattr(os, "sendfile", lambda *given: answers.wait(20) and 0)
    monkeypatch.setattr(reading, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(reading, "TICK", 0.02)
    with pytest.raises(TimeoutError, match="given nothing for 0 s"):
        prefetch(path)
    answers.set()


def test_a_disk_that_does_not_even_open_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(reading, "TICK", 0.02)
    opens = threading.Event()
    with pytest.raises(TimeoutError, match="given nothing for 0 s"):
        reading.within(lambda: opens.wait(20))
    opens.set()


@pytest.mark.parametrize("name", ["fifo", "folder"])
def test_what_is_no_regular_file_is_named(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="it is no regular file") as caught, reading.reading([tmp_path / name]):
        pass
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.usefixtures("small_pages")
def test_an_error_of_the_disk_is_told_and_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "x.bin", 8 * PIECE)
    asked: list[int] = []

    def broken(out: int, handle: int, offset: int, count: int) -> int:
        asked.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "sendfile", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        prefetch(path, threads=1)
    assert caught.value.filename == str(path)
    assert asked == [0]


@pytest.mark.parametrize(
    ("release", "page_size", "large"),
    [
        ("6.18.44-azure", 4096, True),
        ("6.12.0", 4096, True),
        ("10.0-rc1", 4096, True),
        ("6.8.0-1021-azure", 4096, False),  # large pages of XFS may hold wrong bytes
        ("5.15.0-1074-azure", 4096, False),  # it would read by the device's read-ahead, around the fault
        ("5.4.0", 4096, False),
        ("4.19", 4096, False),
        ("6.8.0-1021-nvidia-64k", 65536, False),  # a huge page is 512 MiB
        ("6.6.0", 16384, False),
        ("unknown", 4096, False),
    ],
)
def test_large_pages_are_asked_for_where_the_kernel_has_them(release: str, page_size: int, *, large: bool) -> None:
    assert large_pages(release, page_size) is large


def test_the_programs_own_random_numbers_neither_matter_nor_change(folder: Path) -> None:
    path = cold_file(folder / "x.bin", 4 * PIECE)
    random.seed(42)
    prefetch(path, limit_bytes=0)  # leaves a page behind wherever it has looked
    random.seed(42)
    before = random.getstate()
    assert prefetch(path).read > 3 * PIECE
    assert random.getstate() == before


def test_many_files_need_few_descriptors(folder: Path) -> None:
    for number in range(200):
        (folder / f"{number}.safetensors").write_bytes(b"x" * 5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
    try:
        assert prefetch(folder).files == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_under_two_names_is_read_once(folder: Path) -> None:
    path = cold_file(folder / "a.safetensors")
    (folder / "b.safetensors").hardlink_to(path)
    (folder / "c.safetensors").symlink_to(path)
    report = prefetch(folder)
    assert (report.files, report.bytes) == (3, SIZE)


def test_a_file_that_is_removed_meanwhile_is_no_error(folder: Path) -> None:
    path = cold_file(folder / "a.safetensors")
    mapped, content = map_file(path), path.read_bytes()
    drop(folder)
    begun = reading.Reading([path], threads=1, limit_bytes=None)
    path.unlink()
    begun.start()
    begun.wait()
    begun.close()
    assert mapped == content


@pytest.mark.usefixtures("either_way")
def test_a_file_that_is_cut_short_meanwhile_is_an_error(folder: Path) -> None:
    """Touching what was mapped of it would end the process."""
    path = cold_file(folder / "a.safetensors")
    begun = reading.Reading([path], threads=1, limit_bytes=None)
    os.truncate(path, PIECE)
    begun.start()
    with pytest.raises(OSError, match="cut short while it was read") as caught:
        begun.wait()
    begun.close()
    assert caught.value.filename == str(path)


def test_a_file_that_is_cut_short_before_the_look_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing beyond its end is taken for cached."""
    path, cut = cold_file(folder / "a.safetensors"), reading._cut

    def cut_short(paths: Sequence[Path]) -> dict[Path, reading._File]:
        files = cut(paths)
        os.truncate(path, PIECE)
        return files

    monkeypatch.setattr(reading, "_cut", cut_short)
    with pytest.raises(OSError, match="cut short while it was read"):
        prefetch(path)


def test_who_leaves_early_has_nothing_more_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cold_file(folder / "a.safetensors")
    monkeypatch.setattr(reading, "LARGE_PAGES", True)
    begun = reading.Reading([path], threads=1, limit_bytes=None)

    def populate(handle: int, offset: int, length: int) -> bool:
        begun.close()
        return True

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(reading, "populate", populate)
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, offset, length, advice: asked.append((offset, advice)))
    begun.start()
    with begun._changed:
        assert begun._changed.wait_for(lambda: begun._every[0].done, 20)
    assert os.POSIX_FADV_WILLNEED not in {advice for _, advice in asked}


def test_progress_reaches_the_end(folder: Path) -> None:
    path = cold_file(folder / "a.safetensors")
    for _ in ("cold", "cached"):
        told: list[tuple[int, int]] = []
        prefetch(path, on_progress=lambda done, total, told=told: told.append((done, total)))  # type: ignore[misc]
        assert told[-1] == (SIZE, SIZE)


def test_a_forked_process_cannot_go_on(folder: Path) -> None:
    """Its threads are in the other process: waiting for them would never end."""
    path = cold_file(folder / "a.safetensors")
    with reading.reading([path]) as begun:
        child = os.fork()
        if not child:
            try:
                begun.wait()
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        begun.wait()


def test_no_handle_and_no_thread_is_left(folder: Path) -> None:
    cold_file(folder / "x.bin")
    before = len(os.listdir("/proc/self/fd"))
    prefetch(folder)
    with pytest.raises(KeyError), reading.reading([folder / "x.bin"]):
        raise KeyError
    for thread in threading.enumerate():
        if thread.name.startswith("nvcache-prefetch"):
            thread.join(20)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_memory_file_system_needs_no_reading() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        Path(name, "x.bin").write_bytes(b"x" * 5000)
        report = prefetch(name)
    assert (report.already_cached, report.read, report.filesystem) == (5000, 0, "tmpfs")
    assert report.notes == ("the files lie on tmpfs, which is memory already",)


def test_a_model_or_lease_stands_for_its_directory(folder: Path) -> None:
    cold_file(folder / "x.bin")
    assert prefetch(Model("e", "org/name", "ready", path=str(folder))).bytes == SIZE
    with pytest.raises(ValueError, match="cannot load org/name: it is filling"):
        prefetch(Model("e", "org/name", "filling"))


def test_shards_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    for name in ("layer-10.bin", "layer-2.bin", "b.safetensors", "a.safetensors", "unlisted.safetensors"):
        (tmp_path / name).touch()
    index = {
        "weight_map": {"w1": "b.safetensors", "w2": "a.safetensors", "w3": "b.safetensors", "w4": "missing.safetensors", "w5": "../../etc/passwd"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    names = [path.name for path in in_order(tmp_path)]
    assert names == ["b.safetensors", "a.safetensors", "layer-2.bin", "layer-10.bin", "model.safetensors.index.json", "unlisted.safetensors"]
    names = [path.name for path in in_order(tmp_path, "name")]
    assert names == ["a.safetensors", "b.safetensors", "layer-2.bin", "layer-10.bin", "model.safetensors.index.json", "unlisted.safetensors"]
    assert [path.name for path in in_order(tmp_path, ["layer-10.bin", "none"])][:2] == ["layer-10.bin", "a.safetensors"]
    with pytest.raises(ValueError, match="neither index nor name"):
        in_order(tmp_path, "size")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 7}}'])
def test_a_broken_index_only_loses_the_order(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert prefetch(tmp_path).files == 2


def test_a_missing_file_and_no_threads_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prefetch(tmp_path / "nowhere")
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="0 threads"):
        prefetch(tmp_path, threads=0)


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        (".", {"limit_bytes": -5}, "cannot prefetch at most -5 bytes"),
        ("hf://org/name", {}, "cannot load hf://org/name: it is a reference; give the directory"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, more: dict[str, int], says: str) -> None:
    (tmp_path / "x").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        prefetch(path, **more)  # type: ignore[arg-type]


def test_a_folder_in_which_nothing_is_mounted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file is in it"):
        prefetch(tmp_path)


def test_a_process_that_may_have_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr(threading.Thread, "start", none_left)
    with pytest.raises(OSError, match="no thread can be started") as caught:
        prefetch(tmp_path)
    assert caught.value.errno == errno.EAGAIN
