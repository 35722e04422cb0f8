"""A node whose daemons tell a cluster of ours what they have. It tests nothing; `conftest` makes one for each test that asks for `bed`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvcache.core.ref import parse_ref
from nvcache.core.signals import label_of
from tests.api.conftest import make_model
from tests.engine.conftest import DisksPart
from tests.support.daemon import DaemonProcess
from tests.support.kubeapi import KubeApi

NODE = "gpu-1"
TAINT = {"key": "nvcache.io/not-ready", "value": "true", "effect": "NoSchedule"}
SKU = {"key": "sku", "value": "gpu", "effect": "NoSchedule"}
DISK = {"node": "/dev/nvme0n1", "serial": "A1", "verdict": "refused", "code": "D07", "reason": "md0 of the node's image is built on it"}


class Bed:
    """Daemons on one node of one cluster. Their token is in `token`, their weights come from directories."""

    def __init__(self, place: Path, api: KubeApi) -> None:
        self.place, self.api, self.token = place, api, place / "token"
        self.token.write_text("first\n")
        self.config = api.kubeconfig(place / "kubeconfig", self.token)

    def daemon(self, *flags: str, **given: object) -> DaemonProcess:
        """A daemon of the node."""
        wanted = {"kubernetes": "true", "node_name": NODE, "workers": 1, "lanes": 1, "allow": "file://*,hf://*", **given}
        daemon = DaemonProcess(self.place, "http://127.0.0.1:9", *flags, **wanted)
        daemon.environment["KUBECONFIG"] = str(self.config)
        return daemon

    def origin(self, name: str, fill: int = 0) -> str:
        """The reference of a new model."""
        return f"file://{make_model(self.place / 'origin' / name, fill=fill)}"

    def declare(self, *refs: str) -> str:
        """A flag that declares models."""
        file = self.place / "nvcache.toml"
        file.write_text("".join(f'[[models]]\nref = "{ref}"\n' for ref in refs))
        return f"--config={file}"

    # -- what the node shows

    @property
    def node(self) -> dict[str, Any]:
        return self.api.nodes[NODE]

    @property
    def labels(self) -> dict[str, str]:
        return {key: value for key, value in self.node["metadata"]["labels"].items() if key.startswith("nvcache.io/")}

    def note(self, name: str) -> Any:
        return json.loads(self.node["metadata"]["annotations"].get(name, "null"))

    @property
    def condition(self) -> dict[str, str]:
        return next((each for each in self.node["status"]["conditions"] if each["type"] == "NvcacheStripe"), {})

    def reasons(self) -> list[str]:
        return [event["reason"] for event in self.api.events.values()]

    def shows(self, *refs: str) -> Callable[[], bool]:
        """Whether the labels are those of these references, all of which are ready."""
        return lambda: {label_of(parse_ref(ref)) for ref in refs} <= self.labels.keys() if refs else not self.labels


def warm(daemon: DaemonProcess, ref: str) -> str:
    """Make a model ready; its entry."""
    done = daemon.cli("warm", ref, "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.splitlines()[-1])["entry"])


def followed(bed: Bed, *flags: str) -> tuple[DaemonProcess, DisksPart]:
    """A daemon that follows a disks process, played by the test."""
    disks = DisksPart(bed.place)
    return bed.daemon("--follow", f"--run-directory={bed.place / 'run' / 'disks'}", *flags), disks
