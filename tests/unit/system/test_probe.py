"""The two witnesses and the one eraser, on files that begin as real disks did."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.content import ENDS, Content, Kind, claim, is_claim, recognise
from nvcache.core.disks import Blkid
from nvcache.errors import Code, DiskError
from nvcache.system import probe
from nvcache.system.run import Finished, Tools
from tests.support.recorded import BLKID, HEADS, image

OURS = {"md": Kind.MD, "lvm": Kind.LVM, "xfs": Kind.XFS, "ext4": Kind.EXT4}
SIZE = 8 << 20


def fake(folder: Path, text: str) -> Tools:
    (folder / "blkid").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "blkid").chmod(0o755)
    return Tools(f"{folder}:/usr/bin:/bin")


def refusal(call: Callable[[], object]) -> DiskError:
    with pytest.raises(DiskError) as found:
        call()
    return found.value


# -- the first witness


@pytest.mark.parametrize("name", ["md", "xfs", "ext4", "lvm", "swap", "other-vg", "level-1"])
def test_recorded_answers(name: str) -> None:
    found = probe.parse_blkid(Finished((), 0, BLKID[name], ""))
    assert found.result is Blkid.FOUND
    told = dict(line.split("=", 1) for line in BLKID[name].splitlines())
    assert (found.type, found.uuid, found.label, found.table) == (told["TYPE"], told["UUID"], told.get("LABEL"), None)


@pytest.mark.parametrize("name", sorted(OURS))
def test_both_witnesses_name_the_same_thing(name: str, tmp_path: Path) -> None:
    """The bytes are those of real mdadm, LVM and mkfs, and so is what blkid said of them."""
    path = str(image(tmp_path / "disk", HEADS[name]))
    told, content = probe.parse_blkid(Finished((), 0, BLKID[name], "")), probe.read_content(path)
    assert (content.kind, content.uuid) == (OURS[name], told.uuid)
    assert content.label == {"md": "any:nvcache", "lvm": None}.get(name, "nvcache")
    if name == "md":
        assert (content.level, content.members, content.role) == (0, 4, 2)
        assert told.label == "any:nvcache"


@pytest.mark.parametrize(("name", "kind"), [("swap", Kind.UNKNOWN), ("other-vg", Kind.LVM), ("level-1", Kind.UNKNOWN)])
def test_what_is_not_ours(name: str, kind: Kind, tmp_path: Path) -> None:
    """`level-1` is an array over an old ext4: two signatures."""
    assert probe.read_content(str(image(tmp_path / "disk", HEADS[name]))).kind is kind


def test_a_device_that_is_not_there_is_not_blank(tmp_path: Path) -> None:
    """blkid itself ends with the status of a blank disk and says nothing."""
    found = probe.blkid(Tools(), str(tmp_path / "nothing"))
    assert (found.result, "ENOENT" in found.why) == (Blkid.FAILED, True)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("exit 0", Blkid.FAILED),
        ("echo DEVNAME=x; exit 0", Blkid.FAILED),
        ("echo TYPE=; exit 0", Blkid.FAILED),
        ("echo TYPE=xfs; exit 2", Blkid.FAILED),
        ("echo 'Fehler: Eingabe/Ausgabefehler' >&2; exit 2", Blkid.FAILED),
        ("echo TYPE=xfs; exit 1", Blkid.FAILED),
        ("exit 4", Blkid.FAILED),
        ("exit 127", Blkid.FAILED),
        ("kill -9 $$", Blkid.FAILED),
        ("head -c 3000000 /dev/zero; exit 2", Blkid.FAILED),
        ("echo ambivalent >&2; exit 8", Blkid.AMBIVALENT),
        ("exit 2", Blkid.NOTHING),
        ("echo TYPE=xfs; exit 0", Blkid.FOUND),
        ("echo PTTYPE=gpt; exit 0", Blkid.FOUND),
    ],
)
def test_hostile_answers(tmp_path: Path, answer: str, result: Blkid) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    found = probe.blkid(fake(tmp_path, answer), str(tmp_path / "disk"))
    assert found.result is result
    assert bool(found.why) is (result in (Blkid.FAILED, Blkid.AMBIVALENT))


def test_what_cannot_be_asked_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    assert refusal(lambda: probe.blkid(Tools("/nowhere"), str(tmp_path / "disk"))).code is Code.TOOL_MISSING


@given(
    st.integers(-20, 260), st.text() | st.lists(st.sampled_from(["TYPE=xfs", "UUID=\\ \\=", "=", "LABEL=a=b", "PTTYPE="])).map("\n".join), st.text()
)
def test_whatever_blkid_says(status: int, out: str, err: str) -> None:
    found = probe.parse_blkid(Finished((), status, out, err))
    if found.result is Blkid.NOTHING:
        assert (status, out.strip(), err.strip()) == (2, "", "")
    if found.result is Blkid.FOUND:
        assert status == 0
        assert found.type or found.table


def test_escapes_are_undone() -> None:
    assert probe.parse_blkid(Finished((), 0, "TYPE=LVM2_member\nLABEL=a\\ b\\\\c\\$\n", "")).label == "a b\\c$"


# -- the second witness


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
def test_blank_disks(tmp_path: Path, filler: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(filler * ENDS + b"data" * (ENDS // 4) + filler * ENDS)
    assert probe.read_content(str(path)) == Content(Kind.BLANK)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert probe.read_content(str(path)) == Content(Kind.UNKNOWN)


def test_a_descriptor_will_do(tmp_path: Path) -> None:
    with image(tmp_path / "disk", HEADS["xfs"]).open("rb") as file:
        assert probe.read_content(file.fileno()).kind is Kind.XFS
        assert file.read(4) == b"XFSB"  # and is left as it was


@pytest.mark.parametrize(("content", "name"), [(b"", "ENODATA"), (bytes(100), "ENODATA"), (None, "ENOENT")])
def test_what_cannot_be_read_is_not_blank(tmp_path: Path, content: bytes | None, name: str) -> None:
    if content is not None:
        (tmp_path / "disk").write_bytes(content)
    error = refusal(lambda: probe.read_content(str(tmp_path / "disk")))
    assert (error.code, error.facts["errno"]) == (Code.DISK_IO, name)


def test_a_read_error_names_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENODATA is what a failing NVMe read gives with O_DIRECT; the loop device's own file cannot be made to give it."""

    def failing(*_: object) -> int:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    path = str(image(tmp_path / "disk", HEADS["xfs"]))
    monkeypatch.setattr(os, "preadv", failing)
    assert str(refusal(lambda: probe.read_content(path))) == f"cannot read the ends of {path}: No data available (ENODATA)"


