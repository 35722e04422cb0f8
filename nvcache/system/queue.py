"""Reads and sets what the kernel lets be set of a block device's queue, in /sys/class/block/NAME/queue. It chooses no value.

Files: Documentation/ABI/stable/sysfs-block. A disk with requests that do not end can keep a write (and then a read) from returning, so all are
bounded; what a queue does not take is told, never raised.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

from nvcache.core.tuning import Knob, Queue, Tuned, Value
from nvcache.errors import DiskError
from nvcache.system.patience import within
from nvcache.system.sysfs import Kernel

PATIENCE = 5.0  # seconds; a change of the scheduler waits for the requests that are under way
_FILES = {Knob.READ_AHEAD: "read_ahead_kb", Knob.SCHEDULER: "scheduler", Knob.RQ_AFFINITY: "rq_affinity"}


def look(kernel: Kernel, device: str) -> Queue:
    """What the queue of `device` (/dev/NAME) says; a value that cannot be read is None, and a queue that can have no scheduler has `none`."""

    def read() -> Queue:
        size, affinity = _number(_text(kernel, device, Knob.READ_AHEAD)), _number(_text(kernel, device, Knob.RQ_AFFINITY))
        return Queue(device, None if size is None else size << 10, parse_scheduler(_text(kernel, device, Knob.SCHEDULER))[0], affinity)

    try:
        return within(PATIENCE, f"read the queue settings of {device}", read)
    except DiskError:
        return Queue(device, None, None, None)


def put(kernel: Kernel, wanted: Tuned) -> Tuned:
    """Set one value where it is not what is wanted; returns what the kernel then says, with its reason where it refused."""
    device = wanted.device
    if wanted.met or device is None:
        return wanted

    def write() -> Tuned:
        why = _write(_file(kernel, device, wanted.knob), wanted)
        text = _text(kernel, device, wanted.knob)
        if wanted.knob is Knob.SCHEDULER:
            now, offered = parse_scheduler(text)
            return replace(wanted, now=now, why=f"{why}; it offers {', '.join(offered)}" if why and offered else why)
        number = _number(text)
        return replace(wanted, now=number << 10 if number is not None and wanted.knob is Knob.READ_AHEAD else number, why=why)

    try:
        return within(PATIENCE, f"set {wanted.knob} of {device}", write)
    except DiskError as error:
        return replace(wanted, now=None, why=str(error))


def parse_scheduler(text: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The scheduler in use and all that are offered, of `[none] mq-deadline kyber`; without brackets there is one and no choice.

    Text None is a file that is not there: such a queue has no scheduler, which is `none`.
    """
    if text is None:
        return "none", ()
    words = text.split()
    offered = tuple(word.strip("[]") for word in words)
    active = next((word.strip("[]") for word in words if word.startswith("[")), offered[0] if len(offered) == 1 else None)
    return active, offered


def _file(kernel: Kernel, device: str, knob: Knob) -> Path:
    return kernel.sys / "class/block" / Path(device).name / "queue" / _FILES[knob]


def _text(kernel: Kernel, device: str, knob: Knob) -> str | None:
    """What the file says; None when there is none, empty when it cannot be read."""
    try:
        return _file(kernel, device, knob).read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def _write(file: Path, wanted: Tuned) -> str:
    """Why it could not be written; empty when it was. Never makes a file."""
    value: Value = wanted.wanted >> 10 if wanted.knob is Knob.READ_AHEAD and isinstance(wanted.wanted, int) else wanted.wanted
    try:
        fd = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)
    except OSError as error:
        return "it has no such setting" if error.errno == errno.ENOENT else f"the kernel refuses it ({error.strerror})"
    return ""


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
