"""Loading from a real stripe: the client on disks that are slow, silent or broken, and in a cgroup of version 2."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.node.conftest import MachineMaker
from tests.node.guest import Guest
from tests.node.machine import MIB
from tests.node.node import STORE, Node
from tests.support.models import make_llama

RATE = 60 * 10**6
SIZE = 64 * MIB
GROUP = "/sys/fs/cgroup/pod"
CLIENT = """
import dataclasses, json, sys
from nvcache.client import prefetch, reading
reading.STALL_SECONDS = 3.0
try:
    print(json.dumps(dataclasses.asdict(prefetch(sys.argv[1]))))
except OSError as error:
    print(json.dumps({"error": type(error).__name__, "says": str(error)}))
"""


def prefetched(guest: Guest, folder: str = f"{STORE}/m", before: str = "true") -> dict[str, Any]:
    """What the client reports of a prefetch in a fresh process, with nothing in the page cache.

    Inodes stay: a process that waits for one cannot even be killed.
    """
    script = f"cd /mnt/repo && exec python3 -SEc {shlex.quote(CLIENT)} {folder}"
    found: dict[str, Any] = json.loads(guest.run(f"echo 1 > /proc/sys/vm/drop_caches; {before}; {script}", 120).check())
    return found


@pytest.mark.slow
def test_what_a_pod_sees_of_a_stripe_in_trouble(tmp_path: Path, machine: MachineMaker) -> None:
    make_llama(tmp_path / "model", SIZE, 4, seed=5)
    made = machine(2, shares={"model": tmp_path / "model"})
    with made.boot() as guest:
        Node(guest).ensure("Created")
        guest.run(f"cp -r /mnt/model {STORE}/m && sync", 120).check()
        for serial in made.serials:
            guest.rate(serial, RATE)

        whole = prefetched(guest)
        assert (whole["filesystem"], whole["left_out"], whole["notes"]) == ("xfs", 0, [])
        assert whole["cached"] == pytest.approx(whole["bytes"], rel=0.02)

        shared = prefetched(guest, "/mnt/model")
        assert "the files lie on 9p" in shared["notes"][0]

        guest.run(f"mount -t cgroup2 none /sys/fs/cgroup && echo +memory > /sys/fs/cgroup/cgroup.subtree_control && mkdir {GROUP}").check()
        guest.run(f"echo {48 * MIB} > {GROUP}/memory.max").check()
        narrow = prefetched(guest, before=f"echo $$ > {GROUP}/cgroup.procs")
        assert 0 < narrow["read"] <= 0.9 * 48 * MIB
        assert "more would not fit into this process's memory" in narrow["notes"][0]

        guest.stall(made.serials[1])
        silent = prefetched(guest)
        guest.heal(made.serials[1])
        assert silent["error"] == "TimeoutError"
        assert "the disk has given nothing for 3 s" in silent["says"]

        guest.eio(made.serials[1])  # mapping the files would end in SIGBUS here
        assert prefetched(guest)["error"] == "OSError"
