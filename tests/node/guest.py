"""One boot of a machine: runs commands as root in the guest and changes its hardware under it. It starts nothing of nvcache by itself.

Every wait is bounded. A guest that is not ended in order is killed when its `with` block ends.
"""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from tests.node.job import Completed, Job
from tests.node.nbd import EVERYTHING, SECTOR, NbdDisk
from tests.node.qemu import OS_DISK_SERIAL, Qemu

BOOT_SECONDS = 90


class GuestFailed(AssertionError):  # noqa: N818 - it is the guest that failed, which is what a test is told
    """The guest did not boot, stopped by itself, or took longer than it was given; with the end of its console."""


@dataclass(frozen=True, slots=True)
class Plug:
    """A disk as it is put into the machine."""

    image: Path
    port: int
    model: str
    rate: int
    present: bool


@dataclass(frozen=True, slots=True)
class Inside:
    """Where a command runs that is not the guest's own: in the mount namespace of a process, as that user."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Guest:
    """A running machine. A context manager: booted inside, gone after."""

    def __init__(
        self,
        folder: Path,
        image: Path,
        plugs: Mapping[str, Plug],
        *,
        os_model: str | None,
        hostname: str,
        memory: str,
        cpus: int,
        shares: Mapping[str, Path],
        witness: Callable[[str, int, bytes | None], None],
    ) -> None:
        self._witness = witness
        self.ended: dict[str, int] = {}  # exit statuses by job
        self.boot_seconds = 0.0
        self._plugs = plugs
        self._disks: dict[str, NbdDisk] = {}
        self._changed = threading.Condition()
        self._up, self._forks, self._gone, self._jobs = False, False, False, 0
        self.share = folder / "share"
        self.share.mkdir(parents=True)
        namespaces = sum(plug.present for plug in plugs.values()) + (os_model is not None)
        self.share.joinpath("setup").write_text(f"hostname={shlex.quote(hostname)} namespaces={namespaces} shares={shlex.quote(' '.join(shares))}\n")
        os_disk = "virtio" if os_model is None else "nvme"
        self._qemu = Qemu(folder, image, os_disk=os_disk, memory=memory, cpus=cpus, ports=len(plugs), shares=shares)
        self._listener = threading.Thread(target=self._listen, name="guest agent")
        self._listener.start()
        try:
            self._boot(os_model)
        except BaseException:
            self.powercut()
            raise

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note(f"the guest: {self._qemu.last_words()}")
        self.powercut()

    def run(self, command: str, timeout: float = 60) -> Completed:
        """Run a bash command line to its end. Raises GuestFailed after `timeout` seconds or when the guest goes."""
        return self.start(command).wait(timeout)

    def until(self, condition: str, timeout: float = 30) -> None:
        """Wait until a bash condition holds in the guest. Raises GuestFailed."""
        assert self.run(f"timeout {timeout} bash -c 'until {condition}; do sleep 0.1; done'", timeout + 10).status == 0, f"{condition} did not come"

    def start(self, command: str) -> Job:
        """Start a bash command line in a session of its own."""
        folder = self._new_job()
        (folder / "command").write_text(command + "\n")
        self._say(f"run {folder.name}")
        return Job(self, folder, command)

    def nvcache(self, *arguments: str, inside: Inside | None = None, **environment: str) -> Job:
        """Start `nvcache ARGUMENTS…` in a fork that has everything imported (see `tests.node.forks`)."""
        self.wait_for(lambda: self._forks, BOOT_SECONDS, "tests.node.forks did not start")
        folder = self._new_job()
        (folder / "call").write_text(json.dumps({"argv": arguments, "env": environment, "inside": inside and asdict(inside)}))
        self._say(f"send forks {folder.name}")
        return Job(self, folder, f"nvcache {' '.join(arguments)}")

    def plug(self, serial: str) -> None:
        """Put a disk in; the guest shows it a moment later."""
        self._qemu.command("stop")
        try:
            self._insert(serial)
            self._qemu.set_models({serial: self._plugs[serial].model})
        finally:
            self._qemu.command("cont")

    def unplug(self, serial: str) -> None:
        """Ask the guest to let go of a disk (an orderly removal) and wait until it has."""
        self._qemu.remove_disk(serial)
        self.wait_for(lambda: not self._qemu.has_disk(serial), 30, f"disk {serial} is not let go")

    def rate(self, serial: str, rate: int) -> None:
        """Set a disk's speed in bytes a second; 0: as fast as it goes."""
        self._disks[serial].rate = rate

    def eio(self, serial: str, sector: int | None = None, count: int = 1) -> None:
        """Let everything fail on a disk as if it had died, or only reads of some of its sectors."""
        disk = self._disks[serial]
        if sector is None:
            disk.dead, disk.unreadable = True, EVERYTHING
        else:
            disk.unreadable = (sector * SECTOR, (sector + count) * SECTOR)

    def stall(self, serial: str) -> None:
        """Let a disk answer nothing more."""
        self._disks[serial].stall()

    def heal(self, serial: str) -> None:
        """Let a disk work again."""
        self._disks[serial].heal()

    def powercut(self) -> None:
        """Take the power away: what the guest had not written to its disks is lost. May be repeated."""
        self._qemu.kill()
        self._listener.join(30)
        assert not self._listener.is_alive(), "the guest's listener does not end"
        self._qemu.agent.close()
        while self._disks:
            self._disks.popitem()[1].close()

    def shutdown(self, timeout: float = 60) -> None:
        """Unmount, sync and power off in order."""
        self.start("cd /; busybox killall5 -15 -o $$ -o $PPID; umount -a -t xfs,ext4 2>/dev/null; sync; busybox poweroff -f")
        self.wait_for(lambda: self._gone, timeout, "it did not power off", even_gone=True)
        self.powercut()

    def wait_for(self, condition: Callable[[], bool], timeout: float, otherwise: str, *, even_gone: bool = False) -> None:
        """Wait until `condition`, looked at whenever the guest says something and ten times a second. Raises GuestFailed."""
        until = time.monotonic() + timeout
        with self._changed:
            while not condition():
                if self._gone and not even_gone:
                    raise GuestFailed(f"the guest stopped: {otherwise}\n{self._qemu.last_words()}")
                if time.monotonic() > until:
                    raise GuestFailed(f"{otherwise} in {timeout:.0f} s\n{self._qemu.last_words()}")
                self._changed.wait(0.1)

    def _boot(self, os_model: str | None) -> None:
        begun = time.monotonic()
        models = {} if os_model is None else {OS_DISK_SERIAL: os_model}
        for serial, plug in self._plugs.items():
            if plug.present:
                self._insert(serial)
                models[serial] = plug.model
        self._qemu.set_models(models)
        self._qemu.command("cont")
        self.wait_for(lambda: self._up, BOOT_SECONDS, "the guest did not boot")
        self.boot_seconds = time.monotonic() - begun

    def _insert(self, serial: str) -> None:
        plug = self._plugs[serial]
        if serial not in self._disks:
            self._disks[serial] = NbdDisk(plug.image, rate=plug.rate, witness=partial(self._witness, serial))
        self._qemu.add_disk(self._disks[serial].address, serial=serial, port=plug.port)

    def _new_job(self) -> Path:
        self._jobs += 1
        folder = self.share / f"job{self._jobs}"
        folder.mkdir()
        return folder

    def _say(self, line: str) -> None:
        self._qemu.agent.sendall(line.encode() + b"\n")

    def _listen(self) -> None:
        """Take in what the guest says, until QEMU ends."""
        try:
            with self._qemu.agent.makefile("r", errors="replace") as lines:
                for line in lines:
                    self._heard(*line.split())
        except OSError:
            pass  # QEMU was killed
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _heard(self, verb: str, *words: str) -> None:
        if verb == "vmctl":
            self._answer(*words)
        with self._changed:
            if verb == "ready":
                self._up = True
            elif verb == "forks":
                self._forks = True
            elif verb == "done":
                self.ended[words[0]] = int(words[1])
            self._changed.notify_all()

    def _answer(self, caller: str, verb: str, *words: str) -> None:
        """Carry out what a vmctl in the guest asks for."""
        if verb == "powercut":
            self._qemu.process.kill()
            return
        numbers = [int(word) if word.isdecimal() and position else word for position, word in enumerate(words)]
        try:
            {"plug": self.plug, "unplug": self.unplug, "rate": self.rate, "eio": self.eio, "stall": self.stall, "heal": self.heal}[verb](*numbers)  # type: ignore[operator]
        except (KeyError, TypeError, RuntimeError, AssertionError) as error:
            self._say(f"send vmctl.{caller} 1 {error!r}")
        else:
            self._say(f"send vmctl.{caller} 0 ok")
