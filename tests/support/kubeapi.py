"""The part of the Kubernetes API that nvcache speaks: nodes, their status, events; over TLS, with tokens, rights, faults. kubectl can read it too.

It keeps what it is given in memory and holds to the API's rules where a client could break them: resourceVersion, merge and strategic patches, the
status subresource, names of labels, namespaces of events. It is no API server otherwise: no watch, no defaults, no other kinds.

Sources: Kubernetes API conventions (resourceVersion, Status, patches), RFC 7386, and the validation of labels and events in kube-apiserver.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.serving import LoopbackServer
from tests.support.tls import Tls

Json = dict[str, Any]
RIGHTS = frozenset({("get", "nodes"), ("patch", "nodes"), ("patch", "nodes/status"), ("create", "events")})
READING = frozenset({("list", "nodes"), ("get", "nodes"), ("list", "events"), ("list", "pods"), ("get", "leases")})  # of a person with kubectl
MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 415: "UnsupportedMediaType", 422: "Invalid"}
LABEL_NAME = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
DISCOVERY: Json = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {"name": "nodes", "singularName": "node", "namespaced": False, "kind": "Node", "shortNames": ["no"], "verbs": ["get", "list", "patch"]},
            {"name": "events", "singularName": "event", "namespaced": True, "kind": "Event", "shortNames": ["ev"], "verbs": ["create", "list"]},
        ],
    },
    "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
}


class RefusedError(Exception):
    """What is answered instead of an object."""

    def __init__(self, status: int, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason or REASONS.get(status, "InternalError")


@dataclass(frozen=True)
class Fault:
    """Answers the next `times` requests whose verb and resource match (`*`: any) with `status`, or, with None, with nothing until released."""

    status: int | None
    verb: str = "*"
    resource: str = "*"
    times: int = 1
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None  # instead of a Status

    def matches(self, verb: str, resource: str) -> bool:
        """Whether the request is meant."""
        return self.verb in ("*", verb) and self.resource in ("*", resource)


@dataclass
class Request:
    """One request as it was answered."""

    verb: str
    resource: str
    status: int | None
    content_type: str
    body: Any
    token: str


@dataclass
class KubeApi:
    """A cluster. A context manager: it answers on loopback inside, at the same port each time."""

    tls: Tls
    tokens: set[str] = field(default_factory=lambda: {"first"})
    rights: set[tuple[str, str]] = field(default_factory=lambda: set(RIGHTS))
    nodes: dict[str, Json] = field(default_factory=dict)
    events: dict[str, Json] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    meddle: Callable[[str, Any], None] | None = None  # called with resource and body before a write is judged: somebody else's turn
    port: int = 0

    def __post_init__(self) -> None:
        self._versions = itertools.count(100)
        self._changed = threading.Condition(threading.RLock())
        self._released = threading.Event()
        self._server: LoopbackServer | None = None

    def __enter__(self) -> KubeApi:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Answer."""
        api = self

        class Handler(_Handler):
            cluster = api

        self._released.clear()
        self._server = LoopbackServer(("127.0.0.1", self.port), Handler, self.tls)
        self._server.start("kubeapi")
        self.port = self._server.server_port

    def stop(self) -> None:
        """Refuse connections, and end those there are."""
        if self._server is not None:
            self._released.set()
            self._server.stop()
            self._server = None

    # -- for tests

    def add_node(self, name: str, *, labels: Json | None = None, annotations: Json | None = None, taints: list[Json] | None = None) -> None:
        """A node as a kubelet registers it, with a condition and labels that are not ours."""
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status"}
        metadata = {"name": name, "uid": f"uid-of-{name}", "labels": {"kubernetes.io/hostname": name, **(labels or {})}}
        metadata["annotations"] = {"volumes.kubernetes.io/controller-managed-attach-detach": "true", **(annotations or {})}
        spec = {"providerID": f"azure:///{name}", **({"taints": taints} if taints else {})}
        status = {"conditions": [ready], "capacity": {"cpu": "8"}, "allocatable": {"cpu": "8"}, "nodeInfo": {"kubeletVersion": "v1.34.0"}}
        self.nodes[name] = self._versioned({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec, "status": status})

    def kubeconfig(self, file: Path, token: Path, ca: Path | None = None) -> Path:
        """Write a KUBECONFIG that trusts us and reads its token from a file, as a pod does."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [
                {"name": "test", "cluster": {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(ca or self.tls.cert)}}
            ],
            "users": [{"name": "test", "user": {"tokenFile": str(token)}}],
        }
        file.write_text(json.dumps(config))
        return file

    def wait(self, until: Callable[[], Any], seconds: float = 20.0) -> Any:
        """Return what `until` gives once it is true; it is asked after every request. Raises AssertionError when that does not come."""
        with self._changed:
            found = self._changed.wait_for(until, seconds)
        seen = [(request.verb, request.resource, request.status) for request in self.requests[-20:]]
        assert found, f"it did not happen; the last requests: {seen}"
        return found

    def count(self, verb: str = "*", resource: str = "*") -> int:
        """How many requests of that kind were answered."""
        return sum(Fault(0, verb, resource).matches(request.verb, request.resource) for request in self.requests)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Change nodes as somebody else: each gets a new resourceVersion."""
        with self._changed:
            before = copy.deepcopy(self.nodes)
            yield
            for name, node in self.nodes.items():
                if node != before.get(name):
                    self._versioned(node)

    # -- answering

    def answer(self, verb: str, resource: str, parts: list[str], query: Json, content_type: str, body: Any) -> Json:
        """The object, or raises `RefusedError`."""
        match verb, resource:
            case "list", "nodes":
                return {"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": list(self.nodes.values())}
            case "list", "events":
                return {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": list(self._selected(query.get("fieldSelector", "")))}
            case "list", "pods":
                return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": []}
            case "get", "nodes":
                return self._node(parts[0])
            case "patch", "nodes" | "nodes/status":
                return self._patch(resource, parts[0], content_type, body)
            case "create", "events":
                return self._event(parts[0], body)
        raise RefusedError(404, "the server could not find the requested resource")

    def _node(self, name: str) -> Json:
        if name not in self.nodes:
            raise RefusedError(404, f'nodes "{name}" not found')
        return self.nodes[name]

    def _patch(self, resource: str, name: str, content_type: str, body: Json) -> Json:
        old = self._node(name)
        asked = body.get("metadata", {}).get("resourceVersion")
        if asked is not None and asked != old["metadata"]["resourceVersion"]:
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise RefusedError(409, f'Operation cannot be fulfilled on nodes "{name}": {why}')
        if content_type not in (MERGE, STRATEGIC):
            raise RefusedError(415, f"the body of the request was in an unknown format: {content_type}")
        new = merged(old, body, strategic=content_type == STRATEGIC)
        kept = ("spec",) if resource == "nodes/status" else ("status",)
        new |= {part: old[part] for part in kept}
        _check_metadata(new["metadata"])
        self.nodes[name] = self._versioned(new) if new != old else old
        return self.nodes[name]

    def _event(self, namespace: str, body: Json) -> Json:
        name, about = body["metadata"]["name"], body["involvedObject"]
        if len(name) > 253 or not SUBDOMAIN.fullmatch(name):
            raise RefusedError(422, f"Event {name!r} is invalid: metadata.name")
        if (about.get("namespace") or "default") != namespace or body["metadata"].get("namespace", namespace) != namespace:
            raise RefusedError(422, f'Event "{name}" is invalid: involvedObject.namespace: Invalid value: does not match event.namespace')
        if name in self.events:
            raise RefusedError(409, f'events "{name}" already exists', "AlreadyExists")
        self.events[name] = self._versioned({**body, "apiVersion": "v1", "kind": "Event"})
        return self.events[name]

    def _selected(self, selector: str) -> Iterator[Json]:
        """Events by `involvedObject.…=…` and the like."""
        wanted = [term.split("=", 1) for term in selector.split(",") if term]
        for event in self.events.values():
            flat = {f"involvedObject.{name}": value for name, value in event["involvedObject"].items()}
            if all(flat.get(name, "") == value for name, value in wanted):
                yield event

    def _versioned(self, item: Json) -> Json:
        item["metadata"]["resourceVersion"] = str(next(self._versions))
        return item

    def judged(self, verb: str, resource: str, token: str) -> Fault | None:
        """Who asks, and may they? Raises `RefusedError`; returns the fault to act out, if one is due."""
        for at, fault in enumerate(self.faults):
            if fault.matches(verb, resource):
                left = [Fault(fault.status, fault.verb, fault.resource, fault.times - 1, fault.headers, fault.body)] if fault.times > 1 else []
                self.faults[at : at + 1] = left
                return fault
        if token not in self.tokens:
            raise RefusedError(401, "Unauthorized")
        if resource and (verb, resource) not in self.rights:
            raise RefusedError(403, f'{resource} is forbidden: User "test" cannot {verb} resource "{resource}" in API group ""')
        return None


def merged(old: Any, patch: Any, *, strategic: bool) -> Any:
    """RFC 7386; strategic: besides, a Node's conditions and addresses are merged by their type (`patchMergeKey` in core/v1)."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    new = copy.deepcopy(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        elif strategic and name in ("conditions", "addresses"):
            there = {each["type"]: each for each in new.get(name, [])}
            new[name] = list((there | {each["type"]: merged(there.get(each["type"]), each, strategic=True) for each in value}).values())
        else:
            new[name] = merged(new.get(name), value, strategic=strategic)
    return new


def _check_metadata(metadata: Json) -> None:
    for key, value in metadata.get("labels", {}).items():
        if not LABEL_NAME.fullmatch(key) or not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
            raise RefusedError(422, f"metadata.labels: Invalid value: {key}={value!r}")
    notes = metadata.get("annotations", {})
    if sum(len(key) + len(value.encode()) for key, value in notes.items()) > 256 * 1024 or not all(LABEL_NAME.fullmatch(key) for key in notes):
        raise RefusedError(422, "metadata.annotations: Invalid value")


class _Handler(BaseHTTPRequestHandler):
    cluster: KubeApi
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Quiet."""

    def do_GET(self) -> None:
        self._handle("GET")

    def do_PATCH(self) -> None:
        self._handle("PATCH")

    def do_POST(self) -> None:
        self._handle("POST")

    def _handle(self, method: str) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        content_type = self.headers.get("Content-Type", "")
        kind, resource, parts = _routed(url.path)
        verb = {"PATCH": "patch", "POST": "create"}.get(method, kind)
        status, answer, headers = self._answered(verb, resource, parts, query, content_type, body, token, url.path)
        with self.cluster._changed:
            if resource:
                self.cluster.requests.append(Request(verb, resource, status, content_type, body, token))
            self.cluster._changed.notify_all()
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(answer))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def _answered(
        self, verb: str, resource: str, parts: list[str], query: Json, content_type: str, body: Any, token: str, path: str
    ) -> tuple[int | None, bytes, tuple[tuple[str, str], ...]]:
        cluster = self.cluster
        try:
            with cluster._changed:
                if cluster.meddle is not None and verb in ("patch", "create"):
                    cluster.meddle(resource, body)
                fault = cluster.judged(verb, resource, token)
                if fault is None and path in DISCOVERY:
                    return 200, json.dumps(DISCOVERY[path]).encode(), ()
                if fault is None:
                    found = cluster.answer(verb, resource, parts, query, content_type, body)
                    return 201 if verb == "create" else 200, json.dumps(found).encode(), ()
            if fault.status is None:
                cluster._released.wait(30)
                return None, b"", ()
            return fault.status, fault.body or _status(RefusedError(fault.status, "as the test wants it")), fault.headers
        except RefusedError as refused:
            return refused.status, _status(refused), ()


def _status(refused: RefusedError) -> bytes:
    said = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return json.dumps({**said, "message": str(refused), "reason": refused.reason, "code": refused.status}).encode()


def _routed(path: str) -> tuple[str, str, list[str]]:
    """What a GET of it is, list or get; the resource ("" for what is none); the names in the path."""
    match path.strip("/").split("/"):
        case ["api", "v1", "nodes"]:
            return "list", "nodes", []
        case ["api", "v1", "nodes", name]:
            return "get", "nodes", [name]
        case ["api", "v1", "nodes", name, "status"]:
            return "get", "nodes/status", [name]
        case ["api", "v1", ("events" | "pods") as resource]:
            return "list", resource, []
        case ["api", "v1", "namespaces", namespace, "events"]:
            return "list", "events", [namespace]
        case ["apis", "coordination.k8s.io", "v1", "namespaces", _, "leases", name]:
            return "get", "leases", [name]
    return "get", "", []
