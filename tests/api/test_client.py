"""The pod's client against the daemon: look up, make ready and wait, hold, follow; also across the daemon's restart."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nvcache.client import Client, Problem, load_safetensors, prefetch
from nvcache.client.leases import default_holder
from nvcache.settings import Settings
from tests.api.conftest import TOKEN
from tests.api.harness import WAIT, Daemon


def of(daemon: Daemon) -> Client:
    return Client(f"unix://{daemon.socket}")


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, bounded."""
    end = time.monotonic() + WAIT
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        pause.wait(0.02)


def test_ensure_waits_and_the_model_loads(daemon: Daemon, model: str) -> None:
    client = of(daemon)
    assert client.resolve(model) is None
    assert client.resolve(model, default=model) == model
    progress: list[Mapping[str, Any]] = []
    found = client.ensure(model, timeout=WAIT, on_progress=progress.append)
    assert found.ready
    assert found.path is not None
    assert client.resolve(model) == found.path
    assert client.model(model).document["files"] == 2
    assert prefetch(found.path).files == 2
    assert load_safetensors(found.path)["weight"].shape == (256,)
    assert all("bytes_total" in row for row in progress)


def test_ensure_without_waiting_tells_the_state(daemon: Daemon, model: str) -> None:
    begun = of(daemon).ensure(model, wait=False)
    assert not begun.ready
    assert begun.ref == model
    assert of(daemon).ensure(model, timeout=WAIT).ready
    assert of(daemon).ensure(model, wait=False).ready


def test_ensure_raises_what_the_job_failed_with(daemon: Daemon, place: Path) -> None:
    with pytest.raises(Problem) as caught:
        of(daemon).ensure(f"file://{place}/nowhere", timeout=WAIT)
    assert (caught.value.code, caught.value.status) == ("repository-not-found", 404)


def test_a_malformed_reference_is_the_caller_s_error(daemon: Daemon) -> None:
    with pytest.raises(Problem) as caught:
        of(daemon).model("a/b/c")
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("bad-reference", 422, False)


def test_a_lease_is_held_and_released(daemon: Daemon, model: str) -> None:
    client = of(daemon)
    found = client.ensure(model, timeout=WAIT)
    with client.lease(model, holder="me") as lease:
        assert lease.path == found.path
        held = client.request("GET", "/v1/leases")["leases"]
        assert [row["holder"] for row in held] == ["me"]
    assert client.request("GET", "/v1/leases") == {"leases": []}
    with pytest.raises(ValueError, match="the lease is not held"):
        prefetch(lease)


def test_a_lease_renews_itself(daemon: Daemon, model: str) -> None:
    client = of(daemon)
    client.ensure(model, timeout=WAIT)
    with client.lease(model, ttl=1.0) as lease:
        first = lease.expires
        until(lambda: lease.expires > first)
        assert client.request("GET", "/v1/leases")["leases"][0]["lease"] == lease.id


def test_a_lease_that_was_lost_is_taken_anew(daemon: Daemon, model: str) -> None:
    client = of(daemon)
    client.ensure(model, timeout=WAIT)
    with client.lease(model, ttl=1.0) as lease:
        first = lease.id
        client.request("DELETE", f"/v1/models/{lease.entry}/leases/{first}")
        until(lambda: lease.id != first)
        assert [row["lease"] for row in client.request("GET", "/v1/leases")["leases"]] == [lease.id]


def test_a_lease_of_what_is_not_there(daemon: Daemon, model: str) -> None:
    with pytest.raises(Problem) as caught:
        of(daemon).lease(model)
    assert caught.value.code == "unknown-model"


def test_a_lease_outlives_the_daemon(settings_of: Callable[..., Settings], model: str) -> None:
    with Daemon(settings_of()) as first:
        client = of(first)
        client.ensure(model, timeout=WAIT)
        lease = client.lease(model, holder="me", ttl=1.0).__enter__()
    with Daemon(settings_of()) as second:
        before = lease.expires
        until(lambda: lease.expires > before)
        assert [row["holder"] for row in of(second).request("GET", "/v1/leases")["leases"]] == ["me"]
    lease.__exit__(None, None, None)  # the daemon is gone: the lease is left to run out, nothing is raised


def test_a_lease_is_handed_over(daemon: Daemon, model: str) -> None:
    """From one holder of a pod to the next: it is left for its whole time, found again, and of the revision that the first one was given."""
    client = of(daemon)
    entry = client.ensure(model, timeout=WAIT).entry
    assert entry is not None
    with client.lease(model, holder="ns/pod", ttl=60, adopt=True) as first:
        taken = first.expires
        first.hand_over()
        assert first.expires > taken
    assert first.path == ""
    Path(model.removeprefix("file://"), "config.json").write_text('{"model_type": "other"}')
    assert client.ensure(model, timeout=WAIT).entry != entry
    with client.lease_of(entry.partition("@")[0], holder="ns/pod", adopt=True) as second:
        assert second.entry == entry
        assert second.id != first.id, "so that whoever had it cannot release it"
    assert client.request("GET", "/v1/leases") == {"leases": []}


def test_a_hand_over_without_the_daemon_leaves_what_time_there_is(settings_of: Callable[..., Settings], model: str) -> None:
    with Daemon(settings_of()) as running:
        of(running).ensure(model, timeout=WAIT)
        lease = of(running).lease(model, holder="me", ttl=60).__enter__()
    before = lease.expires
    lease.hand_over()
    lease.__exit__(None, None, None)
    assert lease.expires == before


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"NVCACHE_HOLDER": "me", "POD_NAME": "p"}, "me"),
        ({"POD_NAMESPACE": "ns", "POD_NAME": "p"}, "ns/p"),
        ({"POD_NAME": "p"}, "p"),
        ({"POD_NAMESPACE": "ns"}, f"{socket.gethostname()}:{os.getpid()}"),
    ],
)
def test_who_holds_a_lease(env: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NVCACHE_HOLDER", "POD_NAMESPACE", "POD_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert default_holder() == name


def test_events_tell_the_state(daemon: Daemon, model: str) -> None:
    entry = of(daemon).ensure(model, timeout=WAIT).entry
    assert entry is not None
    assert [found.state for found in of(daemon).events(entry)] == ["ready"]
    with pytest.raises(Problem) as caught:
        list(of(daemon).events("hf--a--b@" + "1" * 40))
    assert caught.value.code == "unknown-model"


def test_over_tcp(guarded: Daemon, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = guarded.listeners[-1].sock.getsockname()
    client = Client(f"http://{host}:{port}")
    with pytest.raises(Problem) as caught:
        client.request("GET", "/v1/models")
    assert caught.value.code == "unauthorized"
    monkeypatch.setenv("NVCACHE_TOKEN_FILE", str(place / "token"))
    assert (place / "token").read_text().strip() == TOKEN
    assert client.request("GET", "/v1/models") == {"models": []}
