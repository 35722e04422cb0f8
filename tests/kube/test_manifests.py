"""The manifests as `kubectl kustomize` renders them: Kubernetes' own schemas, our policies, and that nvcache reads the settings and flags in them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import click
import pytest

from nvcache import __version__
from nvcache.errors import ConfigError
from tests.kube import commands, consumers, policies, schemas
from tests.kube.consumers import CONSUMER_POLICIES
from tests.kube.editing import GONE, altered
from tests.kube.policies import DAEMON_POLICIES, Policy
from tests.support import kubetools
from tests.support.kubetools import ROOT, Object

DEPLOY = ROOT / "deploy/daemonset"
OVERLAYS = ("azure-md", "azure-lvm", "directory", "kaito")
RENDERED = (*OVERLAYS, "teardown", "monitored")
EXAMPLES = sorted((ROOT / "deploy/examples").glob("*.yaml"))
PODS = [path for path in EXAMPLES if "kind: Workspace" not in path.read_text()]


@functools.cache
def rendered(name: str) -> list[Object]:
    """All objects of an overlay, or of what else can be applied. Never altered."""
    if name != "monitored":
        return kubetools.kustomize(DEPLOY / name if name == "teardown" else DEPLOY / "overlays" / name)
    with tempfile.TemporaryDirectory() as work:  # as an operator would add the component
        shutil.copytree(DEPLOY, Path(work) / "daemonset")
        (Path(work) / "kustomization.yaml").write_text("resources: [daemonset/overlays/azure-md]\ncomponents: [daemonset/components/podmonitor]\n")
        return kubetools.kustomize(Path(work))


@functools.cache
def example(path: Path) -> list[Object]:
    """All objects of an example. Never altered."""
    return kubetools.objects(path.read_text())


def changed(before: list[Object], after: list[Object]) -> set[str]:
    """What was altered, added or removed; a ConfigMap's hash is left out of its name."""
    differing = [item for item in before if item not in after] + [item for item in after if item not in before]
    return {re.sub(r"(ConfigMap/.*)-[a-z0-9]{10}$", r"\1", name) for name in kubetools.names(differing)}


def by_example(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("version", schemas.versions())
def test_kubernetes_knows_every_field(version: str) -> None:
    found = {json.dumps(item, sort_keys=True) for name in RENDERED for item in rendered(name)}
    found |= {json.dumps(item, sort_keys=True) for path in EXAMPLES for item in example(path)}
    assert [wrong for item in sorted(found) if (wrong := schemas.complaint(json.loads(item), version))] == []


@pytest.mark.parametrize("version", [schemas.versions()[0], schemas.versions()[-1]])
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("DaemonSet/nvcache pod containers nvcache imagePullpolicy", "Always"),
        ("DaemonSet/nvcache pod containers nvcache resources", []),
        ("DaemonSet/nvcache pod hostPid", True),
        ("PodMonitor/nvcache spec podMetricsEndpoints 0 prot", "http"),
        ("PodMonitor/nvcache spec selector", GONE),
    ],
)
def test_the_schemas_notice(version: str, where: str, value: object) -> None:
    wrong = [schemas.complaint(item, version) for item in altered(rendered("monitored"), where, value)]
    assert [text for text in wrong if text and where.split(" ", maxsplit=1)[0] in text] != []


def test_an_unknown_kind_is_noticed() -> None:
    assert schemas.complaint({"apiVersion": "apps/v1", "kind": "DemonSet", "metadata": {"name": "x"}}, schemas.versions()[-1])


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("policy", DAEMON_POLICIES)
def test_manifests_keep_to(policy: Policy, name: str) -> None:
    assert list(policy(rendered(name))) == []


@pytest.mark.parametrize("path", PODS, ids=by_example)
@pytest.mark.parametrize("policy", CONSUMER_POLICIES)
def test_examples_keep_to(policy: Policy, path: Path) -> None:
    assert list(policy(example(path))) == []


