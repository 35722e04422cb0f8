"""What a pod that uses the cache must keep to, as functions like those of `policies`. It knows nothing of the daemons' own pods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.kube.policies import (
    DAEMON,
    STORE,
    Policy,
    containers,
    images_say_their_version,
    no_secret_in_the_environment,
    resources_are_told,
    spec_of,
    workloads,
)
from tests.support.kubetools import Object


def consumers_are_ordinary(found: list[Object]) -> Iterator[str]:
    """A pod that uses the cache needs no right that any other pod would not have; the group is the only thing that it gets."""
    for name, spec in workloads(found):
        yield from (f"{name} has {one}" for one in ("hostPID", "hostIPC", "hostNetwork") if spec.get(one))
        if DAEMON not in spec.get("securityContext", {}).get("supplementalGroups", []):
            yield f"{name} cannot reach the socket: it is not of group {DAEMON}"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name} is given a service account's token"
    for name, one in containers(found):
        security = one.get("securityContext", {})
        if security.get("privileged") or security.get("capabilities", {}).get("add") or security.get("runAsUser") == 0:
            yield f"{name} has more rights than it needs"


def consumers_only_read(found: list[Object]) -> Iterator[str]:
    """The store and the socket's directory, at the same path as on the node, read-only, and such that a new stripe is seen and none is made up."""
    expected = {f"{STORE}/models": f"{STORE}/models", f"{STORE}/hub": f"{STORE}/hub", "/run/nvcache/pods": "/run/nvcache"}
    for name, spec in workloads(found):
        paths = {volume["name"]: volume["hostPath"] for volume in spec.get("volumes", []) if "hostPath" in volume}
        for path in paths.values():
            if path["path"] not in expected:
                yield f"{name} has {path['path']} of the node"
            elif path.get("type") != "Directory":
                yield f"{name} makes {path['path']} up where nvcache is not"
    for name, one in containers(found):
        volumes = next(spec.get("volumes", []) for workload, spec in workloads(found) if name.startswith(f"{workload}/"))
        paths = {volume["name"]: volume["hostPath"]["path"] for volume in volumes if "hostPath" in volume}
        for mount in one.get("volumeMounts", []):
            path = paths.get(mount["name"])
            if path in expected:
                yield from [f"{name} may write to {path}"] if not mount.get("readOnly") else []
                yield from [f"{name} has {path} at {mount['mountPath']}"] if mount["mountPath"] != expected[path] else []
                yield from [f"{name} would not see a new mount at {path}"] if mount.get("mountPropagation") != "HostToContainer" else []


def leases_live_as_long_as_the_pod(found: list[Object]) -> Iterator[str]:
    """Who takes a lease and runs on has a sidecar that renews it: a restarted container does not run its init containers again."""
    for item in found:
        if item["kind"] not in ("Deployment", "StatefulSet"):
            continue
        first = spec_of(item).get("initContainers", [])
        holds = [one for one in first if "hold" in words(one) and one.get("restartPolicy") == "Always"]
        if any("--lease" in words(one) for one in first) and not holds:
            yield f"{item['metadata']['name']} does not keep its lease"


def variables_are_there(found: list[Object]) -> Iterator[str]:
    """Kubernetes leaves `$(NAME)` as it is where there is no such variable, and the program gets it to read."""
    for name, one in containers(found):
        known = {variable["name"] for variable in one.get("env", [])}
        yield from (f"{name} has no {used}" for used in re.findall(r"\$\((\w+)\)", " ".join(words(one))) if used not in known)


def words(container: Any) -> list[str]:
    """All words of its command line, those of a script too."""
    return " ".join([*container.get("command", []), *container.get("args", [])]).split()


CONSUMER_POLICIES: tuple[Policy, ...] = (
    consumers_are_ordinary,
    consumers_only_read,
    leases_live_as_long_as_the_pod,
    variables_are_there,
    resources_are_told,
    no_secret_in_the_environment,
    images_say_their_version,
)
