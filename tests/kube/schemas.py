"""Checks objects against Kubernetes' published schemas, strictly: what a version of the API server does not know is a fault. It holds no policy.

The schemas come with kubernetes-validate. Of the two custom resources that we use it knows none; what we use of them is written down here, after
their projects' own definitions (monitoring.coreos.com/v1 PodMonitor, kaito.sh/v1beta1 Workspace).
"""

from __future__ import annotations

from typing import Any

import jsonschema
from kubernetes_validate import utils

from tests.support.kubetools import Object

SINCE = {"ValidatingAdmissionPolicy": (1, 30), "ValidatingAdmissionPolicyBinding": (1, 30)}
"""Kinds that are newer than the oldest schema."""
SIDECARS = (1, 28)
"""`restartPolicy: Always` of an init container; an API server before that drops it."""


def fields(required: list[str] | None = None, **known: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {"type": "object", "properties": known, "required": required or [], "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
METADATA = {"type": "object", "required": ["name"]}
SELECTOR = fields(
    matchLabels={"type": "object", "additionalProperties": TEXT},
    matchExpressions={"type": "array", "items": fields(["key", "operator"], key=TEXT, operator=TEXT, values={"type": "array", "items": TEXT})},
)
LABELLING = fields(action=TEXT, sourceLabels={"type": "array", "items": TEXT}, targetLabel=TEXT, regex=TEXT, replacement={"type": "string"})
ENDPOINT = fields(
    ["port"],
    port=TEXT,
    path={"const": "/metrics"},
    interval=DURATION,
    scrapeTimeout=DURATION,
    scheme={"const": "http"},
    authorization=fields(["credentials"], credentials=fields(["name", "key"], name=TEXT, key=TEXT)),
    relabelings={"type": "array", "items": LABELLING},
)
CUSTOM = {
    ("monitoring.coreos.com/v1", "PodMonitor"): fields(
        ["spec", "metadata"],
        apiVersion=TEXT,
        kind=TEXT,
        metadata=METADATA,
        spec=fields(
            ["selector", "podMetricsEndpoints"],
            selector=SELECTOR,
            jobLabel=TEXT,
            podTargetLabels={"type": "array", "items": TEXT},
            attachMetadata=fields(node={"type": "boolean"}),
            podMetricsEndpoints={"type": "array", "minItems": 1, "items": ENDPOINT},
        ),
    ),
    # a Workspace has no spec: resource and inference stand beside the metadata
    ("kaito.sh/v1beta1", "Workspace"): fields(
        ["resource", "inference", "metadata"],
        apiVersion=TEXT,
        kind=TEXT,
        metadata=METADATA,
        resource=fields(["labelSelector"], instanceType=TEXT, count={"type": "integer", "minimum": 1}, labelSelector=SELECTOR),
        inference=fields(["preset"], preset=fields(["name"], name=TEXT)),
    ),
}


def versions() -> list[str]:
    """Every version whose schemas are there, oldest first."""
    return sorted(set(utils.all_versions()), key=_number)


def complaint(item: Object, version: str) -> str | None:
    """What is wrong with an object for an API server of this version; None if nothing is."""
    custom = CUSTOM.get((item["apiVersion"], item["kind"]))
    try:
        if custom is not None:
            jsonschema.Draft202012Validator(custom).validate(item)
        elif _number(version) >= SINCE.get(item["kind"], (0, 0)):
            utils.validate(item if _number(version) >= SIDECARS else _without_sidecars(item), version, strict=True)
    except utils.ValidationError as error:
        return _told(item, version, error)
    except jsonschema.ValidationError as error:
        return _told(item, version, error)
    except utils.SchemaNotFoundError as error:
        return str(error.message)
    return None


def _told(item: Object, version: str, error: Any) -> str:
    where = ".".join(str(part) for part in error.path)
    return f"{item['kind']}/{item['metadata']['name']} {where} ({version}): {error.message}"


def _number(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _without_sidecars(item: Object) -> Object:
    spec = item.get("spec", {}).get("template", {}).get("spec")
    if not spec or not spec.get("initContainers"):
        return item
    first = [{key: value for key, value in one.items() if key != "restartPolicy"} for one in spec["initContainers"]]
    pod = {**spec, "initContainers": first}
    return {**item, "spec": {**item["spec"], "template": {**item["spec"]["template"], "spec": pod}}}