@pytest.mark.parametrize("name", RENDERED)
def test_nvcache_reads_every_command_line(name: str) -> None:
    for _, one in policies.containers(rendered(name)):
        for words in commands.lines(one):
            commands.parsed(words)


@pytest.mark.parametrize("path", PODS, ids=by_example)
def test_nvcache_reads_every_command_line_of_the_example(path: Path) -> None:
    asked = [commands.parsed(words) for _, one in policies.containers(example(path)) for words in commands.lines(one)]
    assert "warm" in {names[-1] for names, _ in asked}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_daemon_is_set_as_its_pod_is_made(overlay: str, tmp_path: Path) -> None:
    chosen = commands.settings_of(rendered(overlay), "nvcache", "nvcache", tmp_path)
    one = commands.container(rendered(overlay), "nvcache", "nvcache")
    assert str(chosen.store) == policies.STORE
    assert str(chosen.socket) == "/run/nvcache/pods/nvcache.sock"
    assert f"unix://{chosen.admin_socket}" == commands.environment(one)["NVCACHE_URL"]
    assert (chosen.listen, chosen.listen_scope, chosen.listen_token_file) == ("[::]:9469", "metrics", None)
    assert {port["name"]: port["containerPort"] for port in one["ports"]} == {"http": 9469}
    assert (chosen.kubernetes, chosen.node_name, chosen.startup_taint) == (True, "gpu-0", "nvcache.io/not-ready")
    assert (chosen.follow, chosen.backend) == ((False, "directory") if overlay == "directory" else (True, None))
    assert (str(chosen.kaito_models), chosen.kaito_store) == ("/opt/kaito/models" if overlay == "kaito" else "None", None)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_path_the_daemon_is_given_is_mounted(overlay: str, tmp_path: Path) -> None:
    chosen = commands.settings_of(rendered(overlay), "nvcache", "nvcache", tmp_path)
    one = commands.container(rendered(overlay), "nvcache", "nvcache")
    writable = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
    for written in (chosen.store, chosen.socket, chosen.admin_socket, chosen.kaito_models):
        assert written is None or writable & {str(written), *map(str, written.parents)}, written
    assert chosen.hf_token_path is not None
    assert str(chosen.hf_token_path.parent) in {mount["mountPath"] for mount in one["volumeMounts"]} - writable


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prepare_gives_away_nothing_that_a_link_leads_to(overlay: str, tmp_path: Path) -> None:
    """A hostile daemon owns pods/, so it can put a link there; `.` would be /run/nvcache itself, where the disks pod writes as root."""
    script = commands.container(rendered(overlay), "nvcache", "prepare")["args"][0]
    for path in ("/run/nvcache", "/var/lib/nvcache", "/opt/kaito"):
        script = script.replace(path, f"{tmp_path}{path}")
        (tmp_path / path.lstrip("/")).mkdir(parents=True)
    script = re.sub(r"-o \d+ -g \d+", f"-o {os.getuid()} -g {os.getgid()}", script)
    run = tmp_path / "run/nvcache"
    (run / "pods").symlink_to(".")
    for _ in range(2):
        subprocess.run(["sh", "-euc", script], check=True, timeout=20)
        assert not (run / "pods").is_symlink()
        assert (stat.S_IMODE(run.stat().st_mode), stat.S_IMODE((run / "pods").stat().st_mode)) == (0o3775, 0o2750)


