"""What the keeper and the stripe must not do: throw a good stripe away, follow a link of the store's owner, take what is not theirs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from nvcache.core.disks import Rules
from nvcache.engine import clock, keeper
from nvcache.engine.failed import FailedDisks
from nvcache.engine.handover import StripeState, StripeStatus
from nvcache.engine.keeper import READ_STALL, SILENT_LOOKS, Keeper, _Loss, _Member
from nvcache.engine.lock import run_lock, taken_by_another
from nvcache.engine.scan import Scanner
from nvcache.engine.steps import Steps
from nvcache.engine.stripe import Report, Stripe
from nvcache.errors import Code, DiskError
from nvcache.settings import DiskSettings
from nvcache.system import probe
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel
from nvcache.system.udev import Hotplug


def watching(place: Path, *, doubted: bool = False) -> tuple[Keeper, _Member]:
    """A keeper of one disk, which is a file."""
    disk = place / "disk"
    disk.write_bytes(bytes(1 << 20))
    settings = DiskSettings(backend="md", mount=place / "mnt", run_directory=place / "run")
    found = Keeper(settings, lambda _: None, lambda _generation, _seconds: True, lambda: doubted)
    member = _Member("nvme0n1", str(disk), "S0", 1 << 20)
    found._members = [member]
    return found, member


@contextmanager
def no_files_left() -> Iterator[None]:
    """No file can be opened any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.open("/dev/null", os.O_RDONLY)
    holes = [last]
    while (more := os.open("/dev/null", os.O_RDONLY)) < last:
        holes.append(more)
    os.close(more)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes) + 1, hard))
    taken = []
    try:
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in (*holes, *taken):
            os.close(fd)


def test_a_process_without_files_left_blames_no_disk(tmp_path: Path) -> None:
    watch, _ = watching(tmp_path)
    (tmp_path / "mnt").mkdir()
    with no_files_left():
        assert watch._unreadable() is None
        assert watch._shut_down() is None
    assert watch._unreadable() is None


def test_a_process_without_files_left_sees_no_disks_vanish(tmp_path: Path) -> None:
    (tmp_path / "class/block").mkdir(parents=True)
    kernel = Kernel(sys=tmp_path)
    assert kernel.disks() == ()
    with no_files_left(), pytest.raises(DiskError):
        kernel.disks()


def test_a_pause_of_the_machine_blames_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process finds its deadline long past when it goes on, and the read not yet done; only a disk that stays silent then is dead."""
    watch, _ = watching(tmp_path)
    monkeypatch.setattr(keeper, "WATCH_EVERY", 0.05)
    real, ahead, answer = clock.monotonic, [0.0], threading.Event()
    monkeypatch.setattr(clock, "monotonic", lambda: real() + ahead[0])
    monkeypatch.setattr(probe, "read_block", lambda _node, _offset: answer.wait(30))
    assert watch._unreadable() is None
    ahead[0] = 10 * READ_STALL
    for _ in range(SILENT_LOOKS - 2):
        assert watch._unreadable() is None
    loss = watch._unreadable()
    answer.set()
    assert loss is not None
    assert loss.serials == {"S0"}


def test_many_slow_reads_are_no_dead_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, member = watching(tmp_path, doubted=True)
    monkeypatch.setattr(keeper, "WATCH_EVERY", 0.05)
    monkeypatch.setattr(keeper, "READ_STALL", 0.3)
    never = threading.Event()
    monkeypatch.setattr(probe, "read_block", lambda _node, _offset: never.wait(0.03))  # 64 of them take two seconds
    for _ in range(12):
        assert watch._unreadable() is None
        assert member.reading is not None


def test_one_failed_read_is_tried_again_and_a_second_is_the_disks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = watching(tmp_path)
    failures = [DiskError(Code.DISK_IO, "cannot read")]

    def read(_node: str, _offset: int) -> None:
        if failures:
            raise failures.pop()

    def looked() -> Any:
        """What is told once the read is over, which on a busy machine may be after the look that began it."""
        loss = watch._unreadable()
        while loss is None and any(member.reading for member in watch._members):
            loss = watch._unreadable()
        return loss

    monkeypatch.setattr(probe, "read_block", read)
    assert looked() is None
    failures += [DiskError(Code.DISK_IO, "cannot read")] * 2
    loss = looked()
    assert loss is not None
    assert loss.serials == {"S0"}


def test_a_stripe_that_is_well_is_said_to_be_so_at_each_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the file's time tells how fresh the word is, and a file that somebody removed is there again."""
    watch, _ = watching(tmp_path)
    said: list[StripeState] = []
    losses = iter([None, None, _Loss("a disk vanished")])
    watch.publish = said.append
    watch._state = StripeState(7, StripeStatus.MOUNTED, fs_uuid="uuid-1", store="/mnt/x/store")
    monkeypatch.setattr(watch, "_lost", lambda _report: next(losses))
    monkeypatch.setattr(watch, "_withdraw", lambda _loss: None)
    watch._watch(Mock(Hotplug), Report("Unchanged", "C1", None, "our stripe is mounted"))
    assert said == [watch._state] * 2


