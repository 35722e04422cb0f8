"""What is set of a stripe's queues: a floor that never lowers, values as the table has them, and nothing that nobody asked for."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.tuning import AT_LEAST, Knob, Queue, Tuned, Tuning, change, complaints, decide_tuning

DISKS = ("/dev/nvme0n1", "/dev/nvme1n1", "/dev/nvme2n1")
ARRAY = Queue("/dev/md127", 128 << 10, "none", None)
SCHEDULERS = st.sampled_from(("none", "mq-deadline", "kyber", "bfq"))
TUNINGS = st.builds(Tuning, st.none() | st.integers(0, 1 << 30), st.none() | SCHEDULERS, st.none() | st.integers(0, 2))


def queues(device: str) -> st.SearchStrategy[Queue]:
    size = st.integers(0, 1 << 14).map(lambda pages: pages << 16)
    return st.builds(Queue, st.just(device), st.none() | size, st.none() | SCHEDULERS, st.none() | st.integers(0, 2))


def disks(*schedulers: str) -> list[Queue]:
    return [Queue(device, 128 << 10, scheduler, 1) for device, scheduler in zip(DISKS, schedulers, strict=True)]


def obey(queue: Queue, tuned: tuple[Tuned, ...]) -> Queue:
    """The queue after a kernel took every value."""
    return replace(queue, **{str(one.knob): one.wanted for one in tuned if one.device == queue.device})  # type: ignore[arg-type]


def test_without_a_table_the_read_ahead_is_raised_and_schedulers_are_taken_away() -> None:
    found = decide_tuning(Tuning(), ARRAY, disks("none", "mq-deadline", "bfq"))
    assert [(one.device, one.knob, one.was, one.wanted, one.met) for one in found] == [
        ("/dev/md127", Knob.READ_AHEAD, 128 << 10, AT_LEAST, False),
        (DISKS[0], Knob.SCHEDULER, "none", "none", True),
        (DISKS[1], Knob.SCHEDULER, "mq-deadline", "none", False),
        (DISKS[2], Knob.SCHEDULER, "bfq", "none", False),
    ]
    assert all(one.now == one.was for one in found)


@given(TUNINGS, queues("/dev/md127"), st.tuples(*map(queues, DISKS)))
def test_once_set_nothing_is_left_to_set_and_the_rest_is_as_it_was(tuning: Tuning, top: Queue, members: tuple[Queue, ...]) -> None:
    wanted = decide_tuning(tuning, top, members)
    top_after, after = obey(top, wanted), [obey(member, wanted) for member in members]
    assert all(one.met for one in decide_tuning(tuning, top_after, after))
    assert (top_after.scheduler, top_after.rq_affinity) == (top.scheduler, top.rq_affinity)
    assert [member.read_ahead for member in after] == [member.read_ahead for member in members]
    if tuning.read_ahead is None:
        assert (top_after.read_ahead or 0) >= max(AT_LEAST, top.read_ahead or 0)
    else:
        assert 0 <= tuning.read_ahead - (top_after.read_ahead or 0) < 1 << 16  # down to whole pages, as the kernel has it
    for name in ("scheduler", "rq_affinity"):
        value = getattr(tuning, name)
        assert value is not None or [getattr(member, name) for member in after] == [getattr(member, name) for member in members]


def test_one_disk_is_the_mounted_device_and_the_member() -> None:
    disk = Queue("/dev/nvme0n1", 128 << 10, "kyber", 1)
    found = decide_tuning(Tuning(1 << 20, "none", 2), disk, [disk])
    assert [(one.device, str(one.knob), one.wanted) for one in found] == [
        ("/dev/nvme0n1", "read_ahead", 1 << 20),
        ("/dev/nvme0n1", "scheduler", "none"),
        ("/dev/nvme0n1", "rq_affinity", 2),
    ]


def test_a_change_in_words_names_equal_ones_together() -> None:
    found = decide_tuning(Tuning(), ARRAY, disks("bfq", "none", "bfq"))
    assert change(found) == "set read_ahead of /dev/md127 from 128 KiB to 4096 KiB, scheduler of /dev/nvme0n1, /dev/nvme2n1 from bfq to none"
    assert change(decide_tuning(Tuning(), replace(ARRAY, read_ahead=8 << 20), disks("none", "none", "none"))) is None


def test_a_stripe_that_is_not_there_yet_is_told_what_it_will_get() -> None:
    assert change(decide_tuning(Tuning(), None, disks("none", "none", "none"))) == "set read_ahead of the stripe to at least 4096 KiB"
    assert change(decide_tuning(Tuning(read_ahead=1 << 20), None, [])) == "set read_ahead of the stripe to 1024 KiB"


def test_what_cannot_be_read_is_set_all_the_same() -> None:
    (found,) = decide_tuning(Tuning(scheduler=None), Queue("/dev/md127", None, None, None), [])
    assert (found.was, found.wanted, found.met) == (None, AT_LEAST, False)
    assert change([found]) == "set read_ahead of /dev/md127 to 4096 KiB"


def test_complaints_name_what_is_there_what_was_wanted_and_why() -> None:
    refused = [Tuned(device, Knob.SCHEDULER, "none", "nope", "none", why="the kernel refuses it (Invalid argument)") for device in DISKS[:2]]
    other = Tuned("/dev/md127", Knob.READ_AHEAD, 1 << 20, 4 << 20, 2 << 20)
    silent = Tuned(DISKS[2], Knob.RQ_AFFINITY, 1, 2, None, why="no answer")
    assert complaints([*refused, other, silent, Tuned(DISKS[2], Knob.SCHEDULER, "bfq", "none", "none")]) == (
        "scheduler of /dev/nvme0n1, /dev/nvme1n1 is none, not nope: the kernel refuses it (Invalid argument)",
        "read_ahead of /dev/md127 is 2048 KiB, not 4096 KiB: the kernel makes another value of it",
        "rq_affinity of /dev/nvme2n1 is unknown, not 2: no answer",
    )
