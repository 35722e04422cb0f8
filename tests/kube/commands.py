"""Reads containers' command lines and settings with nvcache's own parser and loader, as the container would. It runs nothing."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click

from nvcache import settings
from nvcache.__main__ import cli
from nvcache.cli.serve import set_by
from tests.kube.policies import workloads
from tests.support.kubetools import Object

FIELDS = {"spec.nodeName": "gpu-0", "metadata.namespace": "default", "metadata.name": "pod-0", "metadata.uid": "0"}


def container(found: list[Object], workload: str, name: str) -> Any:
    """One container. Raises StopIteration."""
    spec = dict(workloads(found))[workload]
    return next(one for one in [*spec.get("initContainers", []), *spec["containers"]] if one["name"] == name)


def environment(one: Any) -> dict[str, str]:
    """Its variables, those of the downward API made up."""
    return {item["name"]: item.get("value") or FIELDS[item["valueFrom"]["fieldRef"]["fieldPath"]] for item in one.get("env", [])}


def parsed(line: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """The commands' names and the last one's parameters, of the words of a command line. Raises `click.UsageError`."""
    program, *rest = line
    context = cli.make_context(program, rest)
    names, command = [program], context.command
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        assert name is not None
        context = command.make_context(name, rest, parent=context)
        names.append(name)
    return names, context.params


def settings_of(found: list[Object], workload: str, name: str, work: Path) -> settings.Settings:
    """What `nvcache` in this container would go by; `work` is an empty directory. Raises `click.UsageError`, `ConfigError`."""
    one = container(found, workload, name)
    _, given = parsed([*one["command"], *one.get("args", [])])
    config = work / "config.toml"
    config.write_text(mounted(found, workload, one, str(given.pop("config"))))
    flags = {flag: value for flag, value in set_by(given).items() if flag in settings.Settings.model_fields}  # not --json
    return settings.load(config=config, flags=flags, environ=environment(one), uid=0)


def mounted(found: list[Object], workload: str, one: Any, path: str) -> str:
    """The text of a file of a ConfigMap, as the container sees it at `path`. Raises `KeyError`, `StopIteration`."""
    file = PurePosixPath(path)
    volume = next(item["name"] for item in one["volumeMounts"] if item["mountPath"] == str(file.parent))
    name = next(item["configMap"]["name"] for item in dict(workloads(found))[workload]["volumes"] if item["name"] == volume)
    return str(next(item for item in found if item["kind"] == "ConfigMap" and item["metadata"]["name"] == name)["data"][file.name])


def lines(one: Any) -> Iterator[list[str]]:
    """The words of every command line of nvcache in a container: its own, those of its probes, and those in a script for a shell."""
    own = [*one.get("command", []), *one.get("args", [])]
    asked = [one.get(f"{kind}Probe", {}).get("exec", {}).get("command", []) for kind in ("startup", "liveness", "readiness")]
    for words in (own, *asked):
        if words[:1] == ["nvcache"]:
            yield words
        elif words[:1] == ["sh"]:
            yield from _of_script(words[-1])


def _of_script(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "nvcache" in words:
            yield list(itertools.takewhile(lambda word: word not in (";", "&&", "||", "|", "&", ">"), words[words.index("nvcache") :]))
