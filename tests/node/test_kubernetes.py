"""The rendered pods on a node with real disks: what the disks pod mounts reaches the daemon's pod, whichever was first, once and not twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.node.conftest import MachineMaker
from tests.node.container import AS_SYSTEMD, Container, Pod
from tests.node.guest import Guest
from tests.node.job import Completed, Job
from tests.node.node import MOUNT, STORE, Node
from tests.node.serving import sums
from tests.support.kubetools import ROOT, kustomize
from tests.support.models import make_llama

pytestmark = pytest.mark.slow

MODEL = "file:///mnt/models/llama"
SAID = "/run/nvcache/disks/stripe.json"
SERVE = (
    "serve",
    "--follow",
    "--socket=/run/nvcache/pods/nvcache.sock",
    "--admin-socket=/run/nvcache-admin/admin.sock",
    "--workers=1",
    "--min-free=0",
)
SMALL = {"NVCACHE_MIN_DISK": "0", "NVCACHE_SETTLE_SECONDS": "2"}  # the guest's disks are small, and one that was pulled does not come back


@dataclass
class Cluster:
    """One node, and the pods that are applied to it."""

    guest: Guest
    overlay: str = "overlays/azure-md"

    def pod(self, name: str, overlay: str | None = None) -> Pod:
        """A pod of the DaemonSet `name` as the overlay renders it."""
        found = kustomize(ROOT / "deploy/daemonset" / (overlay or self.overlay))
        (one,) = [item for item in found if (item["kind"], item["metadata"]["name"]) == ("DaemonSet", name)]
        return Pod(self.guest, name, one["spec"]["template"], found)

    def disks(self) -> tuple[Container, Job]:
        """The disks container with its process, and its mount namespace new, as after each of its restarts."""
        container = self.pod("nvcache-disks").container("disks", **SMALL)
        return container, container.start()

    def daemon(self) -> tuple[Container, Job]:
        """The daemon's container with its process, after its init container."""
        pod = self.pod("nvcache")
        prepare = pod.container("prepare")
        prepare.start().wait().check()
        prepare.kill()
        container = pod.container("nvcache")
        return container, container.nvcache(*SERVE)

    def said(self) -> dict[str, Any]:
        """What the disks process said last."""
        found: dict[str, Any] = json.loads(self.guest.run(f"cat {SAID}").check())
        return found

    def until_said(self, generation: int, state: str = "mounted") -> dict[str, Any]:
        """Wait for a word of this state and a later generation."""
        number = rf'$(grep -o "\"generation\": [0-9]*, \"state\": \"{state}\"" {SAID} 2>/dev/null | tr -dc 0-9)'
        try:
            self.guest.until(f'[ "0{number}" -gt {generation} ]', 60)
        except AssertionError as error:
            error.add_note(f"what was said last: {self.guest.run(f'cat {SAID}').out}")
            raise
        return self.said()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one model, which the guest and its containers have at /mnt/models; any user may read it."""
    folder = tmp_path / "models"
    folder.mkdir(mode=0o755)
    make_llama(folder / "llama", 2 << 20, 2)
    return folder


def readable(container: Container, path: str) -> dict[str, str]:
    """SHA-256 of a model's files, read in the container as its user."""
    out = container.look(f"cd {path} && find -L . -type f -print0 | xargs -0 sha256sum")
    return {name.removeprefix("./"): digest for digest, name in (line.split("  ", 1) for line in out.splitlines())}


def warmed(container: Container) -> dict[str, Any]:
    """The model, once it is ready: `nvcache warm` waits for daemon and stripe by itself."""
    found: dict[str, Any] = json.loads(container.nvcache("warm", "--json", "--wait-daemon", "60", "--timeout", "90", MODEL).wait(120).check())
    return found


def ended(job: Job, container: Container, signal: str) -> Completed:
    """The process after a signal; its container is gone then."""
    job.signal(signal)
    done = job.wait(20)
    container.kill()
    return done


def give_back(cluster: Cluster, node: Node) -> None:
    """The teardown's pod, as documented, once the daemon's DaemonSet is gone: its readiness means that the disks are blank."""
    teardown = cluster.pod("nvcache-disks", "teardown").container("disks", **SMALL)
    giving_back = teardown.start()
    cluster.guest.until(f"test -e {teardown.pod.source('tmp')}/done", 60)
    assert (node.view().mounts, node.view().built) == ((), ()), giving_back.so_far()
    assert {verdict for verdict, _ in node.disks().verdicts().values()} == {"blank"}
    assert ended(giving_back, teardown, "TERM").status == 143


