"""A stripe's queues are set by the table of its kind; a plan says so beforehand and sets nothing; a queue that refuses fails nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvcache.core.decide import decide
from nvcache.core.stripe import StripePlan
from nvcache.engine import tuning
from nvcache.engine.stripe import Report, Stripe
from nvcache.settings import DiskSettings
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel
from tests.support.machine import RULES, Disk, Node
from tests.support.recorded import build

SETTINGS = DiskSettings.model_validate({"tuning": {"md": {"read_ahead": "8MiB"}, "lvm": {"scheduler": "kyber"}, "disk": {"rq_affinity": 2}}})
NAMES = ("nvme0n1", "nvme1n1")


def kernel(folder: Path, scheduler: str = "none [bfq]") -> Kernel:
    disk = {"queue/read_ahead_kb": "128", "queue/scheduler": scheduler, "queue/rq_affinity": "1"}
    tree: dict[str, dict[str, str]] = {name: {"dev": f"259:{number}", **disk} for number, name in enumerate(NAMES)}
    return build(folder, tree | {"md127": {"dev": "9:127", "queue/read_ahead_kb": "1024"}})


def queue_of(folder: Path, name: str) -> dict[str, str]:
    return {file.name: file.read_text() for file in (folder / "sys/class/block" / name / "queue").iterdir()}


def node(count: int, **changed: Any) -> Node:
    return Node([Disk(f"S{number}", **changed) for number in range(count)])


def carried_out(count: int, plans: int) -> tuple[Node, StripePlan]:
    """A node after that many plans, and its next one."""
    found = node(count)
    for _ in range(plans):
        for step in decide(found.facts(), RULES).steps:
            found.apply(step)
    return found, decide(found.facts(), RULES)


def told(tuned: Any) -> list[tuple[object, ...]]:
    return [(one["device"], one["setting"], one["was"], one["wanted"], one["now"]) for one in tuning.shown(tuned)]


def test_a_plan_for_blank_disks_names_what_is_there_and_sets_nothing(tmp_path: Path) -> None:
    found = tuning.planned(kernel(tmp_path), SETTINGS, decide(node(2).facts(), RULES))
    assert told(found) == [
        (None, "read_ahead", None, 8 << 20, None),
        ("/dev/nvme0n1", "scheduler", "bfq", "none", "bfq"),
        ("/dev/nvme1n1", "scheduler", "bfq", "none", "bfq"),
    ]
    assert queue_of(tmp_path, "nvme0n1")["scheduler"] == "none [bfq]"


def test_one_disk_has_a_table_of_its_own(tmp_path: Path) -> None:
    wanted = [("read_ahead", 4 << 20), ("scheduler", "none"), ("rq_affinity", 2)]
    for plans in (0, 1, 3):
        _, plan = carried_out(1, plans)
        found = tuning.planned(kernel(tmp_path / str(plans)), SETTINGS, plan)
        assert [(one[0], one[1], one[3]) for one in told(found)] == [("/dev/nvme0n1", *each) for each in wanted]


def test_a_stripe_that_is_mounted_is_looked_at_as_it_is(tmp_path: Path) -> None:
    _, plan = carried_out(2, 4)
    assert plan.done
    found = tuning.planned(kernel(tmp_path, "[none] bfq"), SETTINGS, plan)
    assert told(found)[0] == ("/dev/md127", "read_ahead", 1 << 20, 8 << 20, 1 << 20)
    assert [one.met for one in found] == [False, True, True]


def test_nothing_is_planned_where_the_disks_are_refused(tmp_path: Path) -> None:
    assert tuning.planned(kernel(tmp_path), SETTINGS, decide(node(2, extra={"read_only": True}).facts(), RULES)) == ()


@pytest.mark.parametrize(("backend", "array", "scheduler"), [("md", "/dev/md127", "none"), ("lvm", "/dev/md127", "kyber"), ("single", None, "none")])
def test_a_mounted_stripe_is_set_and_reported(tmp_path: Path, backend: str, array: str | None, scheduler: str) -> None:
    said: list[str] = []
    stripe = Stripe(SETTINGS, tools=Tools("/nowhere"), kernel=kernel(tmp_path), say=said.append)
    members = tuple(f"/dev/{name}" for name in NAMES[: 2 if array else 1])
    before = Report("Mounted", "C1", None, "mounted", steps=("mount it",), backend=backend, array=array, members=members, store="/m/store")
    report = stripe._tuned(before)
    assert report.steps == ("mount it", *said)
    assert said[0].startswith("set read_ahead of ")
    assert report.read_ahead == (8 << 20 if backend == "md" else 4 << 20)
    assert {one["now"] for one in report.tuning if one["setting"] == "scheduler"} == {scheduler}
    assert (report.codes, report.warnings, report.outcome) == ((), (), "Mounted")
    top = queue_of(tmp_path, "md127" if array else "nvme0n1")
    assert int(top["read_ahead_kb"]) << 10 == report.read_ahead
    assert {queue_of(tmp_path, name)["scheduler"] for name in NAMES[: len(members)]} == {scheduler}
    again = stripe._tuned(before)
    assert (again.steps, len(said)) == (("mount it",), 1)


def test_what_a_queue_refuses_is_a_warning(tmp_path: Path) -> None:
    stripe = Stripe(SETTINGS, tools=Tools("/nowhere"), kernel=kernel(tmp_path))
    file = tmp_path / "sys/class/block/nvme1n1/queue/scheduler"
    file.unlink()
    file.mkdir()
    members = ("/dev/nvme0n1", "/dev/nvme1n1")
    report = Report("Unchanged", "C2", None, "mounted", codes=("W01",), warnings=("W01: x",), backend="md", array="/dev/md127", members=members)
    tuned = stripe._tuned(report)
    assert (tuned.outcome, tuned.read_ahead) == ("Unchanged", 8 << 20)
    assert tuned.warnings == (
        "W01: x",
        "W04: scheduler of /dev/nvme1n1 is unknown, not none: the kernel refuses it (Is a directory)",
    )
    assert tuned.codes == ("W01", "W04")
