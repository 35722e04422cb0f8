"""Has the queues of a stripe set as the table says, or says what would be set. It decides nothing (`core.tuning` does) and fails no mount."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from nvcache.core.stripe import CreateStripe, MakeFilesystem, StripePlan
from nvcache.core.tuning import Tuned, decide_tuning
from nvcache.errors import DiskError
from nvcache.settings import DiskSettings
from nvcache.system import filesystem, queue
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel

log = logging.getLogger(__name__)
SETTLE = 5  # seconds that udev's rules, which may set a scheduler too, are given to be done with disks that were just written to


def wanted(kernel: Kernel, settings: DiskSettings, kind: str, device: str | None, members: Sequence[str]) -> tuple[Tuned, ...]:
    """What the queues of a stripe say, and what the table wants. `kind` is md, lvm, or else one disk; `device` is None before it is there."""
    table: Literal["md", "lvm", "disk"] = "md" if kind == "md" else "lvm" if kind == "lvm" else "disk"
    top = queue.look(kernel, device) if device is not None else None
    return decide_tuning(settings.tuning_of(table), top, [queue.look(kernel, member) for member in members])


def planned(kernel: Kernel, settings: DiskSettings, plan: StripePlan) -> tuple[Tuned, ...]:
    """What would be set once the plan is carried out, as far as the plan itself names the disks."""
    if plan.refused:
        return ()
    if plan.stripe is not None:
        return wanted(kernel, settings, plan.stripe.kind, plan.stripe.node, [member.disk.node for member in plan.stripe.members])
    for step in plan.steps:
        match step:
            case CreateStripe(kind, blanks):
                return wanted(kernel, settings, kind, None, [blank.disk.node for blank in blanks])
            case MakeFilesystem(_, node, kind):
                return wanted(kernel, settings, kind, node, [node])
    return ()


def settle(tools: Tools, kernel: Kernel) -> None:
    """Let udev finish with the disks, which it may do when they are no longer locked: what its rules set comes before what is set here."""
    try:
        filesystem.settle(tools, kernel, SETTLE)
    except DiskError as error:
        log.warning("%s", error)


def put(kernel: Kernel, tuned: Sequence[Tuned]) -> tuple[Tuned, ...]:
    """Set what is not as wanted; returns what the kernel then says."""
    return tuple(queue.put(kernel, one) for one in tuned)


def shown(tuned: Sequence[Tuned]) -> tuple[dict[str, object], ...]:
    """As reports have it."""
    return tuple({"device": one.device, "setting": str(one.knob), "was": one.was, "wanted": one.wanted, "now": one.now} for one in tuned)