def test_a_short_read_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(image(tmp_path / "disk", bytes(4096)))
    monkeypatch.setattr(os, "preadv", lambda *_: 512)
    assert refusal(lambda: probe.read_content(path)).code is Code.DISK_IO


def hold(node: str) -> None:
    with probe.held([node], timeout=0.2):
        pass


def test_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    """Opening a FIFO that nobody writes to hangs as a stalled disk does."""
    path = tmp_path / "disk"
    os.mkfifo(path)
    try:
        for call in (lambda: probe.read_content(str(path), timeout=0.2), lambda: hold(str(path))):
            begun = monotonic()
            assert refusal(call).code is Code.DISK_STALLED
            assert monotonic() - begun < 30
    finally:
        os.close(os.open(path, os.O_RDWR))  # lets the threads go


# -- locks


def locks(paths: list[str], patience: float = 0.2) -> None:
    with probe.locked(paths, patience=patience):
        pass


def test_locks_are_all_or_none(tmp_path: Path) -> None:
    paths = [str(image(tmp_path / name, b"", 4096)) for name in "ab"]
    with open(paths[1]) as udev:
        fcntl.flock(udev, fcntl.LOCK_SH)
        error = refusal(lambda: locks(paths))
        assert (error.code, paths[1] in str(error)) == (Code.DISKS_BUSY, True)
        with open(paths[0]) as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with probe.locked(paths), open(paths[0]) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    locks(paths)


