"""hold against a scripted daemon: one that answers what it should not, and a defect. Leases that are really held are test_pod_start's."""

from __future__ import annotations

import pytest

from nvcache.cli.daemon import Daemon
from nvcache.cli.exits import Exit
from nvcache.cli.hold import Held
from tests.support.stub_daemon import StubDaemon, problem
from tests.unit.cli.conftest import ENTRY, model

SLUG = ENTRY.partition("@")[0]
LOOK = "GET /v1/models?ref=org%2Fname"
LEASE = {"lease": "l1", "entry": ENTRY, "holder": "me", "path": "/store/m", "hub_cache": None, "expires": "2999-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    "garbage", [{}, {"lease": 1}, {**LEASE, "expires": "soon"}, (500, {"status": "none"}), (503, {"code": "starting", "status": None})]
)
def test_what_is_no_answer_is_an_obstacle_like_any_other(stub: StubDaemon, garbage: object) -> None:
    """At the look, at the taking and at the renewal; afterwards it is held."""
    said: list[str] = []
    held = Held(Daemon(f"unix://{stub.socket}"), "org/name", None, said.append)
    stub.answer(LOOK, garbage, model())
    stub.answer(f"GET /v1/models?ref={ENTRY.replace('@', '%40')}", garbage, model())
    stub.answer(f"POST /v1/models/{SLUG}/leases", garbage, (404, problem("unknown-lease", status=404)))
    stub.answer(f"POST /v1/models/{ENTRY}/leases", garbage, (201, {**LEASE, "expires": "2000-01-01T00:00:00Z"}))
    stub.answer(f"PUT /v1/models/{ENTRY}/leases/l1", garbage, LEASE)
    for _ in range(8):
        held._due = 0.0
        held.step()
    assert said[0].startswith("cannot hold org/name just now")
    assert said[-1].startswith("holding org/name as ")
    assert [asked.method for asked in stub.asked].count("PUT") >= 2


def test_a_sidecar_that_a_defect_stops_holding_ends(stub: StubDaemon, run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """So that it is started again: one that lives and holds nothing helps nobody."""

    def defect(_held: Held) -> float:
        raise AssertionError("a defect")

    monkeypatch.setattr(Held, "step", defect)
    monkeypatch.setattr("threading.excepthook", lambda _args: None)
    assert run("hold", "org/name").code == Exit.INTERNAL
