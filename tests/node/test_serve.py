"""The daemon makes its stripe, fills a model, and serves the same bytes after a reboot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.node.conftest import MachineMaker
from tests.node.node import Node
from tests.node.serving import Daemon, sums, sums_in_guest
from tests.support.models import make_llama

pytestmark = pytest.mark.slow
MODEL = "file:///mnt/models/llama"


@pytest.mark.parametrize(("backend", "filesystem", "count"), [("md", "xfs", 4), ("lvm", "ext4", 2)])
def test_a_model_survives_a_reboot(machine: MachineMaker, tmp_path: Path, backend: str, filesystem: str, count: int) -> None:
    """Blank disks, one command, a model; after the reboot the same command has it ready at once."""
    make_llama(tmp_path / "llama", 6 << 20, 2)
    wanted = sums(tmp_path / "llama")
    node_machine = machine(count, shares={"models": tmp_path})
    flags = ("--backend", backend, "--filesystem", filesystem, "--min-disk", "0")
    with node_machine.boot() as guest:
        with Daemon(guest, *flags) as daemon:
            ready = json.loads(daemon.ask("warm", "--json", MODEL).check())
            assert ready["state"] == "ready"
            assert sums_in_guest(guest, ready["path"]) == wanted
            made = daemon.stripe()
            assert (made["state"], made["backend"], made["filesystem"], len(made["members"])) == ("mounted", backend, filesystem, count)
        Node(guest, *flags).ensure("Unchanged")  # the daemon has stopped; its stripe stays
        guest.shutdown()
    with node_machine.boot(shuffle=5) as guest, Daemon(guest, *flags) as daemon:
        found = daemon.stripe()
        assert (found["state"], found["fs_uuid"]) == ("mounted", made["fs_uuid"])
        assert json.loads(daemon.ask("path", "--json", MODEL).check())["path"] == ready["path"]
        assert sums_in_guest(guest, ready["path"]) == wanted
        Node(guest, *flags).agree(found)
