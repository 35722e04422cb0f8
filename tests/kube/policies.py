"""What the manifests of the daemons must keep to, as functions from a rendering to the complaints about it. It renders nothing, knows no schema.

A rendering is the list of all objects of one overlay or example. Complaints name the object and the container, so that a failure can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nvcache import __version__
from nvcache.api import serve
from nvcache.cli import keep
from tests.support.kubetools import Object

Policy = Callable[[list[Object]], Iterator[str]]

DAEMON = 65532
STORE = "/var/lib/nvcache/mnt/store"
IN_NO_NAMESPACE = {"Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding"}
IN_NO_NAMESPACE |= {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
PODS = {"DaemonSet", "Deployment", "StatefulSet", "Job", "Pod"}


@dataclass(frozen=True)
class HostPath:
    """A path of the node that a DaemonSet may have: why, and how its containers may mount it."""

    reason: str
    read_only: bool = False
    propagation: str = "None"
    kind: str = "DirectoryOrCreate"


HOST_PATHS = {
    ("nvcache-disks", "/dev"): HostPath("device nodes that the kernel makes appear there", kind="Directory"),
    ("nvcache-disks", "/run/udev"): HostPath("mdadm and lsblk ask udev's database", True, "HostToContainer"),
    ("nvcache-disks", "/run/mdadm"): HostPath("else the node's udev rules start arrays that are half made"),
    ("nvcache-disks", "/lib/modules"): HostPath("modprobe raid0, xfs", True, kind="Directory"),
    ("nvcache-disks", "/run/lvm"): HostPath("LVM's hints, shared with the node's own LVM"),
    ("nvcache-disks", "/run/lock/lvm"): HostPath("LVM's locks, shared with the node's own LVM"),
    ("nvcache-disks", "/var/lib/nvcache"): HostPath("parent of the mount point: the mount must reach the node", propagation="Bidirectional"),
    ("nvcache-disks", "/run/nvcache"): HostPath("tells the daemon what the stripe does (stripe.json)"),
    ("nvcache", "/var/lib/nvcache"): HostPath("sees the stripe whenever it is mounted", propagation="HostToContainer"),
    ("nvcache", "/mnt/nvcache"): HostPath("a directory on a file system that somebody else mounted", propagation="HostToContainer"),
    ("nvcache", "/run/nvcache"): HostPath("the pods' socket, and what the disks pod says"),
    ("nvcache", "/opt/kaito/models"): HostPath("KAITO mounts its local weights from there"),
}
CAPABILITIES = {
    ("prepare", "CHOWN"): "gives directories to the daemon",
    ("prepare", "FOWNER"): "sets the mode of directories that are the daemon's already",
}
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "SAS", "CONNECTION_STRING")


def spec_of(workload: Object) -> Any:
    """The pod's spec, in a workload of any kind."""
    return workload["spec"] if workload["kind"] == "Pod" else workload["spec"]["template"]["spec"]


def workloads(found: list[Object]) -> Iterator[tuple[str, Any]]:
    """Name and pod spec of everything that makes pods."""
    yield from ((item["metadata"]["name"], spec_of(item)) for item in found if item["kind"] in PODS)


def containers(found: list[Object]) -> Iterator[tuple[str, Any]]:
    """`workload/container` and spec of every container, init containers too."""
    for name, spec in workloads(found):
        yield from ((f"{name}/{one['name']}", one) for one in [*spec.get("initContainers", []), *spec["containers"]])


def only_disks_is_privileged(found: list[Object]) -> Iterator[str]:
    """Privileged is what may make and mount a stripe; nothing else needs it."""
    for name, one in containers(found):
        security = one.get("securityContext", {})
        if name == "nvcache-disks/disks":
            if not security.get("privileged"):
                yield f"{name} cannot mount: it is not privileged"
        elif security.get("privileged"):
            yield f"{name} is privileged"
        elif security.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"


def root_is_rare(found: list[Object]) -> Iterator[str]:
    """uid 0 only where directories are made or disks are handled; a read-only root and the runtime's seccomp profile everywhere else."""
    for name, spec in workloads(found):
        for one in [*spec.get("initContainers", []), *spec["containers"]]:
            where = f"{name}/{one['name']}"
            security = {**spec.get("securityContext", {}), **one.get("securityContext", {})}
            if not security.get("readOnlyRootFilesystem"):
                yield f"{where} may write to its root"
            if where == "nvcache-disks/disks":
                continue
            if where != "nvcache/prepare" and not (
                security.get("runAsNonRoot") and security.get("runAsUser") == DAEMON == security.get("runAsGroup")
            ):
                yield f"{where} is not {DAEMON}:{DAEMON}"
            if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
                yield f"{where} has no seccomp profile"


