"""The daemon in the guest: started as a person would, asked by the command line and the client. It knows no scenario."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.node.guest import Completed, Guest

START_SECONDS = 120  # imports take long in a guest, and the stripe is made first
_READY = """
import http.client, socket, sys, time
until = time.monotonic() + float(sys.argv[1])
while True:
    ask = http.client.HTTPConnection("node")
    ask.sock = socket.socket(socket.AF_UNIX)
    ask.sock.settimeout(30)
    ask.sock.connect("/run/nvcache/nvcache.sock")
    ask.request("GET", "/readyz")
    answer = ask.getresponse()
    text = answer.read().decode()
    if answer.status == 200:
        break
    if time.monotonic() > until:
        sys.exit(text)
    time.sleep(0.2)
"""
_STRIPE = "from nvcache.client import Client; import json; print(json.dumps(Client().request('GET', '/v1/stripe')))"


class Daemon:
    """`nvcache serve` with these flags. A context manager: ready, with its stripe mounted, inside; stopped in order, with status 0, after."""

    def __init__(self, guest: Guest, *flags: str) -> None:
        self._guest = guest
        self._job = guest.start(f"exec nvcache serve --workers 1 --log-format json {' '.join(flags)}")

    def __enter__(self) -> Daemon:
        self._guest.wait_for(lambda: " ready on " in self._job.so_far().out or self._job.status is not None, START_SECONDS, "the daemon is not ready")
        assert self._job.status is None, self._job.so_far()
        self.wait_ready(60)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note(f"the daemon: {self.log()[-4000:]}")
            return
        self._job.signal("TERM")
        ended = self._job.wait(30)
        assert ended.status == 0, ended

    def wait_ready(self, seconds: float) -> None:
        """Wait until `/readyz` says so. Raises AssertionError with what it says instead."""
        self._guest.run(f"python3 -SEc {shlex.quote(_READY)} {seconds}", seconds + 30).check()

    def ask(self, *arguments: str, timeout: float = 120) -> Completed:
        """Run `nvcache ARGUMENTS…` against it."""
        return self._guest.nvcache(*arguments).wait(timeout)

    def stripe(self) -> dict[str, Any]:
        """`GET /v1/stripe`."""
        found: dict[str, Any] = json.loads(self._guest.run(f'python3 -c "{_STRIPE}"').check())
        return found

    def log(self) -> str:
        """What it has logged."""
        return self._job.so_far().err


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model's source, by its path below `folder`; what begins with a dot is not fetched."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("[!.]*") if path.is_file()}


def sums_in_guest(guest: Guest, folder: str) -> dict[str, str]:
    """The same of a folder in the guest, read from the disks and not from the page cache; links are followed, as those who load a model do."""
    out = guest.run(f"echo 3 > /proc/sys/vm/drop_caches; cd {folder} && find -L . -type f -print0 | xargs -0 sha256sum", 120).check()
    return {name.removeprefix("./"): digest for digest, name in (line.split("  ", 1) for line in out.splitlines())}
