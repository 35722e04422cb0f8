"""Disks that fail under a daemon: it lets go within seconds, serves nothing wrong, and comes back by itself with every model."""

from __future__ import annotations

import json
import os
import shlex
import struct
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.node.conftest import MachineMaker
from tests.node.guest import Guest, Job
from tests.node.machine import Machine, disks
from tests.node.node import MOUNT, STORE, Node

pytestmark = pytest.mark.slow

MODEL = "/mnt/model"
REF = f"file://{MODEL}"
FLAGS = ("--backend", "md", "--min-disk", "0", "--settle-seconds", "2")
LISTEN = ("--listen", "127.0.0.1:8080", "--listen-token-file", "/root/token", "--allow", "file://*")
API = "http://127.0.0.1:8080"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of two shards on the host, which the guest sees at `MODEL` in every boot."""
    folder = tmp_path / "model"
    folder.mkdir(mode=0o755)
    for number in (1, 2):
        data = os.urandom(3 << 20)
        header = json.dumps({f"t{number}": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "config.json").write_text("{}")
    return folder


class Serving:
    """A daemon in the guest over its own stripe, and what it answers."""

    def __init__(self, guest: Guest, job: Job) -> None:
        self.guest, self.job = guest, job
        (guest.share / "ask").write_text(f"busybox wget -q -O - --header 'Authorization: Bearer secret' \"{API}$1\" 2>/dev/null\n")
        self.ready()

    @classmethod
    def start(cls, guest: Guest) -> Serving:
        """A daemon that keeps its stripe itself."""
        guest.run("echo secret > /root/token").check()
        return cls(guest, guest.nvcache("serve", *FLAGS, *LISTEN))

    def ready(self, timeout: float = 90) -> None:
        """Wait until it says that models can be asked for."""
        self.guest.until(f"busybox wget -q -O /dev/null {API}/readyz 2>/dev/null", timeout)

    def not_ready(self, timeout: float) -> None:
        """Wait until it no longer says so."""
        self.guest.until(f"! busybox wget -q -O /dev/null {API}/readyz 2>/dev/null", timeout)

    def get(self, path: str) -> dict[str, Any]:
        """An answer of the API; whatever its status, for busybox shows the body of a good one only."""
        done = self.guest.run(f"sh /host/ask '{path}'")
        return dict(json.loads(done.out)) if done.status == 0 else {}

    def warm(self) -> None:
        """Have the model."""
        done = self.guest.nvcache("warm", REF).wait(120)
        assert done.status == 0, done

    def has_model(self, timeout: float = 120) -> str:
        """Wait until the model is there, by itself; where."""
        query = f"/v1/models?ref={quote(REF, safe='')}"
        self.guest.until(f'sh /host/ask "{query}" | grep -q .state.:.ready', timeout)
        return str(self.get(query)["path"])

    def assert_right(self) -> None:
        """Every byte that the daemon shows is the source's, as read from the disks."""
        path = self.has_model()
        self.guest.run(f"echo 3 > /proc/sys/vm/drop_caches; diff -r {MODEL} {path}").check()

    def stripe(self) -> dict[str, Any]:
        """GET /v1/stripe."""
        return self.get("/v1/stripe")


def test_a_dead_a_pulled_and_a_stalled_disk_while_serving(machine: MachineMaker, model: Path) -> None:
    """Four disks, one after the other lost, each in its own way, under one daemon."""
    node_machine = machine(4, shares={"model": model})
    with node_machine.boot() as guest:
        daemon = Serving.start(guest)
        daemon.warm()
        daemon.assert_right()
        assert len(daemon.stripe()["members"]) == 4

        guest.eio("DISK1")
        daemon.not_ready(10)
        withdrawn = guest.nvcache("path", REF).wait()
        assert (withdrawn.status, withdrawn.out) == (11, ""), withdrawn
        daemon.ready()
        assert (len(daemon.stripe()["members"]), daemon.stripe()["code"]) == (3, "R01")
        daemon.assert_right()

        guest.unplug("DISK2")
        daemon.not_ready(10)
        daemon.ready()
        daemon.assert_right()
        assert len(daemon.stripe()["members"]) == 2
        failed = {disk["serial"]: disk["code"] for disk in daemon.stripe()["disks"]}
        assert failed["DISK1"] == "D18"

        guest.stall("DISK3")
        daemon.not_ready(20)
        began = time.monotonic()
        assert daemon.stripe()["state"] != "mounted"
        assert time.monotonic() - began < 5, "the API answers slowly while a disk stalls"
        guest.heal("DISK3")
        daemon.ready(150)
        daemon.assert_right()
        daemon.job.signal("TERM")
        assert daemon.job.wait(15).status == 0
        assert MOUNT in guest.run("cat /proc/mounts").out