@pytest.mark.parametrize(("overlay", "backend"), [("azure-md", "md"), ("azure-lvm", "lvm"), ("kaito", "md")])
def test_the_disks_are_set_as_their_pod_is_made(overlay: str, backend: str, tmp_path: Path) -> None:
    chosen = commands.settings_of(rendered(overlay), "nvcache-disks", "disks", tmp_path)
    assert (chosen.backend, chosen.store_owner) == (backend, f"{policies.DAEMON}:{policies.DAEMON}")
    assert (f"{chosen.mount}/store", str(chosen.run_directory)) == (policies.STORE, "/run/nvcache/disks")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("nvcache.toml", 'alow = ["hf://*"]'),
        ("nvcache.toml", "allow = ["),
        ("nvcache.toml", 'max_bytes = "lots"'),
        ("nvcache.toml", '[[models]]\nref = "not a model"'),
        ("nvcache.toml", "lease_ttl = -1"),
    ],
)
def test_a_fault_in_a_file_is_noticed(file: str, text: str, tmp_path: Path) -> None:
    found = [{**item, "data": {file: text}} if file in item.get("data", {}) else item for item in rendered("azure-md")]
    with pytest.raises(ConfigError):
        commands.settings_of(found, "nvcache", "nvcache", tmp_path)


@pytest.mark.parametrize("flag", ["--folow", "--listen-scope=all", "--admin-socket"])
def test_a_fault_in_a_flag_is_noticed(flag: str, tmp_path: Path) -> None:
    found = altered(rendered("azure-md"), "DaemonSet/nvcache pod containers nvcache args +", flag)
    with pytest.raises(click.UsageError):
        commands.settings_of(found, "nvcache", "nvcache", tmp_path)


def test_who_changes_a_model_restarts_no_disks(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "daemonset")
    with (tmp_path / "daemonset/base/nvcache.toml").open("a") as file:
        file.write('[[models]]\nref = "hf://org/name"\n')
    now = kubetools.kustomize(tmp_path / "daemonset/overlays/azure-md")
    assert changed(rendered("azure-md"), now) == {"ConfigMap/nvcache-config", "DaemonSet/nvcache"}


def test_a_file_that_is_changed_in_place_restarts_nobody(tmp_path: Path) -> None:
    """With the generator's option that docs/kubernetes.md names."""
    shutil.copytree(DEPLOY, tmp_path / "daemonset")
    generator = "{name: nvcache-config, namespace: nvcache, behavior: merge, files: [nvcache.toml], options: {disableNameSuffixHash: true}}"
    (tmp_path / "kustomization.yaml").write_text(f"resources: [daemonset/overlays/azure-md]\nconfigMapGenerator: [{generator}]\n")
    found = []
    for model in ("one", "two"):
        (tmp_path / "nvcache.toml").write_text(f'[[models]]\nref = "hf://org/{model}"\n')
        found.append(kubetools.kustomize(tmp_path))
    assert changed(*found) == {"ConfigMap/nvcache-config"}
    assert "disableNameSuffixHash: true" in (ROOT / "docs/kubernetes.md").read_text()


def test_who_changes_the_disks_restarts_no_daemon(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "daemonset")
    with (tmp_path / "daemonset/disks/disks.toml").open("a") as file:
        file.write("expected_disks = 8\n")
    now = kubetools.kustomize(tmp_path / "daemonset/overlays/azure-md")
    assert changed(rendered("azure-md"), now) == {"ConfigMap/nvcache-disks", "DaemonSet/nvcache-disks"}


def test_nothing_is_privileged_where_the_disks_are_somebody_elses() -> None:
    assert [name for name, _ in policies.workloads(rendered("directory"))] == ["nvcache"]
    assert "privileged: true" not in kubetools.run(kubetools.KUBECTL, "kustomize", DEPLOY / "overlays/directory")