def capabilities_have_a_reason(found: list[Object]) -> Iterator[str]:
    """All dropped, and each one added is on the list."""
    for name, one in containers(found):
        security = one.get("securityContext", {})
        given = security.get("capabilities", {})
        if not security.get("privileged") and given.get("drop") != ["ALL"]:
            yield f"{name} does not drop all capabilities"
        yield from (f"{name} adds {added}" for added in given.get("add", []) if (one["name"], added) not in CAPABILITIES)


def namespaces_are_the_pods_own(found: list[Object]) -> Iterator[str]:
    """hostPID for the disks, since the node's mounts are in /proc/1; nothing else for anybody."""
    for name, spec in workloads(found):
        given = [one for one in ("hostPID", "hostIPC", "hostNetwork") if spec.get(one)]
        yield from (f"{name} has {one}" for one in given if (name, one) != ("nvcache-disks", "hostPID"))


def host_paths_have_a_reason(found: list[Object]) -> Iterator[str]:
    """Each on the list, mounted as it says there, and no more often than needed."""
    for name, spec in workloads(found):
        for volume in spec.get("volumes", []):
            if "hostPath" not in volume:
                continue
            path, kind = volume["hostPath"]["path"], volume["hostPath"].get("type")
            known = HOST_PATHS.get((name, path))
            if known is None:
                yield f"{name} has {path} of the node"
                continue
            if kind != known.kind:
                yield f"{name}: {path} is of type {kind}, not {known.kind}"
            for one in [*spec.get("initContainers", []), *spec["containers"]]:
                yield from (f"{name}/{one['name']}: {path} {wrong}" for wrong in _mounted(one, volume["name"], known))


def _mounted(container: Any, volume: str, known: HostPath) -> Iterator[str]:
    for mount in container.get("volumeMounts", []):
        if mount["name"] != volume:
            continue
        if known.read_only and not mount.get("readOnly"):
            yield "is writable"
        if mount.get("mountPropagation", "None") != known.propagation and container["name"] != "prepare":
            yield f"has propagation {mount.get('mountPropagation')}, not {known.propagation}"


def resources_are_told(found: list[Object]) -> Iterator[str]:
    """Requests for the scheduler and a limit of memory; a limit of CPU would only make it slow."""
    for name, one in containers(found):
        resources = one.get("resources", {})
        missing = [f"requests.{kind}" for kind in ("cpu", "memory") if kind not in resources.get("requests", {})]
        missing += [] if "memory" in resources.get("limits", {}) else ["limits.memory"]
        yield from (f"{name} has no {what}" for what in missing)
        if "cpu" in resources.get("limits", {}):
            yield f"{name} is throttled by a limit of CPU"


def probes_cannot_kill_for_a_disk(found: list[Object]) -> Iterator[str]:
    """Start-up and liveness kill: only the daemon has them, on what no disk can hold up. Readiness kills nobody, and everybody has it."""
    for name, spec in workloads(found):
        for one in spec["containers"]:
            asked = {kind: one.get(f"{kind}Probe", {}).get("httpGet", {}).get("path") for kind in ("startup", "liveness", "readiness")}
            if "readinessProbe" not in one:
                yield f"{name}/{one['name']} has no readinessProbe"
            if name == "nvcache-disks":
                yield from (f"{name}/{one['name']} has a {kind}" for kind in ("startupProbe", "livenessProbe") if kind in one)
            elif asked != {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}:
                yield f"{name}/{one['name']} is asked {asked}"


def no_secret_in_the_environment(found: list[Object]) -> Iterator[str]:
    """Secrets are files: an environment is inherited, dumped and shown by `kubectl describe`."""
    for name, one in containers(found):
        if any("secretRef" in source for source in one.get("envFrom", [])):
            yield f"{name} has a Secret as environment"
        for variable in one.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                yield f"{name} has a Secret as {variable['name']}"
            elif any(word in variable["name"].split("_") for word in SECRET_WORDS) and not variable["name"].endswith(("_FILE", "_PATH")):
                yield f"{name} may have a secret in {variable['name']}"


