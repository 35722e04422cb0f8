"""docs/kubernetes.md against what is there: its commands, files, settings and manifests. It talks to no cluster."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from nvcache import __version__, settings
from nvcache.__main__ import cli
from tests.kube import commands, schemas
from tests.kube.policies import DAEMON_POLICIES, spec_of, workloads
from tests.support import kubetools
from tests.support.kubetools import ROOT

PAGE = (ROOT / "docs/kubernetes.md").read_text()
DEPLOY = ROOT / "deploy/daemonset"
SHELL = [line.strip() for block in re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


def block(named: str) -> str:
    """The one fenced block with these words after its language, without the indentation of a list."""
    [(indent, text)] = re.findall(rf"^( *)```\w+ {re.escape(named)}\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    return re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def nvcache_lines() -> list[str]:
    """Every command of nvcache that the page names: in blocks after `--` of kubectl exec, and in the text."""
    blocks = [line.partition(" -- ")[2].partition("#")[0].strip() for line in SHELL if " -- nvcache" in line]
    return blocks + re.findall(r"`(nvcache (?!-)[^`]+)`", PAGE)


def find(words: list[str]) -> click.Command:
    """The command that a line names. Raises AssertionError."""
    command: click.Command = cli
    for word in words:
        if not isinstance(command, click.Group):
            break
        found = command.get_command(click.Context(command), word)
        assert found is not None, f"there is no command {word}"
        command = found
    return command


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The reader's own kustomization, with its way to the manifests."""
    home = tmp_path / "site"
    home.mkdir()
    deploy = Path(*[".."] * (len(home.parts) - 1), *ROOT.parts[1:], "deploy")  # kustomize takes no absolute path
    (home / "kustomization.yaml").write_text(block("kustomize=site").replace("../deploy", str(deploy)))
    (home / "nvcache.toml").write_text(block("site=nvcache.toml"))
    return home


@pytest.mark.parametrize("line", nvcache_lines())
def test_the_commands_are_there(line: str) -> None:
    assert isinstance(find(shlex.split(line)[1:]), click.Command)


def test_the_page_names_commands() -> None:
    assert {"nvcache ls", "nvcache disks", "nvcache affinity REF"} <= set(nvcache_lines())


def test_directories_of_commands_can_be_applied() -> None:
    named = [path for line in SHELL for path in re.findall(r"(?:kustomize|-k) (deploy/\S+)", line)]
    assert len(named) >= 3
    for path in named:
        assert kubetools.kustomize(ROOT / path) != []


def test_files_are_there() -> None:
    named = set(re.findall(r"\bdeploy/[\w./-]+\w", PAGE))
    assert {"deploy/Containerfile", "deploy/daemonset/teardown"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_kubectl_is_asked_for_what_is_deployed() -> None:
    made = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in kubetools.kustomize(DEPLOY / "overlays/azure-md")}
    named = {name.replace(" ", "/") for line in SHELL for name in re.findall(r"(?<= )daemonset[/ ][\w-]+", line)}
    assert named
    assert named <= made


def test_the_registry_is_put_into_every_image() -> None:
    [line] = [line for line in SHELL if "overlays/azure-md | sed" in line]
    _, old, new, _ = shlex.split(line.partition("| sed ")[2])[0].split("|")
    text = yaml.safe_dump_all(kubetools.kustomize(DEPLOY / "overlays/azure-md")).replace(old, new)
    images = {one["image"] for _, spec in workloads(kubetools.objects(text)) for one in [*spec.get("initContainers", []), *spec["containers"]]}
    assert images == {f"registry.example.com/nvcache:{__version__}"}
    assert f"-t registry.example.com/nvcache:{__version__} " in PAGE


def test_a_site_of_ones_own(site: Path) -> None:
    found = kubetools.kustomize(site)
    assert {one["image"] for _, spec in workloads(found) for one in spec["containers"]} == {f"registry.example.com/nvcache:{__version__}"}
    assert "PodMonitor/nvcache" in kubetools.names(found)
    [config] = [item for item in found if item["kind"] == "ConfigMap" and "nvcache.toml" in item["data"]]
    assert config["data"] == {"nvcache.toml": block("site=nvcache.toml")}
    spec = dict(workloads(found))["nvcache"]
    volumes = [volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume]
    assert volumes == [config["metadata"]["name"]]


def test_its_settings_are_settings(site: Path) -> None:
    chosen = settings.load(config=site / "nvcache.toml", flags={}, environ={}, uid=65532)
    assert [model.ref for model in chosen.models] == ["hf://meta-llama/Llama-3.3-70B-Instruct"]
    assert chosen.max_bytes == 10**15


