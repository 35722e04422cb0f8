"""Queue files read and written in a tree like the kernel's; what a real kernel refuses is tried in tests/integration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from nvcache.core.tuning import Knob, Queue, Tuned
from nvcache.system import queue
from nvcache.system.sysfs import Kernel
from tests.support.recorded import build

NVME = {"dev": "259:0", "queue/read_ahead_kb": "128\n", "queue/scheduler": "none [mq-deadline] kyber\n", "queue/rq_affinity": "1\n"}


def tree(folder: Path) -> Kernel:
    """A disk, an array (whose queue has neither scheduler nor completions of its own), and a device whose files say nothing."""
    odd = {"dev": "259:1", "queue/read_ahead_kb": "much\n", "queue/scheduler": "\n", "queue/rq_affinity": "\n"}
    return build(folder, {"nvme0n1": NVME, "md127": {"dev": "9:127", "queue/read_ahead_kb": "8192\n"}, "nvme1n1": odd})


def file(folder: Path, name: str, setting: str) -> Path:
    return folder / "sys/class/block" / name / "queue" / setting


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[none] mq-deadline kyber bfq", ("none", ("none", "mq-deadline", "kyber", "bfq"))),
        ("none [mq-deadline]", ("mq-deadline", ("none", "mq-deadline"))),
        ("none", ("none", ("none",))),
        ("", (None, ())),
        (None, ("none", ())),
    ],
)
def test_the_scheduler_in_use_is_the_one_in_brackets(text: str | None, found: tuple[str | None, tuple[str, ...]]) -> None:
    assert queue.parse_scheduler(text) == found


def test_what_a_queue_says(tmp_path: Path) -> None:
    kernel = tree(tmp_path)
    assert queue.look(kernel, "/dev/nvme0n1") == Queue("/dev/nvme0n1", 128 << 10, "mq-deadline", 1)
    assert queue.look(kernel, "/dev/md127") == Queue("/dev/md127", 8 << 20, "none", None)
    assert queue.look(kernel, "/dev/nvme1n1") == Queue("/dev/nvme1n1", None, None, None)
    assert queue.look(kernel, "/dev/gone") == Queue("/dev/gone", None, "none", None)


@pytest.mark.parametrize(
    ("knob", "wanted", "setting", "written"),
    [(Knob.READ_AHEAD, 4 << 20, "read_ahead_kb", "4096"), (Knob.SCHEDULER, "none", "scheduler", "none"), (Knob.RQ_AFFINITY, 2, "rq_affinity", "2")],
)
def test_a_value_is_written_as_the_kernel_counts_and_read_back(tmp_path: Path, knob: Knob, wanted: int | str, setting: str, written: str) -> None:
    asked = Tuned("/dev/nvme0n1", knob, None, wanted, None)
    told = queue.put(tree(tmp_path), asked)
    assert (told.now, told.why, told.met) == (wanted, "", True)
    assert file(tmp_path, "nvme0n1", setting).read_text() == written


def test_what_is_as_wanted_is_not_written(tmp_path: Path) -> None:
    kernel = tree(tmp_path)
    before = file(tmp_path, "nvme0n1", "scheduler").stat()
    done = Tuned("/dev/nvme0n1", Knob.SCHEDULER, "mq-deadline", "mq-deadline", "mq-deadline")
    absent = Tuned(None, Knob.READ_AHEAD, None, 4 << 20, None)
    assert [queue.put(kernel, each) for each in (done, absent)] == [done, absent]
    assert file(tmp_path, "nvme0n1", "scheduler").stat() == before


def test_a_queue_without_the_setting_is_told_and_no_file_is_made(tmp_path: Path) -> None:
    told = queue.put(tree(tmp_path), Tuned("/dev/md127", Knob.RQ_AFFINITY, None, 2, None))
    assert (told.now, told.why) == (None, "it has no such setting")
    assert not file(tmp_path, "md127", "rq_affinity").exists()
    told = queue.put(tree(tmp_path / "again"), Tuned("/dev/md127", Knob.SCHEDULER, "none", "bfq", "none"))
    assert (told.now, told.why) == ("none", "it has no such setting")


def test_what_cannot_be_written_is_told_with_what_is_there(tmp_path: Path) -> None:
    kernel = tree(tmp_path)
    place = file(tmp_path, "nvme0n1", "scheduler")
    place.unlink()
    place.mkdir()
    told = queue.put(kernel, Tuned("/dev/nvme0n1", Knob.SCHEDULER, "bfq", "none", "bfq"))
    assert (told.now, told.why) == (None, "the kernel refuses it (Is a directory)")


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Kernel]:
    """The tree with a FIFO for each disk's scheduler: to open it does not return, as a write to a queue with requests that never end."""
    kernel = tree(tmp_path)
    pipes = []
    for name in ("nvme0n1", "nvme1n1"):
        place = file(tmp_path, name, "scheduler")
        place.unlink()
        os.mkfifo(place)
        pipes.append(place.rename(tmp_path / name))
        place.symlink_to(tmp_path / name)
    yield kernel
    for name, pipe in zip(("nvme0n1", "nvme1n1"), pipes, strict=True):  # whoever is left behind comes free, and finds a plain file
        file(tmp_path, name, "scheduler").unlink()
        file(tmp_path, name, "scheduler").write_text("none")
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def test_a_queue_that_does_not_answer_is_not_waited_for(silent: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "PATIENCE", 0.2)
    begun = monotonic()
    told = queue.put(silent, Tuned("/dev/nvme0n1", Knob.SCHEDULER, "bfq", "none", "bfq"))
    assert queue.look(silent, "/dev/nvme1n1") == Queue("/dev/nvme1n1", None, None, None)
    assert monotonic() - begun < 30
    assert (told.met, told.now) == (False, None)
    assert "no answer" in told.why