def tokens_only_where_used(found: list[Object]) -> Iterator[str]:
    """Only the daemon speaks to the API server, so only its container gets a token; by default all of every pod's would."""
    for name, spec in workloads(found):
        tokens = {volume["name"] for volume in spec.get("volumes", []) if "serviceAccountToken" in str(volume.get("projected"))}
        given = [one["name"] for one in [*spec.get("initContainers", []), *spec["containers"]] if tokens & _volumes(one)]
        if given != (["nvcache"] if name == "nvcache" else []):
            yield f"{name} gives a token to {given}"
        lives = [part.get("serviceAccountToken", {}).get("expirationSeconds", 0) for volume in spec.get("volumes", []) for part in _projected(volume)]
        yield from (f"{name} has a token of {seconds} s: the API server makes a year of 3607" for seconds in lives if seconds > 3600)
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name} gives a token to all its containers"
        accounts = [item["metadata"]["name"] for item in found if item["kind"] == "ServiceAccount"]
        if spec.get("serviceAccountName") not in (accounts if name == "nvcache" else [None]):
            yield f"{name} has service account {spec.get('serviceAccountName')}"


def _projected(volume: Any) -> list[Any]:
    return volume.get("projected", {}).get("sources", [])  # type: ignore[no-any-return]


def _volumes(container: Any) -> set[str]:
    return {mount["name"] for mount in container.get("volumeMounts", [])}


def images_say_their_version(found: list[Object]) -> Iterator[str]:
    """What runs is what was tested: ours carry this version, no other floats."""
    for name, one in containers(found):
        image, _, tag = one["image"].partition("@")[0].rpartition(":")
        if not image or "/" in tag or tag == "latest":
            yield f"{name} floats: {one['image']}"
        elif image.rpartition("/")[2] == "nvcache" and tag != __version__:
            yield f"{name} is {tag}, and this is {__version__}"


def there_is_time_to_stop(found: list[Object]) -> Iterator[str]:
    """The kubelet waits longer than the daemons ever take; else a blocked disk ends in SIGKILL half way."""
    longest = {"nvcache": serve.EXIT_SECONDS, "nvcache-disks": keep.EXIT_SECONDS}
    for name, spec in workloads(found):
        grace = spec.get("terminationGracePeriodSeconds", 30)
        if grace < longest[name] + 5:
            yield f"{name} has {grace} s to stop, and may take {longest[name]:g}"


def upgrades_are_one_node_at_a_time(found: list[Object]) -> Iterator[str]:
    """A rolling update that takes the old pod down first: both keep a lock and a socket that only one can have."""
    for item in found:
        if item["kind"] == "DaemonSet":
            strategy = item["spec"].get("updateStrategy", {})
            rolling = strategy.get("rollingUpdate", {})
            if strategy.get("type") != "RollingUpdate" or not rolling.get("maxUnavailable") or rolling.get("maxSurge"):
                yield f"{item['metadata']['name']} is not updated one after another"


def labels_select_their_own(found: list[Object]) -> Iterator[str]:
    """Two DaemonSets that select each other's pods fight over them; the selector can never be changed later."""
    ours = [item for item in found if item["kind"] == "DaemonSet"]
    for item in ours:
        wanted = item["spec"]["selector"]["matchLabels"].items()
        taken = {one["metadata"]["name"] for one in ours if wanted <= one["spec"]["template"]["metadata"]["labels"].items()}
        if taken != {item["metadata"]["name"]}:
            yield f"{item['metadata']['name']} selects the pods of {sorted(taken)}"
        if {"app.kubernetes.io/version", "helm.sh/chart"} & dict(wanted).keys():
            yield f"{item['metadata']['name']} selects by what changes"


def pods_stay_on_gpu_nodes(found: list[Object]) -> Iterator[str]:
    """They choose their nodes, tolerate those nodes' taints (nvcache's own too), and are not the first to be evicted."""
    for name, spec in workloads(found):
        if not spec.get("nodeSelector") and not spec.get("affinity", {}).get("nodeAffinity"):
            yield f"{name} runs on every node"
        if not spec.get("priorityClassName"):
            yield f"{name} has no priority"
        keys = {one.get("key") for one in spec.get("tolerations", [])}
        if not {"nvcache.io/not-ready", "nvidia.com/gpu"} <= keys and not any("key" not in one for one in spec.get("tolerations", [])):
            yield f"{name} does not tolerate the taints of GPU nodes and nvcache's own"


