"""What the service account may do: no more verbs than are used, and by the admission policies no more than its own node's own keys.

The policies' expressions are evaluated by a CEL implementation as the API server would: variables first, then each validation.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml

from nvcache.core.ref import parse_ref
from nvcache.core.signals import CONDITION, MODELS, PREFIX, Disks, Facts, Held, NodeFacts, change, label_of
from nvcache.settings import Settings
from tests.support.kubeapi import RIGHTS, merged

FILE = Path(__file__).parents[2] / "deploy/daemonset/base/rbac.yaml"
OBJECTS = [document for document in yaml.safe_load_all(FILE.read_text()) if document]
POLICIES = {item["metadata"]["name"]: item["spec"] for item in OBJECTS if item["kind"] == "ValidatingAdmissionPolicy"}
NODE_NAME = "authentication.kubernetes.io/node-name"
NODE: dict[str, Any] = {
    "metadata": {"name": "gpu-1", "labels": {"kubernetes.io/hostname": "gpu-1"}, "annotations": {"theirs": "1"}},
    "spec": {"taints": [{"key": "nvcache.io/not-ready", "effect": "NoSchedule"}, {"key": "sku", "value": "gpu", "effect": "NoSchedule"}]},
    "status": {"conditions": [{"type": "Ready", "status": "True"}], "capacity": {"cpu": "8"}, "images": [{"names": ["a"]}]},
}
EVENT: dict[str, Any] = {
    "metadata": {"name": "gpu-1.0123", "namespace": "default"},
    "involvedObject": {"kind": "Node", "name": "gpu-1"},
    "source": {"component": "nvcache"},
}


def refusals(policy: str, new: dict[str, Any], old: dict[str, Any] | None = None, *, node: str | None = "gpu-1", user: str = "nvcache") -> list[str]:
    """The messages of the validations that fail; empty also where the policy is about somebody else."""
    extra = {} if node is None else {"extra": {NODE_NAME: [node]}}
    request = {"userInfo": {"username": f"system:serviceaccount:nvcache:{user}", **extra}}
    facts: dict[str, Any] = {"request": request, "object": new, "oldObject": old}
    spec = POLICIES[policy]
    if not all(cel.evaluate(each["expression"], facts) for each in spec["matchConditions"]):
        return []
    facts["variables"] = {}
    for variable in spec.get("variables", []):
        facts["variables"][variable["name"]] = cel.evaluate(variable["expression"], facts)
    return [each["message"] for each in spec["validations"] if cel.evaluate(each["expression"], facts) is not True]


def patched(patch: dict[str, Any]) -> dict[str, Any]:
    """The node after a strategic patch."""
    return dict(merged(NODE, patch, strategic=True))


OURS = [
    {"metadata": {"labels": {label_of(parse_ref("a/b")): "ready"}, "annotations": {MODELS: "[]"}}},
    {"status": {"conditions": [{"type": CONDITION, "status": "False", "reason": "N03", "message": "refused"}]}},
    {"spec": {"taints": [NODE["spec"]["taints"][1]]}},
    {"metadata": {"resourceVersion": "2"}},
]
OTHERS = [
    {"metadata": {"labels": {"kubernetes.io/hostname": "gpu-2"}}},
    {"metadata": {"labels": {"kubernetes.io/hostname": None}}},
    {"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}},
    {"metadata": {"annotations": {"theirs": "2"}}},
    {"metadata": {"annotations": {"theirs": None}}},
    {"metadata": {"annotations": {f"{PREFIX}other": "1"}}},
    {"metadata": {"annotations": {MODELS: "x" * 40001}}},
    {"metadata": {"labels": {f"{PREFIX}{number}": "ready" for number in range(257)}}},
    {"metadata": {"finalizers": ["a/b"]}},
    {"metadata": {"ownerReferences": [{"kind": "Pod"}]}},
    {"spec": {"taints": [NODE["spec"]["taints"][0]]}},
    {"spec": {"taints": [*NODE["spec"]["taints"], {"key": "nvcache.io/other", "effect": "NoExecute"}]}},
    {"spec": {"taints": [{"key": "sku", "value": "cpu", "effect": "NoSchedule"}]}},
    {"spec": {"unschedulable": True}},
    {"spec": {"providerID": "azure:///x"}},
    {"spec": {"podCIDRs": ["10.0.0.0/8"]}},
    {"spec": {"unknownToUs": {"a": 1}}},
    {"status": {"conditions": [{"type": "Ready", "status": "False"}]}},
    {"status": {"conditions": [{"type": "MemoryPressure", "status": "True"}]}},
    {"status": {"conditions": [{"type": CONDITION, "status": "True", "message": "x" * 4001}]}},
    {"status": {"capacity": {"nvidia.com/gpu": "8"}}},
    {"status": {"runtimeHandlers": [{"name": "kata"}]}},
    {"status": {"features": {"supplementalGroupsPolicy": True}}},
    {"status": {"declaredFeatures": ["InPlacePodVerticalScaling"]}},
    {"status": {"phase": "Terminated"}},
    {"status": {"capacity": None}},
    {"status": {"allocatable": {"cpu": "0"}}},
    {"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}},
    {"status": {"images": []}},
    {"status": {"volumesAttached": [{"name": "a", "devicePath": "b"}]}},
]


@pytest.mark.parametrize("patch", OURS, ids=str)
def test_its_own_node_gets_its_own_keys(patch: dict[str, Any]) -> None:
    assert refusals("nvcache-own-node", patched(patch), NODE) == []


@pytest.mark.parametrize("patch", OURS, ids=str)
def test_another_node_gets_nothing_and_nor_does_a_token_of_no_node(patch: dict[str, Any]) -> None:
    for node in ("gpu-2", "", None):
        assert refusals("nvcache-own-node", patched(patch), NODE, node=node), node


@pytest.mark.parametrize("patch", OTHERS, ids=str)
def test_what_is_not_its_own_stays_as_it_is(patch: dict[str, Any]) -> None:
    assert len(refusals("nvcache-own-node", patched(patch), NODE)) == 1
    assert refusals("nvcache-own-node", patched(patch), NODE, user="kubelet") == [], "others are none of this policy's business"


def test_a_node_without_labels_annotations_and_taints_can_be_marked_and_unmarked() -> None:
    bare: dict[str, Any] = {"metadata": {"name": "gpu-1"}, "spec": {}, "status": {}}
    marked = merged(bare, OURS[0] | OURS[1], strategic=True)
    assert refusals("nvcache-own-node", marked, bare) == []
    assert refusals("nvcache-own-node", bare, marked) == []


def test_its_condition_is_there_once() -> None:
    twice = copy.deepcopy(NODE)
    twice["status"]["conditions"] += [{"type": CONDITION, "status": status} for status in ("True", "False")]
    assert len(refusals("nvcache-own-node", twice, NODE)) == 1


def test_the_most_that_the_daemon_shows_is_allowed() -> None:
    held = tuple(Held(f"hf://{'o' * 90}/{number}@{number:040}", (f"hf://{'o' * 90}/{number}",), 10**12) for number in range(500))
    facts = Facts(Disks("mounted", 1, "N03", "C10", "r" * 5000, "m" * 5000, "w" * 5000), held, space=(10**14,) * 4)
    wanted = change(facts, NodeFacts.of(NODE), "nvcache.io/not-ready", "2026-01-01T00:00:00Z")
    assert wanted.condition is not None
    shown = {"type": CONDITION, "status": wanted.condition.status, "message": wanted.condition.message}
    patch = {"metadata": {"labels": wanted.labels, "annotations": wanted.annotations}, "status": {"conditions": [shown]}}
    assert refusals("nvcache-own-node", patched(patch), NODE) == []


def test_events_are_its_own_about_its_own_node() -> None:
    assert refusals("nvcache-own-events", EVENT) == []
    for wrong in (
        {"involvedObject": {"kind": "Pod"}},
        {"involvedObject": {"name": "gpu-2"}},
        {"metadata": {"namespace": "kube-system"}},
        {"source": {"component": "kubelet"}},
    ):
        assert refusals("nvcache-own-events", merged(copy.deepcopy(EVENT), wrong, strategic=False)), wrong
    assert refusals("nvcache-own-events", EVENT, node=None)


def test_the_role_is_what_the_daemon_uses_and_no_more() -> None:
    rules = next(item["rules"] for item in OBJECTS if item["kind"] == "ClusterRole")
    granted = {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}
    assert granted == RIGHTS
    assert all(rule["apiGroups"] == [""] for rule in rules)


def test_every_policy_is_bound_and_denies() -> None:
    bound = {item["spec"]["policyName"]: item["spec"]["validationActions"] for item in OBJECTS if item["kind"].endswith("PolicyBinding")}
    assert bound == {name: ["Deny"] for name in POLICIES}
    assert all(spec["failurePolicy"] == "Fail" for spec in POLICIES.values())
    assert Settings.model_fields["startup_taint"].default.startswith(PREFIX), "the policy lets it remove only those"