def test_a_disk_pulled_while_filling(machine: MachineMaker, model: Path) -> None:
    """The fill ends with the stripe, and is done on the next one without being asked again."""
    node_machine = machine(disks(3, rate=2 << 20), shares={"model": model})
    with node_machine.boot() as guest:
        daemon = Serving.start(guest)
        for serial in node_machine.serials:
            guest.rate(serial, 300 << 10)
        filling = guest.nvcache("warm", REF)
        guest.until(f'[ -n "$(find {STORE}/ingest -name data)" ]', 30)
        guest.unplug("DISK1")
        for serial in ("DISK0", "DISK2"):
            guest.rate(serial, 0)
        daemon.not_ready(15)
        daemon.ready()
        daemon.assert_right()
        done = filling.wait(120)
        assert done.status == 0, done  # whoever asked waited for the disks and asked again


def test_corruption_and_unreadable_sectors_are_found_and_repaired(machine: MachineMaker, model: Path) -> None:
    """Bytes that changed while the node was off, then sectors that cannot be read: `verify` mends both from the source."""
    node_machine = machine(2, shares={"model": model})
    first = (model / "model-00001-of-00002.safetensors").read_bytes()
    with node_machine.boot() as guest:
        daemon = Serving.start(guest)
        daemon.warm()
        daemon.job.signal("TERM")
        daemon.job.wait(15)
        guest.shutdown()
    place = _place(node_machine, first[(1 << 20) : (1 << 20) + 512])
    node_machine.flip(*place)
    with node_machine.boot(shuffle=1) as guest:
        daemon = Serving.start(guest)
        assert guest.nvcache("verify", REF).wait(120).status == 0
        daemon.assert_right()
        guest.run("sync").check()
        serial, at = _place(node_machine, first[(2 << 20) : (2 << 20) + 512])
        guest.eio(serial, at // 512, 8)
        guest.run("echo 3 > /proc/sys/vm/drop_caches").check()
        assert guest.nvcache("verify", REF).wait(120).status == 0
        guest.heal(serial)
        daemon.assert_right()


def test_two_processes_the_serving_one_without_root(machine: MachineMaker, model: Path) -> None:
    """`disks watch` as root, `serve --follow` as nobody: withdrawn, let go, made anew and refilled, through the two files alone."""
    node_machine = machine(3, shares={"model": model})
    with node_machine.boot() as guest:
        node = Node(guest)
        guest.run("mkdir -p /run/nvcache; chown 65532:65532 /run/nvcache; chmod 755 /root").check()
        watch = guest.nvcache("disks", "watch", *FLAGS, "--store-owner", "65532:65532")
        guest.until("grep -q '\"mounted\"' /run/nvcache/disks/stripe.json", 60)
        guest.run("echo secret > /root/token").check()
        serve = shlex.join(["nvcache", "serve", "--follow", "--socket", "/run/nvcache/nvcache.sock", *LISTEN])
        daemon = Serving(guest, guest.start(f"cd /; exec setpriv --reuid 65532 --regid 65532 --clear-groups {serve}"))
        done = guest.nvcache("--socket", "/run/nvcache/nvcache.sock", "warm", REF).wait(120)
        assert done.status == 0, done
        assert guest.run(f"stat -c %u:%g {STORE}").check().strip() == "65532:65532"
        daemon.assert_right()
        guest.unplug("DISK1")
        daemon.not_ready(10)
        guest.until("grep -q acknowledged /run/nvcache/serve.json", 10)
        daemon.ready()
        daemon.assert_right()
        assert "did not let go" not in watch.so_far().err
        assert len(node.view().built[0].members) == 2
        watch.signal("TERM")
        assert watch.wait(15).status == 0
        assert len(node.view().mounts) == 1


def _place(node_machine: Machine, needle: bytes) -> tuple[str, int]:
    """The disk and the offset at which the images hold these bytes."""
    for serial in node_machine.serials:
        at = node_machine.image_of(serial).read_bytes().find(needle)
        if at >= 0:
            return serial, at
    raise AssertionError("the model's bytes are on no disk")
