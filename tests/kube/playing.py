"""A node whose pods podman plays: rendered manifests over a small ext4 disk, and a Hub on loopback. It has no kubelet and no API server."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.support.disks import mounted
from tests.support.hub import HubServer
from tests.support.kubeplay import Node, playable
from tests.support.kubetools import Object
from tests.support.podman import Podman

READY_SECONDS = 60
PLAY_SECONDS = 120
DISK_MEGABYTES = 256
DIRECTORY = "/mnt/nvcache"  # where the overlay `directory` expects the node's disk


def eventually(wanted: object, look: Callable[[], object], seconds: float = READY_SECONDS) -> None:
    """Return when `look()` gives what is wanted. Raises AssertionError with what it gave last when that does not come."""
    until, pause = time.monotonic() + seconds, threading.Event()
    while (found := look()) != wanted:
        assert time.monotonic() < until, f"not {wanted!r} within {seconds:.0f} s, but {found!r}"
        pause.wait(0.1)


@dataclass
class Playing:
    """One node. Pods that it plays fetch from `hub`."""

    podman: Podman
    node: Node
    hub: HubServer
    folder: Path

    def play(self, found: list[Object], name: str, *, pod: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Begin to play the pod of the workload `name`. The process ends when the init containers have, with an error if one failed."""
        pods = playable(found, name, self.node, pod=pod, env={"HF_ENDPOINT": self.hub.url, **(env or {})})
        file = self.folder / f"{pod or name}.yaml"
        file.write_text(yaml.safe_dump_all(pods))
        command = self.podman.command("kube", "play", str(file))
        return subprocess.Popen(
            command, env=self.podman.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def played(self, found: list[Object], name: str, *, pod: str = "", env: Mapping[str, str] | None = None) -> None:
        """Play it until its containers run. Raises AssertionError with its last words when it does not come to that."""
        with self.play(found, name, pod=pod, env=env) as process:
            self.started(process, pod or name)

    def started(self, process: subprocess.Popen[str], pod: str) -> None:
        """Wait for what `play` began."""
        said, _ = process.communicate(timeout=PLAY_SECONDS)
        assert process.returncode == 0, f"{said}\n{self.words(pod)}"

    def refused(self, process: subprocess.Popen[str]) -> str:
        """Wait for what `play` began, which an init container has to stop. Returns podman's words."""
        said, _ = process.communicate(timeout=PLAY_SECONDS)
        assert process.returncode != 0, said
        return said

    def logs(self, container: str) -> str:
        """Both streams of a container, which podman calls POD-CONTAINER."""
        done = self.podman("logs", container)
        return done.stdout + done.stderr

    def words(self, pod: str) -> str:
        """The ends of all logs of a pod."""
        names = self.podman("ps", "--all", f"--filter=pod={pod}", "--format={{.Names}}").stdout.split()
        return "\n".join(f"{name}:\n{self.logs(name)[-2000:]}" for name in names if not name.endswith("-infra"))

    def ended(self, container: str) -> int:
        """Wait for the end of a container. Returns its exit code."""
        return int(self.podman("wait", container).stdout)

    def get(self, path: str) -> int:
        """Ask the daemon's port, as the kubelet's probes do. Returns the status; 0 when nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.node.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except (urllib.error.URLError, ConnectionError):
            return 0


@contextmanager
def playing(podman: Podman, hub: HubServer, folder: Path) -> Iterator[Playing]:
    """A node without pods; those that were played are gone afterwards."""
    root = folder / "node"
    with mounted("ext4", folder / "disk", megabytes=DISK_MEGABYTES) as disk, socket.create_server(("127.0.0.1", 0)) as taken:
        for place in (root / "mnt", root / "run"):
            place.mkdir(parents=True)
        Path(f"{root}{DIRECTORY}").symlink_to(disk)
        node = Node(root, taken.getsockname()[1])
        taken.close()
        try:
            yield Playing(podman, node, hub, folder)
        finally:
            podman.sweep()