def disks_have_no_network(found: list[Object]) -> Iterator[str]:
    """Deny-all for the privileged pod: it needs none. The daemon's pod is not caught by it."""
    pods = {item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"] for item in found if item["kind"] == "DaemonSet"}
    closed = set()
    for item in found:
        if item["kind"] == "NetworkPolicy":
            spec, wanted = item["spec"], item["spec"].get("podSelector", {}).get("matchLabels", {}).items()
            if set(spec.get("policyTypes", [])) == {"Ingress", "Egress"} and not spec.get("ingress") and not spec.get("egress"):
                closed |= {name for name, labels in pods.items() if wanted <= labels.items()}
    if closed != pods.keys() & {"nvcache-disks"}:
        yield f"closed off: {sorted(closed)}"


def rights_are_few(found: list[Object]) -> Iterator[str]:
    """Its node read and patched, events created: nothing else, and never by a wildcard."""
    wanted = {("", "nodes"): {"get", "patch"}, ("", "nodes/status"): {"patch"}, ("", "events"): {"create"}}
    for item in found:
        for rule in item.get("rules", []) if item["kind"] in ("Role", "ClusterRole") else []:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    more = set(rule["verbs"]) - wanted.get((group, resource), set())
                    yield from (f"{item['metadata']['name']} may {verb} {resource}" for verb in sorted(more))


def the_node_is_its_own(found: list[Object]) -> Iterator[str]:
    """RBAC cannot say "its own node"; an admission policy does, bound, and failing closed."""
    if not any(item["kind"] == "ClusterRoleBinding" for item in found):
        return
    policies = {item["metadata"]["name"]: item["spec"] for item in found if item["kind"] == "ValidatingAdmissionPolicy"}
    bound = {item["spec"]["policyName"]: item["spec"] for item in found if item["kind"] == "ValidatingAdmissionPolicyBinding"}
    if not policies or policies.keys() != bound.keys():
        yield f"policies {sorted(policies)}, bindings {sorted(bound)}"
    yield from (f"{name} lets pass what it cannot judge" for name, spec in policies.items() if spec.get("failurePolicy") != "Fail")
    yield from (f"{name} does not deny" for name, spec in bound.items() if spec.get("validationActions") != ["Deny"])


def namespaces_are_where_they_belong(found: list[Object]) -> Iterator[str]:
    """What is in no namespace must not name one. kustomize's `namespace:` gives one to kinds that it does not know; GitOps tools then never agree."""
    for item in found:
        if ("namespace" in item["metadata"]) == (item["kind"] in IN_NO_NAMESPACE):
            yield f"{item['kind']}/{item['metadata']['name']} {'has a' if item['kind'] in IN_NO_NAMESPACE else 'has no'} namespace"


def metrics_are_found(found: list[Object]) -> Iterator[str]:
    """A PodMonitor, if there is one, selects the daemon's pods, and names a port that they have."""
    daemons = {item["metadata"]["name"]: item["spec"]["template"] for item in found if item["kind"] == "DaemonSet"}
    for item in found:
        if item["kind"] == "PodMonitor":
            wanted = item["spec"]["selector"]["matchLabels"].items()
            if [name for name, one in daemons.items() if wanted <= one["metadata"]["labels"].items()] != ["nvcache"]:
                yield "the PodMonitor does not select the daemon's pods"
            ports = {port["name"] for one in daemons["nvcache"]["spec"]["containers"] for port in one.get("ports", [])}
            yield from (f"no port {end['port']}" for end in item["spec"]["podMetricsEndpoints"] if end["port"] not in ports)


def namespace_says_what_it_allows(found: list[Object]) -> Iterator[str]:
    """Pod Security: hostPath needs privileged; the label says so, rather than every pod being refused."""
    for item in found:
        if item["kind"] == "Namespace" and item["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "privileged":
            yield f"namespace {item['metadata']['name']} would refuse the pods"


DAEMON_POLICIES: tuple[Policy, ...] = (
    only_disks_is_privileged,
    root_is_rare,
    capabilities_have_a_reason,
    namespaces_are_the_pods_own,
    host_paths_have_a_reason,
    resources_are_told,
    probes_cannot_kill_for_a_disk,
    no_secret_in_the_environment,
    tokens_only_where_used,
    images_say_their_version,
    there_is_time_to_stop,
    upgrades_are_one_node_at_a_time,
    labels_select_their_own,
    pods_stay_on_gpu_nodes,
    disks_have_no_network,
    rights_are_few,
    the_node_is_its_own,
    namespaces_are_where_they_belong,
    metrics_are_found,
    namespace_says_what_it_allows,
)
