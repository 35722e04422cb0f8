"""The system layer on real block devices: loop devices, real file systems, real mounts. It needs root; md, LVM and NVMe are tests/node's."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from nvcache.core.content import Content, Kind
from nvcache.core.disks import Blkid, Probe
from nvcache.core.tuning import Queue, Tuning, complaints, decide_tuning
from nvcache.engine.stripe import Stripe
from nvcache.errors import Code, DiskError
from nvcache.settings import DiskSettings
from nvcache.system import filesystem, probe, queue, udev
from nvcache.system.run import REAP, Tools
from nvcache.system.sysfs import Kernel
from nvcache.system.udev import Hotplug
from tests.support import blocks
from tests.support.disks import unmount
from tests.support.recorded import BLKID, HEADS, image

PROC = Path("/proc")
SIZE = 8 << 20
_ADD, _REMOVE = 0x4C80, 0x4C81  # LOOP_CTL_ADD, LOOP_CTL_REMOVE of linux/loop.h


def refusal(call: Callable[[], object]) -> DiskError:
    with pytest.raises(DiskError) as found:
        call()
    return found.value


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    """A blank disk."""
    with blocks.loop(image(tmp_path / "disk", b"", 320 << 20)) as found:  # less is too little for XFS; it stays sparse
        yield found


@pytest.fixture
def mounted(node: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The device number and the mount point of an ext4."""
    blocks.run("mkfs.ext4", "-q", node)
    number = Kernel().device(node)
    assert number is not None
    with blocks.mount(node, tmp_path / "point") as point:
        yield number[1], point


@pytest.mark.parametrize(("kind", "striped"), [("xfs", False), ("xfs", True), ("ext4", False)])
def test_make_and_mount(node: str, tmp_path: Path, kind: str, striped: bool) -> None:
    tools, kernel, point = Tools(), Kernel(), tmp_path / "point"
    filesystem.make(tools, node, kind, striped=striped)
    seen, content = probe.blkid(tools, node), probe.read_content(node)
    assert (seen.result, seen.type, seen.label, seen.uuid) == (Blkid.FOUND, kind, "nvcache", content.uuid)
    assert (content.kind, content.label) == (Kind(kind), "nvcache")
    if not kernel.knows(kind):
        return  # a kernel without XFS makes it all the same
    point.mkdir()
    filesystem.mount(tools, node, str(point), kind)
    mount = next(mount for mount in kernel.mounts() if mount.point == str(point))
    assert {"noatime", "nodev", "nosuid", "rw"} <= set(mount.options)
    filesystem.unmount(tools, str(point))
    assert not any(mount.point == str(point) for mount in kernel.mounts())


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
@pytest.mark.parametrize("there", ["ext4", "xfs", "swap", "md", "lvm"])
def test_nothing_is_made_over_something(tmp_path: Path, kind: str, there: str) -> None:
    path = image(tmp_path / "disk", HEADS[there])
    before = path.read_bytes()
    with blocks.loop(path) as node, pytest.raises(DiskError, match="is there") as found:
        filesystem.make(Tools(), node, kind, striped=True)
    assert found.value.code is Code.DISKS_REFUSED
    assert path.read_bytes() == before


# -- processes