DAEMON_FAULTS: list[tuple[Policy, str, object]] = [
    (policies.only_disks_is_privileged, "DaemonSet/nvcache pod containers nvcache securityContext privileged", True),
    (policies.only_disks_is_privileged, "DaemonSet/nvcache pod initContainers prepare securityContext allowPrivilegeEscalation", GONE),
    (policies.only_disks_is_privileged, "DaemonSet/nvcache-disks pod containers disks securityContext privileged", False),
    (policies.root_is_rare, "DaemonSet/nvcache pod containers nvcache securityContext readOnlyRootFilesystem", False),
    (policies.root_is_rare, "DaemonSet/nvcache pod containers nvcache securityContext runAsUser", 0),
    (policies.root_is_rare, "DaemonSet/nvcache pod containers nvcache securityContext seccompProfile", {"type": "Unconfined"}),
    (policies.capabilities_have_a_reason, "DaemonSet/nvcache pod containers nvcache securityContext capabilities", GONE),
    (policies.capabilities_have_a_reason, "DaemonSet/nvcache pod initContainers prepare securityContext capabilities add +", "SYS_ADMIN"),
    (policies.namespaces_are_the_pods_own, "DaemonSet/nvcache pod hostPID", True),
    (policies.namespaces_are_the_pods_own, "DaemonSet/nvcache-disks pod hostIPC", True),
    (policies.namespaces_are_the_pods_own, "DaemonSet/nvcache-disks pod hostNetwork", True),
    (policies.host_paths_have_a_reason, "DaemonSet/nvcache pod volumes +", {"name": "x", "hostPath": {"path": "/", "type": "Directory"}}),
    (policies.host_paths_have_a_reason, "DaemonSet/nvcache pod volumes +", {"name": "x", "hostPath": {"path": "/dev", "type": "Directory"}}),
    (policies.host_paths_have_a_reason, "DaemonSet/nvcache-disks pod volumes +", {"name": "x", "hostPath": {"path": "/run/mdadm"}}),
    (policies.host_paths_have_a_reason, "DaemonSet/nvcache pod containers nvcache volumeMounts /var/lib/nvcache mountPropagation", "Bidirectional"),
    (policies.host_paths_have_a_reason, "DaemonSet/nvcache-disks pod containers disks volumeMounts /var/lib/nvcache mountPropagation", GONE),
    (policies.host_paths_have_a_reason, "DaemonSet/nvcache-disks pod containers disks volumeMounts /lib/modules readOnly", GONE),
    (policies.resources_are_told, "DaemonSet/nvcache pod containers nvcache resources requests memory", GONE),
    (policies.resources_are_told, "DaemonSet/nvcache pod initContainers prepare resources limits", GONE),
    (policies.resources_are_told, "DaemonSet/nvcache-disks pod containers disks resources limits cpu", "1"),
    (policies.probes_cannot_kill_for_a_disk, "DaemonSet/nvcache pod containers nvcache startupProbe", GONE),
    (policies.probes_cannot_kill_for_a_disk, "DaemonSet/nvcache pod containers nvcache livenessProbe httpGet path", "/readyz"),
    (policies.probes_cannot_kill_for_a_disk, "DaemonSet/nvcache pod containers nvcache readinessProbe httpGet path", "/healthz"),
    (policies.probes_cannot_kill_for_a_disk, "DaemonSet/nvcache-disks pod containers disks livenessProbe", {"exec": {"command": ["true"]}}),
    (policies.probes_cannot_kill_for_a_disk, "DaemonSet/nvcache-disks pod containers disks startupProbe", {"exec": {"command": ["true"]}}),
    (policies.probes_cannot_kill_for_a_disk, "DaemonSet/nvcache-disks pod containers disks readinessProbe", GONE),
    (policies.no_secret_in_the_environment, "DaemonSet/nvcache pod containers nvcache envFrom", [{"secretRef": {"name": "x"}}]),
    (policies.no_secret_in_the_environment, "DaemonSet/nvcache pod containers nvcache env +", {"name": "HF_TOKEN", "value": "x"}),
    (
        policies.no_secret_in_the_environment,
        "DaemonSet/nvcache pod containers nvcache env +",
        {"name": "X", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}},
    ),
    (policies.tokens_only_where_used, "DaemonSet/nvcache-disks pod automountServiceAccountToken", GONE),
    (policies.tokens_only_where_used, "DaemonSet/nvcache-disks pod serviceAccountName", "nvcache"),
    (policies.tokens_only_where_used, "DaemonSet/nvcache pod serviceAccountName", "default"),
    (policies.tokens_only_where_used, "DaemonSet/nvcache pod initContainers prepare volumeMounts +", {"name": "token", "mountPath": "/token"}),
    (policies.tokens_only_where_used, "DaemonSet/nvcache pod containers nvcache volumeMounts token", GONE),
    (policies.tokens_only_where_used, "DaemonSet/nvcache pod volumes token projected sources 0 serviceAccountToken expirationSeconds", 3607),
    (policies.images_say_their_version, "DaemonSet/nvcache pod containers nvcache image", "nvcache:latest"),
    (policies.images_say_their_version, "DaemonSet/nvcache pod containers nvcache image", "example.com:5000/nvcache"),
    (policies.images_say_their_version, "DaemonSet/nvcache-disks pod containers disks image", "nvcache:0.0.1"),
    (policies.there_is_time_to_stop, "DaemonSet/nvcache pod terminationGracePeriodSeconds", 10),
    (policies.there_is_time_to_stop, "DaemonSet/nvcache-disks pod terminationGracePeriodSeconds", 5),
    (policies.upgrades_are_one_node_at_a_time, "DaemonSet/nvcache spec updateStrategy rollingUpdate maxSurge", 1),
    (policies.upgrades_are_one_node_at_a_time, "DaemonSet/nvcache-disks spec updateStrategy type", "OnDelete"),
    (policies.labels_select_their_own, "DaemonSet/nvcache spec selector matchLabels", {}),
    (policies.labels_select_their_own, "DaemonSet/nvcache spec template metadata labels", {}),
    (policies.pods_stay_on_gpu_nodes, "DaemonSet/nvcache pod priorityClassName", GONE),
    (policies.pods_stay_on_gpu_nodes, "DaemonSet/nvcache-disks pod tolerations", []),
    (policies.disks_have_no_network, "NetworkPolicy/nvcache-disks spec podSelector", {}),
    (policies.disks_have_no_network, "NetworkPolicy/nvcache-disks spec policyTypes", ["Ingress"]),
    (policies.disks_have_no_network, "NetworkPolicy/nvcache-disks spec egress", [{}]),
    (policies.rights_are_few, "ClusterRole/nvcache rules 0 verbs +", "delete"),
    (policies.rights_are_few, "ClusterRole/nvcache rules 0 resources +", "secrets"),
    (policies.the_node_is_its_own, "ValidatingAdmissionPolicyBinding/nvcache-own-node spec validationActions", ["Audit"]),
    (policies.the_node_is_its_own, "ValidatingAdmissionPolicyBinding/nvcache-own-node spec policyName", "other"),
    (policies.the_node_is_its_own, "ValidatingAdmissionPolicy/nvcache-own-node spec failurePolicy", "Ignore"),
    (policies.namespaces_are_where_they_belong, "ClusterRole/nvcache metadata namespace", "nvcache"),
    (policies.namespaces_are_where_they_belong, "DaemonSet/nvcache metadata namespace", GONE),
    (policies.metrics_are_found, "PodMonitor/nvcache spec podMetricsEndpoints 0 port", "https"),
    (policies.metrics_are_found, "PodMonitor/nvcache spec selector matchLabels", {}),
    (policies.namespace_says_what_it_allows, "Namespace/nvcache metadata labels pod-security.kubernetes.io/enforce", "baseline"),
]
CONSUMER = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: engine}
spec:
  selector: {matchLabels: {app: engine}}
  template:
    metadata: {labels: {app: engine}}
    spec:
      automountServiceAccountToken: false
      securityContext: {supplementalGroups: [65532]}
      initContainers:
        - name: warm
          image: nvcache:VERSION
          command: [nvcache, warm, --lease]
          args: ["hf://org/name"]
          resources: &small {requests: {cpu: 10m, memory: 64Mi}, limits: {memory: 64Mi}}
          volumeMounts: &socket
            - {name: nvcache, mountPath: /run/nvcache, readOnly: true, mountPropagation: HostToContainer}
        - name: hold
          image: nvcache:VERSION
          command: [nvcache, hold]
          args: ["hf://org/name"]
          restartPolicy: Always
          resources: *small
          volumeMounts: *socket
      containers:
        - name: engine
          image: example.com/engine:1.2.3
          env: [{name: HF_TOKEN_PATH, value: /etc/token}]
          resources: *small
          volumeMounts:
            - {name: hub, mountPath: /var/lib/nvcache/mnt/store/hub, readOnly: true, mountPropagation: HostToContainer}
      volumes:
        - {name: nvcache, hostPath: {path: /run/nvcache/pods, type: Directory}}
        - {name: hub, hostPath: {path: /var/lib/nvcache/mnt/store/hub, type: Directory}}
