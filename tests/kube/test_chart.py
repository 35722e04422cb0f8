"""The Helm chart: with default values it is the azure-md overlay, with others the other overlays; what is mistyped is refused in words."""

from __future__ import annotations

import difflib
import functools
import json
import re
import shutil
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

import cel
import pytest
import yaml
from pydantic.fields import FieldInfo

from nvcache import __version__, settings
from nvcache.settings import LIVE, DiskSettings, MirrorSetting, ModelSetting, QueueSettings, Settings, TuningSettings
from tests.kube import commands, policies, schemas
from tests.kube.policies import DAEMON_POLICIES, Policy
from tests.kube.test_manifests import changed, rendered
from tests.support import kubetools
from tests.support.kubetools import HELM, ROOT, Object, ToolError

CHART = ROOT / "deploy/chart"
SAME = {
    "azure-md": [],
    "azure-lvm": ["--set", "backend=lvm"],
    "directory": ["--set", "backend=directory"],
    "kaito": ["--set", "kaito.enabled=true"],
    "monitored": ["--set", "podMonitor.enabled=true"],
}
NEIGHBOURS = "http://nvcache.nvcache.svc:9469/v1/blobs/{sha256}"
LISTEN_TOKEN = "/run/secrets/nvcache/listen-token"
OTHER = {
    "kaito on a directory": ["--set", "backend=directory,kaito.enabled=true"],
    "everything": [
        "--set-json",
        'models=[{"ref":"hf://org/name","pin":true,"include":["*.json"]}]',
        "--set-json",
        'disks.settings={"expected_disks":8,"disk_exclude":["S 1"],"tuning":{"md":{"read_ahead":"1MiB"}}}',
        "--set-json",
        'settings={"max_bytes":"2TB","lease_ttl":90.5,"require_digest":true,"workers":4,"az_hosts":["a \\"quoted\\" é<host"]}',
        "--set",
        "podMonitor.enabled=true,workloadIdentity.clientId=abc,image.repository=example.com:5000/team/nvcache,image.pullPolicy=Always",
        "--set-json",
        'imagePullSecrets=[{"name":"registry"}]',
        "--set-json",
        'env=[{"name":"HTTPS_PROXY","value":"http://proxy.example.com:3128"}]',
    ],
    "neighbours": [
        "--set-json",
        f'settings={{"share_blobs":true,"evict_high":0.9,"evict_low":0.8,"mirrors":[{{"url":"{NEIGHBOURS}","token_file":"{LISTEN_TOKEN}"}}]}}',
        "--set",
        "podMonitor.enabled=true",
    ],
}
IN_THE_TEMPLATES = {"store", "socket", "admin_socket", "listen", "listen_token_file", "listen_scope", "follow", "kubernetes", "node_name", "models"}
IN_THE_TEMPLATES |= {"kaito_models", "kaito_store", "backend", "mount", "run_directory", "store_owner"}


@functools.cache
def other(values: str) -> list[Object]:
    """All objects with such values. Never altered."""
    return kubetools.template(CHART, *OTHER[values])


@pytest.mark.parametrize("overlay", SAME)
def test_it_is_the_overlay(overlay: str) -> None:
    assert_same(kubetools.template(CHART, *SAME[overlay]), rendered(overlay))


@pytest.mark.parametrize("given", ["resources.limits.memory=5Gi", "settings.allow[0]=az://*", "podMonitor.enabled=true", "maxUnavailable=1"])
def test_a_difference_would_be_seen(given: str) -> None:
    assert difference(kubetools.template(CHART, "--set", given), rendered("azure-md"))


def test_it_can_be_installed_into_any_namespace() -> None:
    elsewhere = kubetools.template(CHART, namespace="elsewhere", release="other")
    assert_same(json.loads(json.dumps(elsewhere).replace("elsewhere", "nvcache")), rendered("azure-md"))


@pytest.mark.parametrize("values", OTHER)
@pytest.mark.parametrize("policy", DAEMON_POLICIES)
def test_other_values_keep_to(policy: Policy, values: str) -> None:
    assert list(policy(other(values))) == []


@pytest.mark.parametrize("version", ["1.30.0", schemas.versions()[-1]])
@pytest.mark.parametrize("values", OTHER)
def test_kubernetes_knows_every_field_with_other_values(version: str, values: str) -> None:
    assert [wrong for item in other(values) if (wrong := schemas.complaint(item, version))] == []


@pytest.mark.parametrize("values", [*SAME, *OTHER])
def test_lint(values: str) -> None:
    said = kubetools.run(HELM, "lint", "--strict", "--namespace", "nvcache", CHART, *{**SAME, **OTHER}[values])
    assert re.findall(r"\[(?:WARNING|ERROR)\].*", said) == []


def test_lint_would_notice(tmp_path: Path) -> None:
    broken = copy_of_chart(tmp_path)
    (broken / "templates/x.yaml").write_text("kind: {{ .Values.none.such }}\n")
    with pytest.raises(ToolError):
        kubetools.run(HELM, "lint", "--strict", broken)


