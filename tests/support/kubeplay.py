"""A rendered pod as podman 4.3 can play it: what that podman does not know is left out, or said in its words. It runs nothing and mends no manifest.

What is changed (podman-kube-play(1) has what that version knows):

* of a DaemonSet, Deployment or Job its one Pod is played, with the ConfigMaps of the same rendering;
* host paths lie below a directory that stands for the node's root;
* Secrets are left out, as these are optional, and so are projected volumes: there is no API server that would give a token;
* fields of the downward API and `$(VARIABLES)` in command lines become the words that they stand for;
* probes are left out, for podman would run curl in the container. Tests ask what the probes ask;
* a native sidecar (an init container with `restartPolicy: Always`) becomes an ordinary container, for podman would wait for its end;
* nothing is restarted: podman would restart init containers that have done their work;
* emptyDirs get the pod's name: podman makes named volumes of them, which pods would share;
* the containers share the host's network, since bridges need what few machines let root do. The daemon's port is therefore one of loopback.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kubetools import Object

PLAYED = ("DaemonSet", "Deployment", "Job", "Pod")
LEFT_OUT = ("startupProbe", "livenessProbe", "readinessProbe", "ports", "restartPolicy")
KEEP_INIT = {"io.podman.annotations.init.container.type": "always"}  # not removed when they have ended: their logs are asked for
VARIABLE = re.compile(r"\$\((\w+)\)")
DAEMON_PORT = "[::]:9469"


@dataclass(frozen=True)
class Node:
    """Where a pod is played: `root` stands for the node's root directory, `port` of 127.0.0.1 for the daemon's."""

    root: Path
    port: int
    name: str = "node-a"

    def path(self, host: str) -> Path:
        """A path of the node, as the test sees it."""
        return self.root / host.lstrip("/")


def workload(found: list[Object], name: str) -> Object:
    """The one that has pods. Raises StopIteration."""
    return next(item for item in found if item["metadata"]["name"] == name and item["kind"] in PLAYED)


def pod_spec(owner: Object) -> dict[str, Any]:
    """The specification of its pods."""
    spec: dict[str, Any] = owner["spec"] if owner["kind"] == "Pod" else owner["spec"]["template"]["spec"]
    return spec


def playable(found: list[Object], name: str, node: Node, *, pod: str = "", env: Mapping[str, str] | None = None) -> list[Object]:
    """The Pod of the workload `name`, called `pod` (as the workload, unless given), and the ConfigMaps. Each container gets `env` besides its own."""
    owner = workload(found, name)
    spec, pod = copy.deepcopy(pod_spec(owner)), pod or name
    fields = {
        "spec.nodeName": node.name,
        "metadata.name": pod,
        "metadata.namespace": owner["metadata"].get("namespace", "default"),
        "metadata.uid": pod,
    }
    known = [volume for volume in spec.get("volumes", []) if not {"secret", "projected"} & volume.keys()]
    volumes = {volume["name"]: _volume(volume, node, pod) for volume in known}
    init = spec.get("initContainers", [])
    sidecars = [one for one in init if one.get("restartPolicy") == "Always"]
    for one in (*init, *spec["containers"]):
        _container(one, volumes, fields, node)
        one.setdefault("env", []).extend({"name": key, "value": value} for key, value in (env or {}).items())
    played = {
        "hostNetwork": True,
        "restartPolicy": "Never",
        "securityContext": spec.get("securityContext", {}),
        "initContainers": [one for one in init if one not in sidecars],
        "containers": [*sidecars, *spec["containers"]],
        "volumes": list(volumes.values()),
    }
    maps = [item for item in found if item["kind"] == "ConfigMap"]
    return [*maps, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "annotations": KEEP_INIT}, "spec": played}]


def _volume(volume: Object, node: Node, pod: str) -> Object:
    if "hostPath" in volume:
        volume["hostPath"]["path"] = str(node.path(volume["hostPath"]["path"]))
    if "emptyDir" in volume:
        volume["name"] = f"{pod}-{volume['name']}"
    return volume


def _container(one: dict[str, Any], volumes: Mapping[str, Object], fields: Mapping[str, str], node: Node) -> None:
    for unknown in LEFT_OUT:
        one.pop(unknown, None)
    mounts = [mount for mount in one.get("volumeMounts", []) if mount["name"] in volumes]
    one["volumeMounts"] = [{**mount, "name": volumes[mount["name"]]["name"]} for mount in mounts]
    for item in one.get("env", []):
        if "valueFrom" in item:
            item["value"] = fields[item.pop("valueFrom")["fieldRef"]["fieldPath"]]
    variables = {item["name"]: item["value"] for item in one.get("env", [])}
    for words in ("command", "args"):
        one[words] = [VARIABLE.sub(lambda found: variables[found[1]], word) for word in one.get(words, [])]
    one["args"] = [word.replace(DAEMON_PORT, f"127.0.0.1:{node.port}") for word in one["args"]]
