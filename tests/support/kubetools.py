"""Runs the real kubectl and helm, to render manifests. It talks to no cluster, downloads nothing and judges nothing.

The Makefile unpacks both from a wheel on PyPI into `.kube-tools`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBECTL = ROOT / ".kube-tools/kubectl/kubectl"
HELM = ROOT / ".kube-tools/helm/helm"
HOME = ROOT / ".kube-tools/home"
LIMIT_S = 60

Object = dict[str, Any]
"""One Kubernetes object, as its YAML has it."""


class ToolError(RuntimeError):
    """The tool refused; the message is all that it said."""


def kustomize(directory: Path) -> list[Object]:
    """What `kubectl apply -k directory` would send, in its order. Raises `ToolError`."""
    return objects(run(KUBECTL, "kustomize", directory))


def template(chart: Path, *options: str, release: str = "nvcache", namespace: str = "nvcache") -> list[Object]:
    """What `helm install` would send; `options` are helm's, such as `--set` and `--values`. Raises `ToolError`."""
    return objects(run(HELM, "template", release, chart, "--namespace", namespace, *options))


def objects(text: str) -> list[Object]:
    """The objects of a YAML stream, without its empty documents."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def run(tool: Path, *arguments: str | Path) -> str:
    """Its standard output. No configuration or cache of the user's is read or written. Raises `ToolError`."""
    if not tool.exists():
        raise ToolError(f"cannot run {tool.name}: it is not in {tool.parent}; `make setup` unpacks it there")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(HOME), "KUBECONFIG": "/dev/null"}
    done = subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise ToolError(done.stdout + done.stderr)
    return done.stdout


def names(found: Iterable[Object]) -> list[str]:
    """Kind and name of each, to compare and to say which."""
    return [f"{item['kind']}/{item['metadata']['name']}" for item in found]
