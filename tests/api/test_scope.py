"""Who may do what, by socket, credentials and token; through real connections."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nvcache.api.scope import METRICS_PATHS, Caller, Gate, Peer, Scope, same_holder
from nvcache.core.ref import parse_ref
from nvcache.engine.status import LeaseStatus
from nvcache.settings import Settings, load
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
    ("POST", "/v1/evict", {"need_bytes": 1}),
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
        ADMIN_ONLY,
        (f"remove {ENTRY}", f"pin {ENTRY}", f"unpin {ENTRY}", f"verify {ENTRY}", "list the leases", "cancel job 1", "evict models"),
        strict=True,
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


def test_a_pod_s_next_process_adopts_its_lease(guarded: Daemon, model: str) -> None:
    """By user and words: the process is another one. What the admin socket took under the same words is another user's."""
    entry = guarded.ready(model)["entry"]
    slug = entry.partition("@")[0]
    words = {"holder": "default/vllm-0", "adopt": True}
    others = guarded.admin("POST", f"/v1/models/{entry}/leases", {"holder": "uid=4242/pid=1/default/vllm-0"}).json
    before = {"holder": f"uid={os.geteuid()}/pid=99999999/default/vllm-0", "ttl_s": 5}
    first = guarded.admin("POST", f"/v1/models/{entry}/leases", before).json
    last = first["lease"]
    for name in (entry, slug):
        adopted = guarded.ask("POST", f"/v1/models/{name}/leases", {**words, "ttl_s": 600})
        assert (adopted.status, adopted.json["entry"]) == (201, entry)
        assert adopted.json["holder"] == f"uid={os.geteuid()}/pid={os.getpid()}/default/vllm-0"
        assert datetime.fromisoformat(adopted.json["expires"]) > datetime.fromisoformat(first["expires"])
        for method in ("PUT", "DELETE"):  # a process that ends late lets go of nothing that is another's by now
            assert guarded.ask(method, f"/v1/models/{entry}/leases/{last}", {} if method == "PUT" else None).code == "unknown-lease"
        last = adopted.json["lease"]
        assert {row["lease"] for row in guarded.admin("GET", "/v1/leases").json["leases"]} == {last, others["lease"]}
    for wish in ({**words, "holder": "default/vllm-1"}, {"holder": "default/vllm-0"}):
        assert guarded.ask("POST", f"/v1/models/{entry}/leases", wish).json["lease"] not in (last, others["lease"])


def test_a_slug_alone_is_adopted_and_not_taken(guarded: Daemon, model: str) -> None:
    """Which revision the pod was given cannot be told from it: the last one resolved may be another pod's."""
    entry = guarded.ready(model)["entry"]
    slug = entry.partition("@")[0]
    assert guarded.ask("POST", f"/v1/models/{slug}/leases", {"holder": "default/vllm-0", "adopt": True}).code == "unknown-lease"
    assert guarded.ask("POST", f"/v1/models/{slug}/leases", {"holder": "default/vllm-0"}).json["entry"] == entry


def test_what_ran_out_is_not_adopted(guarded: Daemon, model: str) -> None:
    entry = guarded.ready(model)["entry"]
    wish = {"holder": "default/vllm-0", "adopt": True, "ttl_s": 1}
    first = guarded.ask("POST", f"/v1/models/{entry}/leases", wish).json
    while datetime.now(UTC) < datetime.fromisoformat(first["expires"]):
        threading.Event().wait(0.05)
    assert guarded.ask("POST", f"/v1/models/{entry}/leases", wish).json["lease"] != first["lease"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("uid=1/pid=2/a", "uid=1/pid=3/a", True),
        ("uid=1/pid=2/a", "uid=1/a", True),
        ("tcp/a", "tcp/a", True),
        ("a", "a", True),
        ("uid=1/pid=2/a", "uid=11/pid=2/a", False),
        ("uid=1/pid=2/a", "uid=1/pid=2/b", False),
        ("uid=1/pid=2/a", "a", False),
        ("uid=1/pid=2/pid=3/a", "uid=1/pid=2/a", False),
    ],
)
def test_holders_are_the_same_by_user_and_words(one: str, other: str, same: bool) -> None:
    assert same_holder(one, other) is same


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
        ("az://acct/models/*", "az://acct/models/a/b", True),
        ("az://acct/models/*", "https://acct.blob.core.windows.net/models/a@2026-01-31T12:00:00Z", True),
        ("az://acct/models/*", "az://acct/models", False),
        ("az://*/models/*", "az://acct/models/x", True),
        ("az://*/models/*", "az://acct/secrets/models/x", False),
        ("az://acct/models/llama*", "az://acct/models/llama-3", True),
        ("az://acct/models/llama*", "az://acct/models/llama-3/secret", False),
        ("https://*.blob.core.usgovcloudapi.net/models/*", "https://a.blob.core.usgovcloudapi.net/models/x", True),
        ("https://*.blob.core.usgovcloudapi.net/models/*", "https://evil.example/cont/x.blob.core.usgovcloudapi.net/models/y", False),
        ("hf://*", "az://acct/models/x", False),
    ],
)
def test_allow_patterns(pattern: str, ref: str, may: bool, place: Path) -> None:
    gate = Gate(load(environ={"HOME": str(place)}), os.geteuid(), lambda: (pattern,))
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


@pytest.fixture
def metered(settings_of: Callable[..., Settings], place: Path) -> Iterator[Daemon]:
    """A daemon whose TCP port is for probes and scrapers, without a token."""
    settings = settings_of(listen="127.0.0.1:0", listen_scope="metrics", allow=(f"file://{place}/origin/*",))
    with Daemon(settings) as running:
        yield running


def test_in_scope_metrics_tcp_answers_probes_and_scrapes_without_a_token_and_names_no_model(metered: Daemon, model: str) -> None:
    entry = metered.ready(model)["entry"]
    assert entry in metered.ask("GET", "/v1/models").data.decode(), "the test must know what a name looks like"
    for path in METRICS_PATHS:
        for headers in ({}, {"Authorization": "Bearer whatever"}):
            answer = metered.tcp("GET", path, headers=headers)
            assert answer.status == 200, path
            assert "tiny" not in answer.data.decode(), path
    assert "nvcache_models" in metered.tcp("GET", "/metrics").data.decode()


def test_in_scope_metrics_tcp_answers_nothing_else(metered: Daemon, model: str) -> None:
    metered.ready(model)
    paths = [path for path in [*LOOK_UPS, *OPEN] if path not in METRICS_PATHS]
    others = [("GET", path, None) for path in [*paths, "/v1/models?ref=a/b", "/v1", "/nothing", "/metrics/", "//metrics", "/v1/models/../../metrics"]]
    others += [("POST", "/v1/models", {"dry_run": "malformed"}), *ADMIN_ONLY, *POD_MORE]
    for method, path, body in others:
        answer = metered.tcp(method, path, body, {"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status, answer.code) == (403, "not-allowed"), (method, path)
        assert "/healthz, /metrics, /readyz, /version and nothing else" in answer.json["detail"]
        assert "listen_scope" in answer.json["hint"]
    assert metered.tcp("POST", "/metrics").status == 405
    for path in LOOK_UPS:
        assert metered.ask("GET", path).status == 200, "the sockets have the scopes they had"