def test_looking_again_and_again_leaves_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(10):
        assert Scanner(Tools(), Kernel(), Rules(mount=str(tmp_path))).marker() is None
    assert threading.active_count() == before


# -- what is refused is tried again


@contextmanager
def another_at_the_disks(place: Path) -> Iterator[None]:
    """Another process has the lock of `watching`'s keeper, as `disks wipe` would."""
    code = "import sys, pathlib; from nvcache.engine.lock import run_lock\nwith run_lock(pathlib.Path(sys.argv[1]), 'x'): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, place / "run/lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield
        other.communicate(b"\n", timeout=60)
    assert other.returncode == 0


class Tries:
    """A keeper's tries, in a time that passes only while it waits. Each is refused with `code`; at the times of `plan` something is done."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, code: str, plan: dict[float, Callable[[], object]]) -> None:
        self.now = 0.0
        self.at: list[float] = []
        self._plan = plan
        self._keeper, _ = watching(place)
        self._report = Report("Refused", "C3", code, "so it is", codes=(code,))
        monkeypatch.setattr(clock, "monotonic", lambda: self.now)
        monkeypatch.setattr(self._keeper, "_stop", Mock(threading.Event, wait=self.wait, is_set=lambda: self.now > 2000))
        monkeypatch.setattr(keeper, "Hotplug", lambda: Mock(Hotplug, __enter__=lambda it: it, __exit__=lambda *_: None, wait=self.wait))
        monkeypatch.setattr(Stripe, "_run", self._try)
        self._keeper.run()
        self.gaps = [after - before for before, after in zip(self.at, self.at[1:], strict=False)]

    def wait(self, seconds: float) -> bool:
        """No device comes or goes."""
        self.now += max(0.0, seconds)
        for when in [when for when in self._plan if when <= self.now]:
            self._plan.pop(when)()
        return False

    def _try(self, *_: object) -> Report:
        self.at.append(self.now)
        return self._report


def test_a_refusal_is_tried_again_ever_less_often_and_the_keepers_own_lock_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tries(tmp_path, monkeypatch, "N03", {}).gaps == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300, 300]


@pytest.mark.parametrize("code", ["N04", "N07", "N09", "D08", "D12", "D13"])
def test_what_is_in_use_is_tried_again_every_half_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    assert Tries(tmp_path, monkeypatch, code, {}).gaps[:6] == [5, 10, 20, 30, 30, 30]


def test_disks_that_another_command_changed_are_looked_at_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wipe() -> None:
        with another_at_the_disks(tmp_path):
            pass

    tries = Tries(tmp_path, monkeypatch, "N03", {700.5: wipe})
    first = next(when for when in tries.at if when > 700.5)
    assert first <= 702
    assert [when - first for when in tries.at if when > first][:4] == [5, 15, 35, 75], "it is news once, and what it did may take a moment to show"


def test_a_command_that_is_still_at_the_disks_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as wipe:
        plan = {700.0: lambda: wipe.enter_context(another_at_the_disks(tmp_path)), 720.0: wipe.close}
        tries = Tries(tmp_path, monkeypatch, "N03", plan)
    assert not [when for when in tries.at if 700 < when < 720]
    assert next(when for when in tries.at if when > 720) <= 726


def test_who_had_a_lock_last_is_told_without_following_links_or_waiting(tmp_path: Path) -> None:
    lock = tmp_path / "run/lock"
    assert not taken_by_another(lock)
    with another_at_the_disks(tmp_path):
        assert taken_by_another(lock)
    assert taken_by_another(lock)
    (tmp_path / "link").symlink_to(lock)
    os.mkfifo(tmp_path / "pipe")
    assert not taken_by_another(tmp_path / "link")
    assert not taken_by_another(tmp_path / "pipe")
    with run_lock(lock, "look"):
        assert not taken_by_another(lock)
    assert not taken_by_another(lock)
    lock.write_text("")  # somebody is about to write it
    assert not taken_by_another(lock)


# -- the store's owner and the run directory


@pytest.mark.parametrize("name", ["store", "store/models", "store/hub"])
@pytest.mark.parametrize("there", ["link", "dangling", "file"])
def test_what_the_owner_puts_in_a_folders_place_is_neither_followed_nor_changed(tmp_path: Path, name: str, there: str) -> None:
    mount, theirs = tmp_path / "mnt", tmp_path / "theirs"
    (mount / name).parent.mkdir(parents=True)
    theirs.mkdir(mode=0o700)
    if there == "file":
        (mount / name).write_text("x")
    else:
        (mount / name).symlink_to(theirs if there == "link" else tmp_path / "nowhere")
    stripe = Stripe(DiskSettings(backend="md", mount=mount, run_directory=tmp_path / "run", store_owner=f"{os.geteuid()}:12345"))
    with pytest.raises(DiskError) as refused:
        stripe.furnish()
    assert refused.value.code is Code.DISKS_REFUSED
    assert theirs.stat().st_mode & 0o777 == 0o700
    assert theirs.stat().st_gid != 12345
    assert not (tmp_path / "nowhere").exists()


def test_the_store_is_given_to_its_owner(tmp_path: Path) -> None:
    stripe = Stripe(DiskSettings(backend="md", mount=tmp_path, run_directory=tmp_path / "run", store_owner=f"{os.geteuid()}:12345"))
    for _ in range(2):
        stripe.furnish()
    for folder in (tmp_path / "store", tmp_path / "store/models", tmp_path / "store/hub"):
        assert (folder.stat().st_gid, folder.stat().st_mode & 0o777) == (12345, 0o755)


def test_a_run_directory_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "link").symlink_to(theirs)
    with pytest.raises(DiskError), run_lock(tmp_path / "link/lock", "change the disks"):
        pass
    os.chown(theirs, 65532, 65532)
    with pytest.raises(DiskError) as refused, run_lock(theirs / "lock", "change the disks"):
        pass
    assert refused.value.code is Code.DISKS_REFUSED
    assert list(theirs.iterdir()) == []


def test_what_a_keeper_is_at_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run/lock"
    with ExitStack() as keeper:
        keeper.enter_context(run_lock(path, "look"))
        with pytest.raises(DiskError, match=f"the process {os.getpid()} does so just now"), run_lock(path, "change the disks"):
            pass
        threading.Timer(0.2, keeper.close).start()
        told: list[str] = []
        with run_lock(path, "change the disks", patience=60, say=told.append):
            assert told == [f"the process {os.getpid()} is at the disks: waiting up to 60 s for it"]
        with run_lock(path, "change the disks", patience=60, say=told.append):
            assert len(told) == 1, "nobody is waited for"


def test_a_mount_point_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    scanner = Scanner(Tools(), Kernel(), Rules())
    for point in (tmp_path / "link", tmp_path / "link/mnt"):
        with pytest.raises(DiskError) as refused:
            Steps(scanner, ExitStack(), say=print, furnish=lambda: None, lazy=False)._mount("/dev/null", str(point), "xfs")
        assert refused.value.code is Code.DISKS_REFUSED
    assert not Path("/etc/mnt").exists()


def test_a_failed_disk_that_cannot_be_noted_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("")
    FailedDisks(tmp_path / "run").add(frozenset({"S0"}))
    assert "S0" in caplog.text