def test_a_short_probe_of_udev_is_waited_for(tmp_path: Path) -> None:
    path = str(image(tmp_path / "disk", b"", 4096))
    udev = os.open(path, os.O_RDONLY)
    fcntl.flock(udev, fcntl.LOCK_SH)
    timer = threading.Timer(0.3, os.close, (udev,))
    timer.start()
    locks([path], patience=5)
    timer.join()


# -- the eraser; what it may not erase on real devices is in tests/integration


@pytest.mark.parametrize("name", [*sorted(OURS), "swap"])
def test_clear_leaves_both_ends_zero_and_the_rest_alone(tmp_path: Path, name: str) -> None:
    path = image(tmp_path / "disk", HEADS[name])
    with path.open("r+b") as file:
        for at, text in ((SIZE - ENDS, b"tail" * (ENDS // 4)), (ENDS, b"near"), (SIZE - ENDS - 4, b"near")):
            file.seek(at)
            file.write(text)
    inner = path.read_bytes()[ENDS:-ENDS]
    probe.clear(str(path), probe.read_content(str(path)))
    after = path.read_bytes()
    assert after[:ENDS] == after[-ENDS:] == bytes(ENDS)
    assert after[ENDS:-ENDS] == inner


@pytest.mark.parametrize("expected", [Content(Kind.BLANK), Content(Kind.UNKNOWN), Content(Kind.XFS, "0" * 36, "nvcache")])
def test_clear_refuses_what_it_did_not_expect(tmp_path: Path, expected: Content) -> None:
    path = image(tmp_path / "disk", HEADS["xfs"])
    before = path.read_bytes()
    assert refusal(lambda: probe.clear(str(path), expected)).code is Code.DISKS_REFUSED
    assert path.read_bytes() == before


def test_clear_refuses_a_tiny_disk(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", b"", 2 * ENDS - 4096)
    os.truncate(path, 2 * ENDS - 4096)
    assert refusal(lambda: probe.clear(str(path), probe.read_content(str(path)))).code is Code.DISKS_REFUSED


def test_clear_gives_up_before_it_writes_when_nobody_waits_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "disk", HEADS["md"])
    content, before = probe.read_content(str(path)), path.read_bytes()
    slow, read = threading.Event(), os.preadv

    def stalled(*args: object) -> int:
        slow.wait(5)
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", stalled)
    assert refusal(lambda: probe.clear(str(path), content, timeout=0.2)).code is Code.DISK_STALLED
    slow.set()
    for thread in threading.enumerate():
        if thread.name.startswith("disk: clear"):
            thread.join(5)
    assert path.read_bytes() == before


class Dies(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", sorted(OURS))
def test_clear_that_dies_leaves_the_disk_ours_or_blank(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call that changes the disk: the process dies before it."""
    write, sync = os.pwritev, os.fsync
    ended = False
    for last in range(20):
        path = str(image(tmp_path / "disk", HEADS[name]))
        content = probe.read_content(path)
        left = last

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def inner(*args: object) -> object:
                nonlocal left
                if left == 0:
                    raise Dies
                left -= 1
                return call(*args)

            return inner

        monkeypatch.setattr(os, "pwritev", counted(write))
        monkeypatch.setattr(os, "fsync", counted(sync))
        try:
            probe.clear(path, content)
            ended = True
        except Dies:
            assert probe.read_content(path) in (content, Content(Kind.BLANK))
        if ended:
            assert probe.read_content(path) == Content(Kind.BLANK)
            assert last >= 5  # three writes at least and two flushes were tried
            return
    pytest.fail("it never ended")


@pytest.mark.parametrize("name", sorted(OURS))
def test_clear_and_a_power_cut(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that were not flushed may reach the disk or not, each by itself."""
    path = image(tmp_path / "disk", HEADS[name])
    before, content = path.read_bytes(), probe.read_content(str(path))
    write, sync = os.pwritev, os.fsync
    phases: list[list[tuple[int, int]]] = [[]]

    def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
        phases[-1].append((offset, sum(len(part) for part in buffers)))
        return write(fd, buffers, offset)

    def flushed(fd: int) -> None:
        sync(fd)
        phases.append([])

    monkeypatch.setattr(os, "pwritev", noted)
    monkeypatch.setattr(os, "fsync", flushed)
    probe.clear(str(path), content)
    assert [len(phase) > 0 for phase in phases] == [True, True, False]
    disk = bytearray(before)
    for phase in phases:
        for taken in product((False, True), repeat=len(phase)):
            torn = bytearray(disk)
            for (offset, size), reached in zip(phase, taken, strict=True):
                if reached:
                    torn[offset : offset + size] = bytes(size)
            assert recognise(bytes(torn[:ENDS]), bytes(torn[-ENDS:])) in (content, Content(Kind.BLANK))
        for offset, size in phase:
            disk[offset : offset + size] = bytes(size)


# -- claims


def blank(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(bytes(SIZE))
    return path


def test_a_disk_is_claimed_while_something_is_made_on_it(tmp_path: Path) -> None:
    path = blank(tmp_path)
    with probe.claimed({str(path): "S1"}):
        assert probe.read_content(str(path)) == Content(Kind.CLAIM, label="S1")
        with path.open("r+b") as disk:
            disk.write(b"half of something")
        assert probe.read_content(str(path)) == Content(Kind.CLAIM, label="S1")
    assert probe.read_content(str(path)) == Content(Kind.UNKNOWN)
    assert path.read_bytes() == b"half of something".ljust(SIZE, b"\0")


def test_a_failure_leaves_the_claim_and_clear_takes_it_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blank(tmp_path)

    def make() -> None:
        with probe.claimed({str(path): "S1"}), path.open("r+b") as disk:
            disk.write(b"half")
            raise DiskError(Code.TOOL_FAILED, "mkfs failed")

    assert refusal(make).code is Code.TOOL_FAILED
    claimed = Content(Kind.CLAIM, label="S1")
    sync = os.fsync

    def flushed(fd: int) -> None:
        seen.append(probe.read_content(str(path)))
        sync(fd)

    seen: list[Content] = []
    monkeypatch.setattr(os, "fsync", flushed)
    probe.clear(str(path), claimed)
    assert seen == [claimed, Content(Kind.BLANK)]


def test_only_a_blank_disk_is_claimed_and_only_a_claim_taken_away(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", HEADS["ext4"])
    before = path.read_bytes()

    def take() -> None:
        with probe.claimed({str(path): "S1"}):
            pytest.fail("it was claimed")

    assert refusal(take).code is Code.DISKS_REFUSED
    probe.unclaim(str(path), "S1")
    assert path.read_bytes() == before


def test_a_file_that_looks_like_the_claim_of_another_disk_is_left_alone(tmp_path: Path) -> None:
    """The last MiB of a stripe holds files, and whoever publishes a model chooses its bytes."""
    path = image(tmp_path / "disk", HEADS["ext4"])
    with path.open("r+b") as disk:
        disk.seek(-ENDS, os.SEEK_END)
        disk.write(claim("S2"))
    before = path.read_bytes()
    probe.unclaim(str(path), "S1")
    assert path.read_bytes() == before


@given(at=st.integers(0, 4095), bit=st.integers(0, 7))
def test_a_torn_claim_is_none(at: int, bit: int) -> None:
    block = bytearray(claim("S1"))
    assert is_claim(bytes(block))
    block[at] ^= 1 << bit
    assert not is_claim(bytes(block))