def test_settings_arrive_as_they_were_given(tmp_path: Path) -> None:
    found = other("everything")
    chosen = commands.settings_of(found, "nvcache", "nvcache", tmp_path)
    assert (chosen.max_bytes, chosen.min_free, chosen.lease_ttl, chosen.require_digest, chosen.workers) == (2 * 10**12, 64 * 2**30, 90.5, True, 4)
    assert chosen.az_hosts == ('a "quoted" é<host',)
    assert chosen.models == (ModelSetting(ref="hf://org/name", pin=True, include=("*.json",)),)
    assert commands.environment(commands.container(found, "nvcache", "nvcache"))["HTTPS_PROXY"] == "http://proxy.example.com:3128"
    disks = commands.settings_of(found, "nvcache-disks", "disks", tmp_path)
    assert (disks.expected_disks, disks.disk_exclude, disks.tuning.md.read_ahead) == (8, ("S 1",), 2**20)


def test_nodes_that_share_ask_for_a_token_and_are_found_by_each_other(tmp_path: Path) -> None:
    found = other("neighbours")
    chosen = commands.settings_of(found, "nvcache", "nvcache", tmp_path)
    assert (chosen.share_blobs, chosen.listen_scope, str(chosen.listen_token_file)) == (True, "read", LISTEN_TOKEN)
    assert chosen.mirrors == (MirrorSetting(url=NEIGHBOURS, token_file=Path(LISTEN_TOKEN)),)
    assert (chosen.evict_high, chosen.evict_low) == (0.9, 0.8)
    objects = {f"{item['kind']}/{item['metadata']['name']}": item["spec"] for item in found if "spec" in item}
    service, pods = objects["Service/nvcache"], objects["DaemonSet/nvcache"]["template"]
    assert service["selector"].items() <= pods["metadata"]["labels"].items()
    port = urlsplit(NEIGHBOURS).port
    assert [(each["port"], each["targetPort"]) for each in service["ports"]] == [(port, "http")]
    assert {"name": "http", "containerPort": port} in commands.container(found, "nvcache", "nvcache")["ports"]
    assert [rule["ports"] for rule in objects["NetworkPolicy/nvcache"]["ingress"]] == [[{"port": port, "protocol": "TCP"}]]
    [end] = objects["PodMonitor/nvcache"]["podMetricsEndpoints"]
    assert end["authorization"]["credentials"] == {"name": "nvcache-credentials", "key": Path(LISTEN_TOKEN).name}
    assert "Service/nvcache" not in kubetools.names(other("everything"))


def test_kaito_finds_the_store_where_the_node_has_it(tmp_path: Path) -> None:
    found = kubetools.template(CHART, *OTHER["kaito on a directory"], "--set", "directory.path=/mnt/aks/nvcache")
    chosen = commands.settings_of(found, "nvcache", "nvcache", tmp_path)
    assert (str(chosen.store), str(chosen.kaito_store)) == (policies.STORE, "/mnt/aks/nvcache/store")


def test_another_startup_taint_is_tolerated_and_may_be_removed() -> None:
    key = "startup-taint.cluster-autoscaler.kubernetes.io/nvcache"
    found = kubetools.template(CHART, "--set", f"settings.startup_taint={key}")
    tolerated = [item["spec"]["template"]["spec"]["tolerations"] for item in found if item["kind"] == "DaemonSet"]
    assert [{"key": key, "operator": "Exists"} in each for each in tolerated] == [True, True]
    (policy,) = [item for item in found if item["kind"] == "ValidatingAdmissionPolicy" and item["metadata"]["name"].endswith("own-node")]
    (rule,) = [each["expression"] for each in policy["spec"]["validations"] if "may only remove taints" in each["message"]]
    taint, other = {"key": key, "effect": "NoSchedule"}, {"key": "other", "effect": "NoSchedule"}
    for old, new, allowed in (([taint, other], [other], True), ([taint, other], [taint], False), ([other], [other, taint], False)):
        assert cel.evaluate(rule, {"variables": {"taints": new, "oldTaints": old}}) is allowed


@pytest.mark.parametrize("given", ['models=[{"ref":"hf://org/name"}]', 'settings.allow=["az://*"]'])
def test_what_the_daemon_takes_over_by_itself_restarts_nothing(given: str) -> None:
    assert changed(kubetools.template(CHART), kubetools.template(CHART, "--set-json", given)) == {"ConfigMap/nvcache-config"}


def test_what_counts_from_the_start_restarts_the_daemon_and_no_disks() -> None:
    assert set(LIVE) == {"models", "allow"}, "the template leaves these out of its checksum"
    now = kubetools.template(CHART, "--set", "settings.lanes=7")
    assert changed(kubetools.template(CHART), now) == {"ConfigMap/nvcache-config", "DaemonSet/nvcache"}


