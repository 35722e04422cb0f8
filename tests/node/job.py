"""One command in the guest, from its start to its end: files on the share between host and guest. It starts nothing; `guest` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.node.guest import Guest


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended."""

    command: str
    status: int
    out: str
    err: str

    def check(self) -> str:
        """Its output, if it succeeded; AssertionError otherwise."""
        assert self.status == 0, f"{self.command!r} ended with {self.status}\n{self.out}\n{self.err}"
        return self.out


class Job:
    """A command that was started in the guest. Its output can be read while it runs, and after a power cut."""

    def __init__(self, guest: Guest, folder: Path, command: str) -> None:
        self._guest, self._folder, self.command = guest, folder, command

    @property
    def pid(self) -> int:
        """Its first process in the guest, once that is there."""
        return int((self._folder / "pid").read_text())

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._guest.ended.get(self._folder.name)

    def wait(self, timeout: float = 60) -> Completed:
        """Wait for its end. Raises GuestFailed after `timeout` seconds (the command goes on), or when the guest is gone."""
        self._guest.wait_for(lambda: self.status is not None, timeout, f"{self.command!r} did not end")
        return self.so_far()

    def so_far(self) -> Completed:
        """What it has said up to now; the status is -1 while it runs."""
        out, err = ((self._folder / name).read_text(errors="replace") if (self._folder / name).exists() else "" for name in ("out", "err"))
        return Completed(self.command, -1 if self.status is None else self.status, out, err)

    def signal(self, name: str) -> None:
        """Send a signal to the command's first process (start it with exec)."""
        self._guest.run(f"kill -{name} $(cat /host/{self._folder.name}/pid)").check()