def test_a_process_that_no_signal_ends_keeps_others_of_its_kind_away(mounted: tuple[str, Path], tmp_path: Path) -> None:
    """A write to a frozen file system waits in the kernel as one to a dead disk does."""
    point = mounted[1]
    for name, text in (("tool", f"echo $$ >> {tmp_path}/starts; : > {point}/file"), ("other", "echo fine")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    tools = Tools(f"{tmp_path}:/usr/bin:/bin")
    blocks.run("fsfreeze", "--freeze", str(point))
    try:
        begun = monotonic()
        assert refusal(lambda: tools.run("tool", timeout=0.3)).code is Code.TOOL_STALLED
        assert monotonic() - begun < 0.3 + REAP + 20
        begun = monotonic()
        error = refusal(lambda: tools.run("tool"))
        assert (error.code, monotonic() - begun < REAP) == (Code.TOOL_STALLED, True)
        (pid,) = (tmp_path / "starts").read_text().split()
        assert f"(pid {pid}) hangs in the kernel" in str(error)
        assert tools.run("other").out == "fine\n"
    finally:
        blocks.run("fsfreeze", "--unfreeze", str(point))
    ended = os.pidfd_open(int(pid))
    assert select.select([ended], [], [], 5)[0]
    os.close(ended)
    tools.run("tool")
    assert len((tmp_path / "starts").read_text().split()) == 2


# -- facts


def test_devices_of_this_machine(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", b"", 4 << 20)
    blocks.run("mkfs.ext4", "-q", str(disk))
    kernel = Kernel()
    with blocks.loop(disk) as node:
        (tmp_path / "link").symlink_to(node)
        found = os.stat(node).st_rdev
        expected = (Path(node).name, f"{os.major(found)}:{os.minor(found)}", 4 << 20)
        assert kernel.device(node) == kernel.device(str(tmp_path / "link")) == expected
        with blocks.mount(node, tmp_path / "a point"):
            mount = next(mount for mount in kernel.mounts() if mount.point == str(tmp_path / "a point"))
            assert (mount.number, mount.filesystem) == (expected[1], "ext4")
        with blocks.loop(Path(node)) as second:
            assert (Path(second).name, Path(node).name) in kernel.loops()
    assert kernel.device("/dev/null") is None
    assert kernel.device(str(disk)) is None
    assert kernel.device(str(tmp_path / "nothing")) is None


# -- witnesses


@pytest.mark.parametrize("name", sorted(BLKID))
def test_this_machines_blkid_reads_what_was_recorded(tmp_path: Path, name: str) -> None:
    here, there = (probe.blkid(Tools(), str(image(tmp_path / "disk", HEADS[name]))), dict(line.split("=", 1) for line in BLKID[name].splitlines()))
    assert (here.result, here.type, here.uuid, here.label) == (Blkid.FOUND, there["TYPE"], there["UUID"], there.get("LABEL"))


def test_blank_ambivalent_and_partitioned(tmp_path: Path) -> None:
    tools, blank = Tools(), tmp_path / "blank"
    blank.write_bytes(bytes(SIZE))
    assert probe.blkid(tools, str(blank)) == Probe(Blkid.NOTHING)
    two = image(tmp_path / "two", HEADS["xfs"][:1024] + HEADS["ext4"][1024:4096])
    assert probe.blkid(tools, str(two)).result is Blkid.AMBIVALENT
    assert probe.read_content(str(two)).kind is Kind.UNKNOWN
    table = bytes(446) + bytes.fromhex("00000000830000000008000000080000") + bytes(48) + b"\x55\xaa"
    found = probe.blkid(tools, str(image(tmp_path / "table", table)))
    assert (found.result, found.table, found.type) == (Blkid.FOUND, "dos", None)


def test_a_disk_is_held_by_one(node: str) -> None:
    with probe.held([node]) as first:
        assert isinstance(first[node], int)
        with probe.held([node]) as second:
            assert second == {node: None}
    with probe.held([node]) as third:
        assert third[node] is not None


def test_a_mount_holds_a_disk(node: str, tmp_path: Path) -> None:
    blocks.run("mkfs.ext4", "-q", node)
    content = probe.read_content(node)
    with blocks.mount(node, tmp_path / "point"):
        with probe.held([node]) as found:
            assert found == {node: None}
        assert refusal(lambda: probe.clear(node, content)).code is Code.DISKS_REFUSED
    assert probe.read_content(node).uuid == content.uuid


def test_one_that_cannot_be_opened_lets_go_of_all(node: str, tmp_path: Path) -> None:
    def both() -> None:
        with probe.held([node, str(tmp_path / "nothing")]):
            pass

    assert refusal(both).code is Code.DISK_IO
    with probe.held([node]) as found:
        assert found[node] is not None


def test_a_stale_node_is_refused(node: str, tmp_path: Path) -> None:
    """A node of this name that leads to another device, as is left where nobody removes nodes."""
    with blocks.loop(image(tmp_path / "other", b"")) as other:
        stale = tmp_path / Path(node).name
        os.mknod(stale, 0o600 | 0o060000, os.stat(other).st_rdev)
        error = refusal(lambda: probe.read_content(str(stale)))
        assert (error.code, error.facts["errno"]) == (Code.DISK_IO, "ESTALE")
        assert probe.blkid(Tools(), str(stale)).result is Blkid.FAILED
        assert refusal(lambda: probe.clear(str(stale), Content(Kind.BLANK))).code is Code.DISK_IO
        alias = tmp_path / "alias"
        os.mknod(alias, 0o600 | 0o060000, os.stat(other).st_rdev)
        assert isinstance(probe.read_content(str(alias)), Content)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_cleared_disk_is_blank_to_both_witnesses(tmp_path: Path, name: str) -> None:
    with blocks.loop(image(tmp_path / "disk", HEADS[name])) as node:
        assert probe.blkid(Tools(), node).result is Blkid.FOUND
        probe.clear(node, probe.read_content(node))
        assert probe.blkid(Tools(), node) == Probe(Blkid.NOTHING)
        assert probe.read_content(node) == Content(Kind.BLANK)


def test_clear_refuses_a_disk_that_somebody_holds(node: str) -> None:
    with probe.held([node]):
        assert refusal(lambda: probe.clear(node, probe.read_content(node))).code is Code.DISKS_REFUSED


# -- file systems


def test_a_busy_mount_stays_and_goes_lazily(mounted: tuple[str, Path]) -> None:
    number, point = mounted
    with (point / "file").open("w"):
        with pytest.raises(DiskError, match="busy") as found:
            filesystem.unmount(Tools(), str(point))
        assert found.value.code is Code.TOOL_FAILED
        filesystem.unmount(Tools(), str(point), lazy=True)
        assert not any(mount.number == number for mount in Kernel().mounts())
        assert filesystem.holders(PROC, number) == [f"{os.getpid()} {Path('/proc/self/comm').read_text().strip()}"]
    blocks.run("mount", f"/dev/{Kernel().sys.joinpath('dev/block', number).resolve().name}", str(point))


@pytest.mark.parametrize(
    "use",
    [
        "exec sleep 60 < {point}/file",
        "cd {point}; exec sleep 60",
        "exec {point}/sleep 60",
        "exec unshare --mount sleep 60",
    ],
)
def test_who_uses_it(mounted: tuple[str, Path], use: str) -> None:
    number, point = mounted
    (point / "file").touch()
    blocks.run("cp", "/usr/bin/sleep", str(point))
    assert filesystem.holders(PROC, number) == []
    user = subprocess.Popen(["sh", "-c", use.format(point=point)])
    try:
        until, never = monotonic() + 5, threading.Event()
        while not (found := filesystem.holders(PROC, number)) or " sleep" not in found[0]:
            assert monotonic() < until, found
            never.wait(0.05)
        assert found == [f"{user.pid} sleep{' (in its mount namespace)' if 'unshare' in use else ''}"]
    finally:
        user.kill()
        user.wait()
    assert filesystem.holders(PROC, number) == []


def test_a_mount_that_is_not_the_stripes_is_not_unmounted(mounted: tuple[str, Path], tmp_path: Path) -> None:
    number, point = mounted
    Stripe(DiskSettings(backend="md", mount=point, run_directory=tmp_path / "run")).let_go("9:127")
    assert [mount.number for mount in Kernel().mounts() if mount.point == str(point)] == [number]


# -- queues


@pytest.fixture
def queued(node: str) -> Iterator[Queue]:
    """What the queue of a blank disk says; put back afterwards, for a loop device keeps it when it is given another file."""
    before = queue.look(Kernel(), node)
    yield before
    for one in decide_tuning(
        Tuning(before.read_ahead, before.scheduler, before.rq_affinity), queue.look(Kernel(), node), [queue.look(Kernel(), node)]
    ):
        assert queue.put(Kernel(), one).met


def test_a_queue_is_set_and_what_the_kernel_refuses_is_told(queued: Queue) -> None:
    kernel, node = Kernel(), queued.device
    other = "mq-deadline" if queued.scheduler == "none" else "none"
    tuned = [queue.put(kernel, one) for one in decide_tuning(Tuning((2 << 20) + 5, other, 2), queued, [queued])]
    now = Queue(node, 2 << 20, other, 2)
    assert ([one.now for one in tuned], complaints(tuned), queue.look(kernel, node)) == ([2 << 20, other, 2], (), now)
    size, scheduler = complaints([queue.put(kernel, one) for one in decide_tuning(Tuning(1 << 60, "nope", 2), now, [now])])
    assert size == f"read_ahead of {node} is 2048 KiB, not 1125899906842624 KiB: the kernel refuses it (Invalid argument)"
    assert scheduler.startswith(f"scheduler of {node} is {other}, not nope: the kernel refuses it (Invalid argument); it offers none, ")
    assert queue.look(kernel, node) == now


# -- hot-plug


@contextmanager
def extra_loop(number: int) -> Iterator[None]:
    """Another loop device, which is a block device that comes and goes."""
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        fcntl.ioctl(control, _ADD, number)
        try:
            yield
        finally:
            fcntl.ioctl(control, _REMOVE, number)
    finally:
        os.close(control)


@pytest.fixture(params=["events", "listing"])
def sight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "listing":
        monkeypatch.setattr(udev, "_monitor", lambda: None)
        monkeypatch.setattr(udev, "POLL", 0.1)
    else:
        monkeypatch.setattr(udev, "POLL", 60.0)
    return str(request.param)


def quiet(watch: Hotplug) -> None:
    """Until other tests' devices have had their say."""
    while watch.wait(0.3):
        pass


def test_a_device_comes_and_goes(sight: str) -> None:
    with Hotplug() as watch:
        quiet(watch)
        begun = monotonic()
        with extra_loop(4077):
            assert watch.wait(5)
            quiet(watch)
        assert watch.wait(5)
        assert monotonic() - begun < 5


def test_one_that_came_and_went_between_two_waits_is_told(sight: str) -> None:
    with Hotplug() as watch:
        quiet(watch)
        with extra_loop(4078):
            pass
        assert watch.wait(0.3) is (sight == "events")  # the listing cannot know


# -- the mount point


def test_nobody_fills_a_sealed_mount_point_and_what_is_mounted_on_it_is_not_sealed(tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    try:
        filesystem.seal(point, sealed=True)
        with pytest.raises(PermissionError):
            (point / "models").mkdir()
        with mounted_tmpfs(point):
            (point / "models").mkdir()
            filesystem.seal(point, sealed=False)  # it is the directory below that is meant
        with pytest.raises(PermissionError):
            (point / "models").mkdir()
    finally:
        filesystem.seal(point, sealed=False)
    (point / "models").mkdir()
    filesystem.seal(point, sealed=True)  # somebody's files are in it: they stay his
    (point / "models").rmdir()
    filesystem.seal(tmp_path / "absent", sealed=True)


@contextmanager
def mounted_tmpfs(point: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)
    try:
        yield
    finally:
        unmount(point)