def test_other_disks_restart_no_daemon() -> None:
    now = kubetools.template(CHART, "--set", "disks.settings.expected_disks=8")
    assert changed(kubetools.template(CHART), now) == {"ConfigMap/nvcache-disks", "DaemonSet/nvcache-disks"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bakend=lvm", "'bakend'"),
        ("backend=raid", "'/backend'"),
        ("settings.alow=x", "'alow'"),
        ("settings.socket=/x", "'socket'"),
        ("settings.log_level=loud", "'/settings/log_level'"),
        ("settings.workers=many", "'/settings/workers'"),
        ("disks.settings.backend=lvm", "'backend'"),
        ("disks.settings.tuning.raid.scheduler=none", "'raid'"),
        ("models[0].pin=true", "'ref'"),
        ("models[0].ref=hf://a/b,models[0].pinned=true", "'pinned'"),
        ("directory.path=mnt", "'/directory/path'"),
        ("image.tag=latest", "'/image/tag'"),
        ("kaito.enabled=yes", "'/kaito/enabled'"),
        ("settings.evict_high=much", "'/settings/evict_high'"),
        ("settings.mirrors[0].name=near", "'url'"),
        ("settings.mirrors[0].uri=http://x/{sha256}", "'uri'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(given: str, said: str) -> None:
    with pytest.raises(ToolError) as error:
        kubetools.template(CHART, "--set", given)
    assert "don't meet the specifications of the schema" in str(error.value)
    assert said in str(error.value)


def test_it_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_the_notes_name_what_is_there() -> None:
    def notes(*options: str) -> str:
        said = kubetools.run(HELM, "install", "nvcache", CHART, "--dry-run=client", "--namespace", "models", *options)
        return said.partition("NOTES:")[2]

    assert "kubectl -n models exec ds/nvcache -- nvcache ls" in notes()
    assert "set image.repository" in notes()
    assert "set image.repository" not in notes("--set", "image.repository=registry.example.com/nvcache")
    assert "ds/nvcache-disks" in notes()
    assert "ds/nvcache-disks" not in notes("--set", "backend=directory")
    assert "/mnt/x/store/models" in notes("--set", "backend=directory,directory.path=/mnt/x")


def test_the_schema_knows_every_setting() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    daemon = {name: field for name, field in Settings.model_fields.items() if name not in DiskSettings.model_fields}
    assert schema["settings"]["properties"] == described(daemon)
    assert schema["disks"]["properties"]["settings"]["properties"] == described(DiskSettings.model_fields)
    assert schema["models"]["items"] == _table(ModelSetting)


def assert_same(found: list[Object], wanted: list[Object]) -> None:
    """Fail with what is different, and nothing else."""
    if different := difference(found, wanted):
        pytest.fail(different, pytrace=False)


def difference(found: list[Object], wanted: list[Object]) -> str:
    """Where the chart is not the overlay: a diff from the overlay to the chart."""
    return "\n".join(difflib.unified_diff(_comparable(wanted), _comparable(found), "overlay", "chart", lineterm="", n=4))


def _comparable(found: list[Object]) -> list[str]:
    """As lines, without what may differ: the namespace, which Helm makes by itself; hashes; the order of objects, and of lists that have names."""
    text = re.sub(r'"(nvcache-(?:config|disks))-[a-z0-9]{10}"', r'"\1"', json.dumps([item for item in found if item["kind"] != "Namespace"]))
    objects = sorted(json.loads(text), key=lambda item: str(kubetools.names([item])))
    return yaml.safe_dump(_ordered(objects)).splitlines()


def _ordered(value: Any) -> Any:
    if isinstance(value, list):
        items = [_ordered(item) for item in value]
        named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: str(item.get("mountPath", item["name"]))) if named else items
    if not isinstance(value, dict):
        return value
    plain = {key: _ordered(item) for key, item in value.items() if key != "checksum/config"}
    plain |= {key: tomllib.loads(item) for key, item in value.items() if key.endswith(".toml")}
    return {key: item for key, item in plain.items() if item != {} or key != "annotations"}


def described(fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """What the schema has to say of settings that are the operator's to choose."""
    return {
        name: {**_kind(name, field.annotation), "description": field.description}
        for name, field in fields.items()
        if name not in IN_THE_TEMPLATES and field.description
    }


def _kind(name: str, annotation: Any) -> dict[str, Any]:
    one = next((part for part in get_args(annotation) if part is not type(None)), str) if _is_union(annotation) else annotation
    if name in settings.SIZES:
        return {"type": ["string", "integer"]}
    if one in (TuningSettings, QueueSettings):
        return {"type": "object", "additionalProperties": False, "properties": described(one.model_fields)}
    if get_origin(one) is Literal:
        return {"enum": list(get_args(one))}
    if get_origin(one) is tuple:
        return {"type": "array", "items": _table(get_args(one)[0])}
    return {"type": {bool: "boolean", int: "integer", float: "number"}.get(one, "string")}


def _table(item: Any) -> dict[str, Any]:
    """An element of a list: a text, or a table of the file."""
    if item is str:
        return {"type": "string"}
    required = [name for name, field in item.model_fields.items() if field.is_required()]
    return {"type": "object", "additionalProperties": False, "properties": described(item.model_fields), "required": required}


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def copy_of_chart(work: Path) -> Path:
    """One to be broken."""
    return Path(shutil.copytree(CHART, work / "chart"))
