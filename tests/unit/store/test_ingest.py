"""An ingest on real files: resume, torn journals, many threads, group commit, commit, repair seeds."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from nvcache.errors import Code, DiskError, IntegrityError, SpaceError
from nvcache.store import claim
from nvcache.store import ingest as module
from nvcache.store.files import BLOCK, aligned_buffer, round_up
from nvcache.store.ingest import Ingest, discard, ingest_key, kept_bytes, seed
from nvcache.store.journal import RECORD_BYTES
from nvcache.store.layout import Layout
from tests.unit.store.helpers import CHUNK, add_blob, fill, new_store, noise, sha256, write_chunk

SIZE = 10 * CHUNK + 1234
DATA = noise(SIZE)
KEY = ingest_key(sha256(DATA), SIZE)
BOTH = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_store(tmp_path / "store")


def reopen(layout: Layout, *, size: int = SIZE, chunk_size: int = CHUNK, direct: bool = True) -> Ingest:
    return Ingest.open(layout, KEY, size, chunk_size=chunk_size, direct=direct)


def read_chunk(ingest: Ingest, index: int) -> bytes:
    return bytes(ingest.read(index, memoryview(aligned_buffer(round_up(ingest.chunk_size)))))


@BOTH
def test_a_whole_file_becomes_a_read_only_blob(layout: Layout, direct: bool) -> None:
    ingest = reopen(layout, direct=direct)
    assert ingest.count == 11
    fill(ingest, DATA, reversed(range(ingest.count)))
    ingest.sync()
    ingest.commit(sha256(DATA))
    blob = layout.blob(sha256(DATA))
    assert blob.read_bytes() == DATA
    assert stat.S_IMODE(blob.stat().st_mode) == 0o444
    assert blob.stat().st_nlink == 1
    assert not layout.ingest_dir(KEY).exists()


def test_what_was_lent_is_known_after_a_restart(layout: Layout) -> None:
    """Until it is forgotten, or written by somebody who is vouched for; a file of one chunk is made in one go."""
    with_mirror = Ingest.open(layout, KEY, SIZE, chunk_size=CHUNK, lent=True)
    fill(with_mirror, DATA, [0, 1, 2])
    assert with_mirror.lent_chunks() == {0, 1, 2}
    with_mirror.close()
    ingest = reopen(layout)
    assert ingest.lent_chunks() == {0, 1, 2}
    ingest.forget(0)
    fill(ingest, DATA, [1, 3])
    assert ingest.lent_chunks() == {2}
    ingest.close()
    again = reopen(layout)
    assert (again.lent_chunks(), again.recorded().keys()) == ({2}, {1, 2, 3})
    again.restart()
    assert again.lent_chunks() == frozenset()
    again.close()


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_every_size_round_trips(layout: Layout, size: int) -> None:
    data = noise(size, seed=size)
    assert layout.blob(add_blob(layout, data)).read_bytes() == data


def test_chunk_sizes_that_are_no_blocks_work_through_the_page_cache(layout: Layout) -> None:
    ingest = reopen(layout, chunk_size=1000)
    fill(ingest, DATA)
    assert read_chunk(ingest, 3) == DATA[3000:4000]
    ingest.commit(sha256(DATA))
    assert layout.blob(sha256(DATA)).read_bytes() == DATA


@BOTH
def test_resume_knows_what_was_written_and_reads_it_back(layout: Layout, direct: bool) -> None:
    first = reopen(layout, direct=direct)
    fill(first, DATA, [0, 3, 10])
    first.close()
    assert kept_bytes(layout, KEY) == 2 * CHUNK + 1234
    again = reopen(layout, direct=direct)
    assert again.recorded() == {index: xxhash.xxh3_64_intdigest(DATA[index * CHUNK : (index + 1) * CHUNK]) for index in (0, 3, 10)}
    assert read_chunk(again, 3) == DATA[3 * CHUNK : 4 * CHUNK]
    assert read_chunk(again, 10) == DATA[10 * CHUNK :]
    fill(again, DATA, set(range(11)) - {0, 3, 10})
    again.commit(sha256(DATA))
    assert layout.blob(sha256(DATA)).read_bytes() == DATA
    assert kept_bytes(layout, KEY) == 0


def test_the_journal_is_written_as_chunks_arrive_not_at_the_close(layout: Layout) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA, [0, 1])
    assert kept_bytes(layout, KEY) == 2 * CHUNK
    ingest.close()


def test_forgotten_and_restarted_chunks_stay_forgotten(layout: Layout) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA, [0, 1, 2])
    ingest.forget(1)
    ingest.forget(7)
    ingest.close()
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {0, 2}
    ingest.restart()
    assert ingest.recorded() == {}
    assert os.stat(layout.ingest_dir(KEY) / "data").st_blocks * 512 >= SIZE
    write_chunk(ingest, DATA, 5)
    ingest.close()
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {5}
    ingest.close()


def test_a_torn_record_is_dropped_and_the_next_ones_are_sound(layout: Layout) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA, [0, 1])
    ingest.close()
    with (layout.ingest_dir(KEY) / "journal").open("ab") as journal:
        journal.write(b"good\x05\x00")
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {0, 1}
    write_chunk(ingest, DATA, 2)
    ingest.close()
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {0, 1, 2}
    ingest.close()


def test_what_comes_after_an_unsound_record_stays_dropped(layout: Layout) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA, [0, 1, 2])
    ingest.close()
    with (layout.ingest_dir(KEY) / "journal").open("r+b") as journal:
        journal.seek(2 * RECORD_BYTES)  # the record of chunk 1
        journal.write(b"\xff")
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {0}
    write_chunk(ingest, DATA, 5)
    ingest.close()
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {0, 5}
    ingest.close()


@pytest.mark.parametrize(
    "hurt", ["journal gone", "journal garbage", "data gone", "data short", "data is a symlink", "other size", "other chunk size"]
)
def test_anything_else_is_made_anew(layout: Layout, tmp_path: Path, hurt: str) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA, [0, 1])
    ingest.close()
    folder = layout.ingest_dir(KEY)
    size, chunk_size = SIZE, CHUNK
    match hurt:
        case "journal gone":
            (folder / "journal").unlink()
        case "journal garbage":
            (folder / "journal").write_bytes(b"x" * 100)
        case "data gone":
            (folder / "data").unlink()
        case "data short":
            os.truncate(folder / "data", CHUNK)
        case "data is a symlink":
            (folder / "data").rename(tmp_path / "elsewhere")
            (folder / "data").symlink_to(tmp_path / "elsewhere")
        case "other size":
            size += 1
        case "other chunk size":
            chunk_size *= 2
    ingest = reopen(layout, size=size, chunk_size=chunk_size)
    assert ingest.recorded() == {}
    ingest.close()
    if hurt == "data is a symlink":
        assert (tmp_path / "elsewhere").stat().st_size == round_up(SIZE)


def test_a_file_of_one_chunk_has_no_journal_and_starts_anew(layout: Layout) -> None:
    data = noise(100)
    key = ingest_key(sha256(data), 100)
    ingest = Ingest.open(layout, key, 100, chunk_size=CHUNK)
    fill(ingest, data)
    assert ingest.recorded().keys() == {0}
    ingest.close()
    assert os.listdir(layout.ingest_dir(key)) == ["data"]
    ingest = Ingest.open(layout, key, 100, chunk_size=CHUNK)
    assert ingest.recorded() == {}
    ingest.close()
    discard(layout, key)
    discard(layout, key)
    assert not layout.ingest_dir(key).exists()


def test_eight_threads_write_one_file(layout: Layout) -> None:
    size = 200 * BLOCK + 77
    data = noise(size, seed=8)
    ingest = reopen(layout, size=size, chunk_size=BLOCK)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda lane: fill(ingest, data, range(lane, ingest.count, 8)), range(8)))
    ingest.close()
    ingest = reopen(layout, size=size, chunk_size=BLOCK)
    assert len(ingest.recorded()) == 201
    for index, digest in ingest.recorded().items():
        assert xxhash.xxh3_64_intdigest(read_chunk(ingest, index)) == digest
    ingest.commit(sha256(data))
    assert layout.blob(sha256(data)).read_bytes() == data


def test_the_lock_is_not_held_while_data_is_written(layout: Layout) -> None:
    ingest = reopen(layout)
    with ingest._lock, ThreadPoolExecutor(1) as thread:
        writing = thread.submit(ingest._put, 0, memoryview(aligned_buffer(CHUNK)), CHUNK)
        writing.result(timeout=10)
    ingest.close()


def test_a_sync_is_due_by_time_or_size_and_said_once(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest = reopen(layout)
    assert not ingest.sync_due(100.0)
    write_chunk(ingest, DATA, 0)
    assert not ingest.sync_due(200.0)
    assert not ingest.sync_due(204.9)
    assert ingest.sync_due(205.0)
    assert not ingest.sync_due(300.0)
    monkeypatch.setattr(module, "SYNC_BYTES", 2 * CHUNK)
    fill(ingest, DATA, [1, 2])
    assert ingest.sync_due(300.0)
    ingest.sync()
    ingest.close()


def test_data_is_synced_before_the_journal(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    ingest = reopen(layout)
    write_chunk(ingest, DATA, 0)
    monkeypatch.setattr(os, "fdatasync", order.append)
    ingest.sync()
    assert order == [ingest._data, ingest._journal]
    ingest.close()


def test_after_a_failed_sync_nothing_is_believed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(DiskError, match="cannot sync the ingest") as caught:
            ingest.sync()
    assert caught.value.code is Code.DISK_IO
    with pytest.raises(DiskError, match="cannot commit"):
        ingest.commit(sha256(DATA))
    ingest.close()
    assert not layout.blob(sha256(DATA)).exists()
    ingest = reopen(layout)
    assert ingest.recorded() == {}
    ingest.close()


def test_a_blob_that_is_there_is_kept_and_its_grace_restarts(layout: Layout) -> None:
    digest = add_blob(layout, DATA)
    before = layout.blob(digest).stat()
    assert add_blob(layout, DATA) == digest
    after = layout.blob(digest).stat()
    assert after.st_ino == before.st_ino
    assert after.st_ctime_ns > before.st_ctime_ns
    assert not layout.ingest_dir(KEY).exists()


def test_a_blob_of_the_wrong_size_is_replaced(layout: Layout) -> None:
    blob = layout.blob(sha256(DATA))
    blob.write_bytes(b"torn")
    add_blob(layout, DATA)
    assert blob.read_bytes() == DATA
    assert blob.stat().st_nlink == 1


def test_an_inode_that_became_a_blob_is_never_written_again(layout: Layout) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA)
    ingest.close()
    folder = layout.ingest_dir(KEY)
    os.truncate(folder / "data", SIZE)
    os.link(folder / "data", layout.blob(sha256(DATA)))  # as if killed right after the link
    ingest = reopen(layout)
    assert ingest.recorded() == {}
    write_chunk(ingest, bytes(SIZE), 0)
    ingest.close()
    assert layout.blob(sha256(DATA)).read_bytes() == DATA


def test_no_room_leaves_nothing_behind(layout: Layout) -> None:
    with pytest.raises(SpaceError, match="cannot reserve") as caught:
        Ingest.open(layout, "big-1", 2**60)
    assert caught.value.code is Code.DISK_FULL
    assert sorted(os.listdir(layout.ingest)) == ["plans", "receipts"]


@pytest.mark.parametrize("token", ["../../etc/passwd", "", ".hidden", "a/b", "x" * 300, '"0x8D"', "\udce4", "plans"])
def test_keys_are_safe_and_differ(token: str) -> None:
    key = ingest_key(token, 5)
    assert "/" not in key
    assert not key.startswith(".")
    assert len(key.encode()) < 200
    assert key not in ("plans", "receipts")
    assert key != ingest_key(token, 6)
    assert key != ingest_key(token + "x", 5)


def test_a_readable_token_cannot_collide_with_a_hashed_one() -> None:
    hashed = ingest_key("a/b", 5)
    assert ingest_key("=" + hashlib.sha256(b"a/b").hexdigest(), 5) != hashed


@BOTH
def test_a_repair_is_seeded_with_the_good_chunks_only(layout: Layout, tmp_path: Path, direct: bool) -> None:
    hurt = bytearray(DATA)
    hurt[4 * CHUNK] ^= 1
    source = tmp_path / "quarantined"
    source.write_bytes(hurt)
    good = {index: xxhash.xxh3_64_intdigest(DATA[index * CHUNK : (index + 1) * CHUNK]) for index in range(11) if index != 4}
    seed(layout, KEY, source, SIZE, good, chunk_size=CHUNK, direct=direct)
    assert kept_bytes(layout, KEY) == SIZE - CHUNK
    ingest = reopen(layout, direct=direct)
    assert ingest.recorded() == good
    for index in good:
        assert read_chunk(ingest, index) == DATA[index * CHUNK : (index + 1) * CHUNK]
    write_chunk(ingest, DATA, 4)
    ingest.commit(sha256(DATA))
    assert layout.blob(sha256(DATA)).read_bytes() == DATA
    assert source.read_bytes() == hurt


def test_a_seed_from_a_shortened_source_takes_what_is_there(layout: Layout, tmp_path: Path) -> None:
    source = tmp_path / "quarantined"
    source.write_bytes(DATA[: 2 * CHUNK])
    good = {index: xxhash.xxh3_64_intdigest(DATA[index * CHUNK : (index + 1) * CHUNK]) for index in range(2)}
    seed(layout, KEY, source, SIZE, good, chunk_size=CHUNK)
    ingest = reopen(layout)
    assert ingest.recorded() == good
    assert read_chunk(ingest, 1) == DATA[CHUNK : 2 * CHUNK]
    ingest.close()


def test_a_small_file_costs_few_calls(layout: Layout) -> None:
    """Thousands of small files come with a repository: opening, writing and committing one is a handful of calls that take a path."""
    seen: list[str] = []
    thread = threading.get_ident()
    listening = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if listening and threading.get_ident() == thread and event.partition(".")[0] in ("os", "open", "fcntl", "shutil"):
            seen.append(event)

    data = noise(500)
    key, digest, buffer = ingest_key(sha256(data), 500), sha256(data), memoryview(aligned_buffer(BLOCK))
    buffer[:500] = data
    sys.addaudithook(hook)  # cannot be removed, only silenced
    try:
        ingest = Ingest.open(layout, key, 500)
        ingest.write(0, buffer, 500, 1)
        ingest.commit(digest)
    finally:
        listening = False
    assert len(seen) <= 12, seen


# -- one writer at a time


def test_a_second_writer_is_refused_after_a_while_and_the_first_is_not_disturbed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.1)
    first = reopen(layout)
    fill(first, DATA, range(5))
    for another in (lambda: reopen(layout), lambda: seed(layout, KEY, Path("/none"), SIZE, {}, chunk_size=CHUNK)):
        with pytest.raises(DiskError, match=r"cannot open the ingest .*: another task still writes it") as caught:
            another()
        assert (caught.value.code, caught.value.retryable) == (Code.DISK_STALLED, True)
    fill(first, DATA, range(5, 11))
    first.commit(sha256(DATA))
    assert layout.blob(sha256(DATA)).read_bytes() == DATA


@pytest.mark.parametrize("end", ["close", "commit", "discard"])
def test_the_one_who_waits_goes_on_where_the_other_ended(layout: Layout, end: str) -> None:
    first = reopen(layout)
    fill(first, DATA)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(reopen, layout)
        assert not waiting.done()
        match end:
            case "close":
                first.close()
            case "commit":
                first.commit(sha256(DATA))
            case _:
                first.close()
                discard(layout, KEY)  # or the waiting one came first
        second = waiting.result(timeout=10)
    assert end == "discard" or len(second.recorded()) == (11 if end == "close" else 0)
    assert discard(layout, KEY) is False  # its claim is on the folder that is there now
    fill(second, DATA)
    second.commit(sha256(DATA))
    assert layout.blob(sha256(DATA)).read_bytes() == DATA
    assert not layout.ingest_dir(KEY).exists()


def test_a_killed_writer_holds_nothing_back(layout: Layout) -> None:
    script = (
        "import sys, threading; from pathlib import Path\n"
        "from nvcache.store.ingest import Ingest; from nvcache.store.layout import Layout\n"
        "ingest = Ingest.open(Layout(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), chunk_size=int(sys.argv[4]))\n"
        "print('open', flush=True); threading.Event().wait(60)"
    )
    arguments = [sys.executable, "-c", script, str(layout.root), KEY, str(SIZE), str(CHUNK)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "open\n"
        assert discard(layout, KEY) is False
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
    ingest = reopen(layout)
    ingest.close()


def test_what_is_open_is_not_discarded(layout: Layout) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA, [0])
    assert discard(layout, KEY) is False
    ingest.close()
    assert kept_bytes(layout, KEY) == CHUNK
    assert discard(layout, KEY) is True
    assert not layout.ingest_dir(KEY).exists()
    assert discard(layout, KEY) is True


@pytest.mark.parametrize("hurt", ["replaced", "removed", "folder replaced"])
def test_only_the_file_that_was_written_is_committed(layout: Layout, tmp_path: Path, hurt: str) -> None:
    ingest = reopen(layout)
    fill(ingest, DATA)
    folder, other = layout.ingest_dir(KEY), noise(SIZE, seed=9)
    match hurt:
        case "replaced":
            (folder / "data").unlink()
            (folder / "data").write_bytes(other)
        case "removed":
            (folder / "data").unlink()
        case _:
            folder.rename(tmp_path / "aside")
            folder.mkdir()
            (folder / "data").write_bytes(other)
    if hurt == "folder replaced":  # the claimed folder still has the proven file
        ingest.commit(sha256(DATA))
        assert layout.blob(sha256(DATA)).read_bytes() == DATA
        return
    with pytest.raises(IntegrityError, match="was replaced or removed") as caught:
        ingest.commit(sha256(DATA))
    assert (caught.value.code, caught.value.retryable) == (Code.DEGRADED, True)
    ingest.close()
    assert not layout.blob(sha256(DATA)).exists()


def test_a_seed_takes_nothing_of_an_earlier_fill(layout: Layout, tmp_path: Path) -> None:
    ingest = reopen(layout)
    fill(ingest, noise(SIZE, seed=9), [7])
    ingest.close()
    source = tmp_path / "quarantined"
    source.write_bytes(DATA)
    seed(layout, KEY, source, SIZE, {0: xxhash.xxh3_64_intdigest(DATA[:CHUNK])}, chunk_size=CHUNK)
    ingest = reopen(layout)
    assert ingest.recorded().keys() == {0}
    ingest.close()
