"""deploy/examples as they stand: what their parts must agree on, and what their shell lines make of the file of variables. They run in no pod."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvcache import __version__
from nvcache.core.ref import parse_ref
from nvcache.core.signals import READY, label_of

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
DEPLOYMENTS = sorted(path for path in EXAMPLES.glob("*.yaml") if "kind: Deployment" in path.read_text())
ENGINE = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n"


def example(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_page_names_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\S+\.yaml)\]\(\1\)", page, re.MULTILINE)) == {path.name for path in EXAMPLES.glob("*.yaml")}
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page)]
    assert [link for link in links if not (EXAMPLES / link).exists()] == []
    assert f"nvcache:{__version__}" in page


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_the_sidecar_finds_the_lease_of_the_init_container(path: Path) -> None:
    """One after the other, the same model, the same name by the downward API, the same user."""
    pod = example(path)["spec"]["template"]["spec"]
    warm, hold = pod["initContainers"]
    assert (warm["name"], hold["name"], warm.get("restartPolicy"), hold["restartPolicy"]) == ("warm", "hold", None, "Always")
    assert hold["command"] == ["nvcache", "hold", "$(MODEL)"]
    assert warm["command"][:3] == ["nvcache", "warm", "$(MODEL)"]
    assert warm["env"] == hold["env"]
    fields = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in warm["env"] if "valueFrom" in one}
    assert fields == {"POD_NAMESPACE": "metadata.namespace", "POD_NAME": "metadata.name"}
    assert (warm["image"], warm["securityContext"]) == (hold["image"], hold["securityContext"])


def test_the_workspace_waits_for_the_label_of_its_model() -> None:
    found = example(EXAMPLES / "kaito-workspace.yaml")
    name = found["inference"]["preset"]["name"]
    assert found["resource"]["labelSelector"]["matchLabels"] == {label_of(parse_ref(name)): READY}
    text = (EXAMPLES / "kaito-workspace.yaml").read_text()
    assert f"nvcache affinity --label {name}\n" in text
    assert f"/opt/kaito/models/{name.lower().replace('/', '-')} " in text


@pytest.mark.parametrize(
    ("file", "engine", "expected"),
    [
        ("vllm-directory.yaml", "vllm", ["serve", "{}", "--served-model-name", "{name}"]),
        ("vllm-opportunistic.yaml", "vllm", ["serve", "{}", "--served-model-name", "{name}"]),
        ("sglang.yaml", "python3", ["-m", "sglang.launch_server", "--model-path", "{}", "--served-model-name", "{name}"]),
    ],
)
def test_the_engine_is_given_what_warm_found(file: str, engine: str, expected: list[str], tmp_path: Path) -> None:
    container = example(EXAMPLES / file)["spec"]["template"]["spec"]["containers"][0]
    name = next(one["value"] for one in container["env"] if one["name"] == "MODEL")
    stand_in = tmp_path / engine
    stand_in.write_text(ENGINE)
    stand_in.chmod(0o755)
    variables = tmp_path / "model.env"
    script = container["args"][0].replace("/start/model.env", str(variables))
    assert script != container["args"][0]
    given = ["/store/models/x", name] if "opportunistic" in file else ["/store/models/x"]
    for model in given:
        variables.write_text("" if model == name else f"NVCACHE_MODEL={model}\n")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MODEL": name}
        done = subprocess.run([*container["command"], script], env=env, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)[1 : len(expected) + 1] == [word.format(model, name=name) for word in expected]