def test_other_nodes(site: Path) -> None:
    with (site / "kustomization.yaml").open("a") as file:
        file.write(block("patch=nodes"))
    for _, spec in workloads(kubetools.kustomize(site)):
        [term] = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term["matchExpressions"][0]["values"] == ["mi300x"]
        assert {"key": "team", "operator": "Exists"} in spec["tolerations"]


def test_another_way_out(site: Path) -> None:
    with (site / "kustomization.yaml").open("a") as file:
        file.write(block("patch=out"))
    spec = dict(workloads(kubetools.kustomize(site)))["nvcache"]
    [one] = spec["containers"]
    given = {item["name"]: item.get("value") for item in one["env"]}
    assert given["HTTPS_PROXY"] == "http://proxy.example.com:3128"
    assert "NVCACHE_URL" in given, "the others are left"
    assert spec["imagePullSecrets"] == [{"name": "my-registry"}]


@pytest.mark.parametrize("overlay", ["azure-md", "directory"])
def test_nodes_that_share_are_set_alike_by_both_ways(site: Path, tmp_path: Path, overlay: str) -> None:
    text = (site / "kustomization.yaml").read_text().replace("overlays/azure-md", f"overlays/{overlay}")
    monitor = re.search(r"^  - (.*/components/)podmonitor .*$", text, re.MULTILINE)
    assert monitor is not None
    (site / "kustomization.yaml").write_text(text.replace(monitor[0], f"{monitor[0]}\n  - {monitor[1]}neighbours"))
    (site / "nvcache.toml").write_text(block("site=neighbours"))
    values = tmp_path / "values.yaml"
    values.write_text(block("values=neighbours"))
    chosen = f"backend={'directory' if overlay == 'directory' else 'md'},podMonitor.enabled=true"
    both = kubetools.kustomize(site), kubetools.template(ROOT / "deploy/chart", "--values", str(values), "--set", chosen)
    ours, theirs = (commands.settings_of(found, "nvcache", "nvcache", tmp_path) for found in both)
    names = ("listen", "listen_scope", "listen_token_file", "share_blobs", "mirrors", "backend", "socket", "follow")
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert ours.share_blobs
    for kind in ("Service", "PodMonitor"):
        [one], [other] = ([item["spec"] for item in found if item["kind"] == kind] for found in both)
        assert one == other
    assert [wrong for item in both[0] if (wrong := schemas.complaint(item, schemas.versions()[-1]))] == []
    assert [told for policy in DAEMON_POLICIES for told in policy(both[0])] == []


def test_another_directory(site: Path) -> None:
    chosen = (site / "kustomization.yaml").read_text().replace("overlays/azure-md", "overlays/directory")
    (site / "kustomization.yaml").write_text(chosen + block("patch=directory"))
    spec = dict(workloads(kubetools.kustomize(site)))["nvcache"]
    assert [volume["hostPath"] for volume in spec["volumes"] if volume["name"] == "stripe"] == [
        {"path": "/mnt/aks/nvcache", "type": "DirectoryOrCreate"}
    ]


def test_a_claim_leads_to_the_store() -> None:
    volume, claim = kubetools.objects(block("consumer=claim"))
    assert volume["spec"]["claimRef"] == {key: claim["metadata"][key] for key in ("namespace", "name")}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["hostPath"]["path"] == "/var/lib/nvcache/mnt/store/models"


def test_teardown_is_the_disks_pod_with_another_command() -> None:
    def disks(path: Path) -> tuple[Any, dict[str, Any]]:
        [found] = [item for item in kubetools.kustomize(path) if item["kind"] == "DaemonSet" and item["metadata"]["name"] == "nvcache-disks"]
        [config] = [volume for volume in spec_of(found)["volumes"] if volume["name"] == "config"]
        config["configMap"] = {}  # its name has a hash of the settings, which may differ
        [one] = spec_of(found)["containers"]
        return found, {field: one.pop(field) for field in ("command", "args", "readinessProbe")}

    (usual, watching), (last, ending) = disks(DEPLOY / "overlays/azure-lvm"), disks(DEPLOY / "teardown")
    assert last["spec"].pop("updateStrategy") != usual["spec"].pop("updateStrategy")
    assert last == usual, "LVM's volumes as well: it does not know what there is"
    assert ending.keys() == watching.keys()
    script = ending["args"][0]
    assert "nvcache disks teardown --config=/etc/nvcache/disks.toml" in script
    assert find(["disks", "teardown"]).name == "teardown"
