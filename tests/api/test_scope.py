"""Who may do what, by socket, credentials and token; through real connections."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nvcache.api.scope import Caller, Gate, Peer, Scope
from nvcache.core.ref import parse_ref
from nvcache.engine.status import LeaseStatus
from nvcache.settings import load
from tests.api.conftest import TOKEN, make_model
from tests.api.harness import Daemon

ENTRY = "hf--a--b@" + "1" * 40
ADMIN_ONLY = [
    ("DELETE", f"/v1/models/{ENTRY}", None),
    ("PUT", f"/v1/models/{ENTRY}/pin", None),
    ("DELETE", f"/v1/models/{ENTRY}/pin", None),
    ("POST", f"/v1/models/{ENTRY}/verify", None),
    ("GET", "/v1/leases", None),
    ("DELETE", "/v1/jobs/1", None),
]
POD_MORE = [
    ("POST", "/v1/models", {"ref": "a/b"}),
    ("POST", f"/v1/models/{ENTRY}/leases", {"holder": "x"}),
    ("PUT", f"/v1/models/{ENTRY}/leases/1", {}),
    ("DELETE", f"/v1/models/{ENTRY}/leases/1", None),
]
LOOK_UPS = ["/v1/models", "/v1/jobs", "/v1/space", "/v1/stripe", "/v1/sources", "/metrics"]
OPEN = ["/healthz", "/version", "/openapi.json"]


def test_the_kernel_names_the_peer() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        peer = Peer.of(ours)
    assert (peer.pid, peer.uid, peer.path) == (os.getpid(), os.geteuid(), "")


def test_pods_look_up_but_do_not_administrate(guarded: Daemon) -> None:
    for path in LOOK_UPS:
        assert guarded.ask("GET", path).status == 200, path
    for method, path, body in ADMIN_ONLY:
        answer = guarded.ask(method, path, body)
        assert (answer.status, answer.code) == (403, "not-allowed"), path


def test_a_refusal_says_what_of_whom_and_where_to_go(guarded: Daemon, model: str) -> None:
    for (method, path, body), doing in zip(
        ADMIN_ONLY, (f"remove {ENTRY}", f"pin {ENTRY}", f"unpin {ENTRY}", f"verify {ENTRY}", "list the leases", "cancel job 1"), strict=True
    ):
        document = guarded.ask(method, path, body).json
        assert document["detail"] == f"cannot {doing}: this socket may only ask, warm and lease"
        assert document["hint"] == "run as the daemon's user, or name the admin socket with --socket"
    document = guarded.tcp("POST", "/v1/models", {"ref": model}, {"Authorization": f"Bearer {TOKEN}"}).json
    assert document["detail"] == f"cannot make {model} ready: this token may only look"
    assert "listen_scope" in document["hint"]
    document = guarded.ask("POST", "/v1/models", {"ref": "a/b"}).json
    assert "`allow` pattern" in document["hint"]
    assert "NVCACHE_TOKEN_FILE" in guarded.tcp("GET", "/v1/models").json["hint"]


def test_the_admin_socket_may_do_everything(guarded: Daemon) -> None:
    assert guarded.admin("GET", "/v1/leases").status == 200
    for method, path, body in ADMIN_ONLY:
        assert guarded.admin(method, path, body).status in (200, 404), path


def test_without_an_admin_socket_the_daemon_s_own_user_is_admin(daemon: Daemon) -> None:
    assert daemon.ask("GET", "/v1/leases").status == 200


def test_pods_warm_only_what_allow_names(guarded: Daemon, model: str, place: Path) -> None:
    elsewhere = f"file://{make_model(place / 'secret' / 'model')}"
    assert guarded.ask("POST", "/v1/models", {"ref": elsewhere}).code == "not-allowed"
    assert guarded.ask("POST", "/v1/models", {"ref": "a/b"}).code == "not-allowed"
    assert guarded.ask("POST", "/v1/models", {"ref": f"file://{place}/origin/../secret/model"}).code == "bad-reference"
    for field in ({"pin": True}, {"alias": "org/name"}):
        assert guarded.ask("POST", "/v1/models", {"ref": model, **field}).code == "not-allowed"
    assert guarded.ready(model)["state"] == "ready"


def test_a_pod_s_lease_carries_its_credentials(guarded: Daemon, model: str) -> None:
    entry = guarded.ready(model)["entry"]
    lease = guarded.ask("POST", f"/v1/models/{entry}/leases", {"holder": "vllm-0"})
    assert lease.status == 201
    assert lease.json["holder"] == f"uid={os.geteuid()}/pid={os.getpid()}/vllm-0"
    place = f"/v1/models/{entry}/leases/{lease.json['lease']}"
    assert guarded.ask("PUT", place, {"ttl_s": 30}).status == 200
    assert guarded.admin("GET", "/v1/leases").json["leases"][0]["holder"] == lease.json["holder"]
    assert guarded.ask("DELETE", place).status == 204
    assert guarded.ask("DELETE", place).code == "unknown-lease"


def test_a_pod_cannot_touch_another_s_lease(guarded: Daemon, model: str) -> None:
    entry = guarded.ready(model)["entry"]
    lease = guarded.admin("POST", f"/v1/models/{entry}/leases", {"holder": "uid=4242/pid=1/other"}).json["lease"]
    for method, body in (("PUT", {}), ("DELETE", None)):
        assert guarded.ask(method, f"/v1/models/{entry}/leases/{lease}", body).code == "not-allowed"
    assert guarded.admin("DELETE", f"/v1/models/{entry}/leases/{lease}").status == 204


def test_owning_is_by_user_and_not_by_a_prefix_of_one() -> None:
    lease = LeaseStatus("1", ENTRY, Caller(Scope.POD, "uid=10/", 7).holder("a"), "/", None, datetime.now(UTC))
    assert Caller(Scope.POD, "uid=10/", 8).owns(lease)
    assert not Caller(Scope.POD, "uid=1/", 7).owns(lease)
    assert not Caller(Scope.POD, "tcp/").owns(lease)
    assert Caller(Scope.ADMIN, "uid=0/").owns(lease)


def test_a_pod_cannot_pretend_to_be_another_holder() -> None:
    assert Caller(Scope.POD, "uid=10/", 7).holder("uid=11/x") == "uid=10/pid=7/uid=11/x"
    assert Caller(Scope.POD, "tcp/").holder("x") == "tcp/x"
    assert Caller(Scope.ADMIN, "uid=0/", 3).holder("me") == "me"


@pytest.mark.parametrize(
    ("pattern", "ref", "may"),
    [
        ("hf://*", "a/b@main", True),
        ("hf://org/*", "org/name", True),
        ("hf://org/*", "other/name", False),
        ("hf://org/name", "org/name@v1", True),
        ("hf://org/name@v1", "org/name@v2", False),
        ("hf://org/name@v1", "org/name", False),
        ("HF://org/*", "org/name", False),
        ("hf://*", "file:///etc/x", False),
    ],
)
def test_allow_patterns(pattern: str, ref: str, may: bool, place: Path) -> None:
    gate = Gate(load(flags={"allow": (pattern,)}, environ={"HOME": str(place)}), os.geteuid())
    assert gate.may_warm(Caller(Scope.POD, "uid=1/"), parse_ref(ref)) is may
    assert gate.may_warm(Caller(Scope.ADMIN, "uid=1/"), parse_ref(ref))


def test_tcp_needs_the_token(guarded: Daemon) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer \xe9"},
    ):
        for path in LOOK_UPS:
            answer = guarded.tcp("GET", path, headers=headers)
            assert (answer.status, answer.code) == (401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
    for path in OPEN:
        assert guarded.tcp("GET", path).status == 200


def test_the_token_has_the_configured_scope_and_is_read_anew(guarded: Daemon, place: Path) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for path in LOOK_UPS:
        assert guarded.tcp("GET", path, headers=bearer).status == 200
    for method, path, body in [*ADMIN_ONLY, *POD_MORE]:
        assert guarded.tcp(method, path, body, bearer).code == "not-allowed"
    (place / "token").write_text("rotated")
    assert guarded.tcp("GET", "/v1/space", headers=bearer).status == 401
    assert guarded.tcp("GET", "/v1/space", headers={"Authorization": "bearer rotated"}).status == 200
    (place / "token").write_text("")
    assert guarded.tcp("GET", "/v1/space", headers={"Authorization": "Bearer "}).status == 401
    (place / "token").unlink()
    assert guarded.tcp("GET", "/v1/space", headers={"Authorization": "Bearer rotated"}).status == 401
