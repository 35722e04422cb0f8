"""What the benches in a virtual machine do there: run fio, the limit, and the loaders, on cold files of disks with a speed. It judges nothing."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure import MeasureError
from tests.node.guest import Guest

RATE = 30 * 10**6  # bytes/s of each disk: reading from eight of them still leaves the emulated processors idle
SITE = Path(sysconfig.get_path("purelib"))  # the guest's Python is of the same minor version, so that it can use what is installed here
IMPORT_SECONDS = 300
LOAD_SECONDS = 300
_ASKED, _ANSWERED = "/run/asked", "/run/answered"
_ANSWER = f'read -r line <> {_ANSWERED}; echo "$line"'
_FIO = "fio --name=read --rw=read --bs=4M --direct=1 --ioengine=libaio --iodepth=8 --file_service_type=sequential --readonly --output-format=json"


class Loaders:
    """`bench.forked` in a guest whose machine shares `SITE` as "site". `left_out`: rows that cannot run there, and why."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._job = guest.start(f"mkfifo {_ASKED} {_ANSWERED}; PYTHONPATH=/mnt/repo:/mnt/site exec python3 -m bench.forked {_ASKED} {_ANSWERED}")
        self.left_out: dict[str, str] = {}

    def try_out(self, rows: Iterable[str], directory: str) -> None:
        """Wait until all is imported and load once by each row: one that fails is left out. What a processor does first, it does slowly."""
        self._guest.until(f"[ -p {_ANSWERED} ]")
        self.left_out = json.loads(self._guest.run(_ANSWER, IMPORT_SECONDS).check())
        for row in rows:
            said = len(self._job.so_far().err)
            if row not in self.left_out and "error" in (answer := self._ask(row, directory)):
                self.left_out[row] = " ".join([answer["error"], *self._job.so_far().err[said:].splitlines()[-1:]])

    def load(self, row: str, directory: str) -> dict[str, Any]:
        """`bench.loaders.Load` of the files in `directory`, which are not in the page cache. Raises `MeasureError`."""
        answer = self._ask(row, directory)
        if "error" in answer:
            raise MeasureError(f"cannot load {directory} by {row}: {answer['error']}\n{self._job.so_far().err[-2000:]}")
        return answer

    def _ask(self, row: str, directory: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._guest.run(f"echo {row} {directory} > {_ASKED}; {_ANSWER}", LOAD_SECONDS).check())
        return answer


def fio(guest: Guest, files: str) -> float:
    """Bytes a second of files (a pattern) read in order around the page cache, in requests of 4 MiB, 8 in flight: the limit."""
    out = guest.run(f"{_FIO} --filename=$(echo {files} | tr ' ' :)", LOAD_SECONDS).check()
    rate = float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["bw_bytes"])
    if not rate:
        raise MeasureError(f"cannot measure {files}: none is as large as one request; use larger ones")
    return rate


def throttle(guest: Guest, serials: Iterable[str], rate: int) -> None:
    """Set the speed of these disks in bytes/s; 0: as fast as they go."""
    for serial in serials:
        guest.rate(serial, rate)