""".replace("VERSION", __version__)
HUB = "Deployment/engine pod containers engine volumeMounts hub"
CONSUMER_FAULTS: list[tuple[Policy, str, object]] = [
    (consumers.consumers_are_ordinary, "Deployment/engine pod securityContext supplementalGroups", [65533]),
    (consumers.consumers_are_ordinary, "Deployment/engine pod hostPID", True),
    (consumers.consumers_are_ordinary, "Deployment/engine pod automountServiceAccountToken", GONE),
    (consumers.consumers_are_ordinary, "Deployment/engine pod containers engine securityContext", {"privileged": True}),
    (consumers.consumers_are_ordinary, "Deployment/engine pod initContainers warm securityContext", {"runAsUser": 0}),
    (consumers.consumers_are_ordinary, "Deployment/engine pod initContainers warm securityContext", {"capabilities": {"add": ["SYS_ADMIN"]}}),
    (consumers.consumers_only_read, f"{HUB} readOnly", GONE),
    (consumers.consumers_only_read, f"{HUB} mountPropagation", GONE),
    (consumers.consumers_only_read, f"{HUB} mountPath", "/models"),
    (consumers.consumers_only_read, "Deployment/engine pod volumes hub hostPath type", "DirectoryOrCreate"),
    (consumers.consumers_only_read, "Deployment/engine pod volumes hub hostPath path", "/var/lib/nvcache"),
    (consumers.consumers_only_read, "Deployment/engine pod volumes nvcache hostPath path", "/run/nvcache/pods/nvcache.sock"),
    (consumers.leases_live_as_long_as_the_pod, "Deployment/engine pod initContainers hold", GONE),
    (consumers.leases_live_as_long_as_the_pod, "Deployment/engine pod initContainers hold restartPolicy", GONE),
    (consumers.variables_are_there, "Deployment/engine pod initContainers hold args 0", "$(MODEL)"),
    (policies.resources_are_told, "Deployment/engine pod initContainers warm resources", GONE),
    (policies.no_secret_in_the_environment, "Deployment/engine pod containers engine env +", {"name": "HF_TOKEN", "value": "x"}),
    (policies.images_say_their_version, "Deployment/engine pod containers engine image", "example.com/engine"),
]


@pytest.mark.parametrize(("policy", "where", "value"), CONSUMER_FAULTS)
def test_a_fault_in_an_example_is_noticed(policy: Policy, where: str, value: object) -> None:
    found = kubetools.objects(CONSUMER)
    assert list(policy(found)) == []
    assert list(policy(altered(found, where, value))) != []


@pytest.mark.parametrize(("policy", "where", "value"), DAEMON_FAULTS)
def test_a_fault_in_an_overlay_is_noticed(policy: Policy, where: str, value: object) -> None:
    assert list(policy(altered(rendered("monitored"), where, value))) != []


@pytest.mark.parametrize("which", ["DAEMON", "CONSUMER"])
def test_every_policy_is_shown_to_notice(which: str) -> None:
    shown = {"DAEMON": DAEMON_FAULTS, "CONSUMER": CONSUMER_FAULTS}[which]
    assert {policy for policy, _, _ in shown} == set({"DAEMON": DAEMON_POLICIES, "CONSUMER": CONSUMER_POLICIES}[which])