def test_the_pods_of_a_node_from_install_to_uninstall(machine: MachineMaker, models: Path) -> None:
    """Either pod first, each killed and restarted, /run taken away, a disk pulled, and the disks given back."""
    node_machine, wanted = machine(3, shares={"models": models}), sums(models / "llama")
    with node_machine.boot() as guest:
        guest.run(AS_SYSTEMD).check()
        node, cluster = Node(guest), Cluster(guest)

        def one_layer(*containers: Container) -> None:
            assert len(node.view().mounts) == 1, node.view()
            assert [container.mounts(MOUNT) for container in containers] == [1] * len(containers)

        # The daemon's pod was first: the stripe made afterwards reaches it.
        daemon, serving = cluster.daemon()
        disks, watching = cluster.disks()
        ready = warmed(daemon)
        assert readable(daemon, ready["path"]) == wanted
        one_layer(daemon, disks)
        rights = guest.run(f"stat -c '%u:%g %a' /run/nvcache /run/nvcache/disks /run/nvcache/pods {STORE}").check().splitlines()
        assert rights == ["0:65532 3775", "0:0 755", "65532:65532 2750", "65532:65532 755"]
        ready_probe = disks.probe("readinessProbe").wait()
        assert (ready_probe.status, ready_probe.err) == (0, "")
        assert f"md of 3 disks, {cluster.said()['details']['array']}, xfs, mounted at {MOUNT}" in ready_probe.out
        assert daemon.nvcache("disks", "status").wait().status == 0, "without root, and in another pod"

        # The disks process is killed and comes again, in a container made anew: nothing is mounted twice, and nobody is disturbed.
        first = cluster.said()
        ended(watching, disks, "KILL")
        one_layer(daemon)
        disks, watching = cluster.disks()
        again = cluster.until_said(first["generation"])
        assert again["fs_uuid"] == first["fs_uuid"]
        one_layer(daemon, disks)
        assert readable(daemon, ready["path"]) == wanted
        assert serving.status is None

        # Somebody removes /run/nvcache in the host: in the pods nothing can be written there any more. The process ends, its container is made anew.
        assert ended(serving, daemon, "TERM").status == 0
        guest.run("rm -rf /run/nvcache").check()
        assert watching.wait(20).status == 11
        disks.kill()
        disks, watching = cluster.disks()
        cluster.until_said(0)

        # The daemon's pod is last: the stripe is there already. With the model in it.
        daemon, serving = cluster.daemon()
        assert warmed(daemon)["path"] == ready["path"]
        assert readable(daemon, ready["path"]) == wanted
        one_layer(daemon, disks)

        # A disk goes: withdrawn, let go of, made anew, and filled again.
        before = cluster.said()["generation"]
        guest.unplug("DISK1")
        anew = cluster.until_said(before)
        assert (anew["fs_uuid"] != first["fs_uuid"], anew["code"]) == (True, "R01")
        assert readable(daemon, warmed(daemon)["path"]) == wanted
        assert "did not let go" not in watching.so_far().err
        one_layer(daemon, disks)
        assert len(node.view().built[0].members) == 2

        # Uninstalled as documented: the DaemonSet nvcache goes, and the pods of the other one give the disks back.
        assert ended(serving, daemon, "TERM").status == 0
        assert ended(watching, disks, "TERM").status == 0
        one_layer()
        give_back(cluster, node)


def test_a_node_whose_disks_are_taken(machine: MachineMaker) -> None:
    """Nothing is written; every place where a person would look says which disk and why; freed, the node mends itself. With LVM, for once."""
    node_machine = machine(2)
    with node_machine.boot() as guest:
        guest.run(AS_SYSTEMD).check()
        node, cluster = Node(guest), Cluster(guest, "overlays/azure-lvm")
        device = node.device("DISK1")
        guest.run(f"mkfs.ext4 -q -F -L precious {device}; sync").check()
        before = node_machine.digests()

        disks, watching = cluster.disks()
        daemon, serving = cluster.daemon()
        refused = cluster.until_said(0, "absent")
        why = f"{device} (serial DISK1): D09 "
        assert (refused["code"], why in refused["reason"], "ext4 (label precious" in refused["reason"]) == ("N03", True, True), refused
        probe = disks.probe("readinessProbe").wait()
        assert (probe.status, probe.out.startswith("absent: N03 "), why in probe.out) == (11, True, True), probe
        assert probe.err.startswith("hint: free the disk"), "the remedy"
        assert why in watching.so_far().err, "the log"
        guest.until("test -S /run/nvcache-admin/admin.sock || test -S /run/nvcache/pods/nvcache.sock", 60)
        asked = daemon.nvcache("path", MODEL).wait()
        assert (asked.status, "N03" in asked.err, why in asked.err) == (11, True, True), asked
        assert serving.status is None, "the daemon serves the reason"
        assert node.view().mounts == ()
        guest.run("sync").check()
        assert node_machine.digests() == before

        wiped = disks.nvcache("disks", "wipe", "--serial", "DISK1", "--yes-destroy").wait()
        assert wiped.status == 0, wiped
        made = cluster.until_said(refused["generation"])
        node.agree(made["details"] | {"fs_uuid": made["fs_uuid"]})
        assert disks.probe("readinessProbe").wait().out.startswith("lvm of 2 disks")
        assert daemon.mounts(MOUNT) == len(node.view().mounts) == 1

        assert ended(serving, daemon, "TERM").status == 0
        assert ended(watching, disks, "TERM").status == 0
        give_back(cluster, node)
