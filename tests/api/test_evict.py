"""Making room through the API: 200 with what went, 507 with what is in the way, 413 for what can never be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvcache.settings import Settings
from tests.api.conftest import make_model
from tests.api.harness import WAIT, Daemon

LIMIT = 100_000
NEED = LIMIT - 2000  # more than is left beside a model


@pytest.fixture
def small(settings_of: Callable[..., Settings]) -> Iterator[Daemon]:
    """A daemon with little room."""
    with Daemon(settings_of(max_bytes=LIMIT)) as running:
        yield running


def filled(small: Daemon, place: Path) -> tuple[str, str]:
    """Two models, by entry."""
    first, second = (small.ready(f"file://{make_model(place / 'origin' / name, fill=fill)}")["entry"] for fill, name in enumerate(("one", "two")))
    return first, second


def test_what_is_held_is_named_with_its_holders(small: Daemon, place: Path) -> None:
    first, second = filled(small, place)
    small.ask("PUT", f"/v1/models/{first}/pin")
    lease = small.ask("POST", f"/v1/models/{second}/leases", {"holder": "ns/vllm-0"}).json["lease"]
    full = small.ask("POST", "/v1/evict", {"need_bytes": NEED})
    assert (full.status, full.code) == (507, "full")
    assert {each["entry"]: each["held"] for each in full.json["in_the_way"]} == {first: ["pinned"], second: ["leased by ns/vllm-0"]}
    for text in (first, second, "pinned", "ns/vllm-0"):
        assert text in full.json["detail"]
    plan = small.ask("POST", "/v1/evict", {"need_bytes": NEED, "dry_run": True}).json
    assert (plan["enough"], plan["victims"], len(plan["in_the_way"])) == (False, [], 2)
    assert small.ask("DELETE", f"/v1/models/{second}/leases/{lease}").status == 204
    done = small.ask("POST", "/v1/evict", {"need_bytes": NEED}).json
    assert ([victim["entry"] for victim in done["victims"]], done["enough"]) == ([second], True)
    assert [model["entry"] for model in small.ask("GET", "/v1/models").json["models"]] == [first]


def test_what_can_never_be_is_another_refusal_also_where_all_is_pinned(small: Daemon, place: Path) -> None:
    for entry in filled(small, place):
        small.ask("PUT", f"/v1/models/{entry}/pin")
    assert small.ask("POST", "/v1/evict", {"need_bytes": LIMIT}).status == 507
    never = small.ask("POST", "/v1/evict", {"need_bytes": LIMIT + 1})
    assert (never.status, never.code) == (413, "too-large")
    assert never.json["limit_bytes"] == LIMIT


def test_who_holds_a_model_is_shown_with_it(guarded: Daemon, model: str) -> None:
    """All of them to an admin, one's own to a pod."""
    entry = guarded.ready(model)["entry"]
    theirs = guarded.admin("POST", f"/v1/models/{entry}/leases", {"holder": "uid=4242/pid=1/other", "ttl_s": 900}).json
    mine = guarded.ask("POST", f"/v1/models/{entry}/leases", {"holder": "me", "ttl_s": 60}).json
    shown = guarded.admin("GET", f"/v1/models/{entry}").json
    assert shown["holders"] == [{name: lease[name] for name in ("lease", "holder", "expires")} for lease in (mine, theirs)]
    shown = guarded.ask("GET", f"/v1/models/{entry}").json
    assert ([held["lease"] for held in shown["holders"]], shown["leases"]) == ([mine["lease"]], 2)


def test_a_pod_that_finds_no_room_learns_what_is_held_and_not_by_whom(settings_of: Callable[..., Settings], place: Path) -> None:
    """Neither at once, nor from the job, the model, its story, or the list of either."""
    big = make_model(place / "origin" / "big")
    (big / "tokenizer.json").write_bytes(b"x" * NEED)
    with Daemon(settings_of(max_bytes=LIMIT, admin_socket=place / "s" / "admin.sock", allow=(f"file://{place}/origin/*",))) as running:
        entry = running.ready(f"file://{make_model(place / 'origin' / 'one')}")["entry"]
        running.admin("POST", f"/v1/models/{entry}/leases", {"holder": "team-a/vllm-0"})
        foreseen = running.ask("POST", "/v1/models", {"ref": f"file://{big}", "dry_run": True})
        assert [each["held"] for each in foreseen.json["refusal"]["in_the_way"]] == [["leased"]]
        job = running.ask("POST", "/v1/models", {"ref": f"file://{big}"}).json["job"]["id"]
        until = time.monotonic() + WAIT
        while (ended := running.ask("GET", f"/v1/jobs/{job}")).json["ended_at"] is None:
            assert time.monotonic() < until, ended
        assert ended.json["error"]["code"] == "full"
        assert f"{entry} (1.1 kB: leased)" in ended.json["error"]["detail"]
        told = [running.ask("GET", path).data for path in ("/v1/jobs", "/v1/models", f"/v1/models/{ended.json['entry']}/timeline")]
        assert b"team-a" not in b"".join([foreseen.data, ended.data, *told])
        assert "leased by team-a/vllm-0" in running.admin("POST", "/v1/evict", {"need_bytes": LIMIT}).json["detail"]
