"""The API over a stripe that comes and goes: it stays up, says why, and ends what is under way with the reason."""

from __future__ import annotations

import errno
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvcache.client import Client, Problem
from nvcache.engine.handover import LocalStripe, StripeState, StripeStatus
from nvcache.settings import Settings
from nvcache.store.views import Views
from tests.api.harness import Daemon
from tests.support.faults import Kind
from tests.support.hub import HubServer
from tests.support.repo import Repo

DETAILS: dict[str, object] = {
    "case": "C3",
    "backend": "md",
    "filesystem": "xfs",
    "members": ["/dev/nvme0n1", "/dev/nvme1n1"],
    "disks": [
        {"name": "nvme0n1", "serial": "A", "verdict": "ours", "code": None},
        {"name": "nvme1n1", "serial": "B", "verdict": "ours", "code": None},
        {"name": "nvme2n1", "serial": "C", "verdict": "refused", "code": "D07"},
    ],
    "tuning": [
        {"device": "/dev/md127", "setting": "read_ahead", "was": 131072, "wanted": 4194304, "now": 4194304},
        {"device": "/dev/nvme0n1", "setting": "scheduler", "was": "bfq", "wanted": "none", "now": None},
    ],
    "warnings": ["W01: an allowed disk is not in the stripe"],
}


class Striped(Daemon):
    """A daemon whose stripe the test keeps."""

    def __init__(self, settings: Settings) -> None:
        self.stripe = LocalStripe()
        super().__init__(settings, self.stripe)
        self.generation = 0

    def say(self, state: StripeStatus, code: str | None = None, reason: str = "", **more: Any) -> None:
        self.generation += 1
        self.stripe.publish(StripeState(self.generation, state, code, reason, details=DETAILS, **more))

    def mount(self, fs_uuid: str = "uuid-a") -> None:
        """The stripe comes; returns when it is served."""
        store = self.settings.store.with_name(fs_uuid)
        store.mkdir(exist_ok=True)
        self.say(StripeStatus.MOUNTED, "R01", "made anew", fs_uuid=fs_uuid, store=str(store))
        wait(lambda: self.ask("GET", "/readyz").status == 200)

    def withdraw(self) -> None:
        """The stripe goes; returns when the daemon let go of it."""
        self.say(StripeStatus.WITHDRAWING, "R01", "/dev/nvme1n1 vanished")
        assert self.stripe.wait_acknowledged(self.generation, 5)


def wait(good: Callable[[], object]) -> None:
    """Until it is good, for a while."""
    never = threading.Event()
    for _ in range(500):
        if good():
            return
        never.wait(0.02)
    raise AssertionError("it did not come")


@pytest.fixture
def striped(settings_of: Callable[..., Settings]) -> Iterator[Striped]:
    with HubServer({"org/name": Repo({"model.bin": b"x" * 2**21})}) as hub, Striped(settings_of(hf_endpoint=hub.url)) as running:
        running.hub = hub  # type: ignore[attr-defined]
        yield running


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models?ref=org/name", None),
        ("GET", "/v1/models/hf--org--name", None),
        ("GET", "/v1/models/hf--org--name/events", None),
        ("POST", "/v1/models", {"ref": "org/name"}),
        ("POST", "/v1/models", {"ref": "org/name", "dry_run": True}),
        ("DELETE", "/v1/models/hf--org--name", None),
        ("PUT", "/v1/models/hf--org--name/pin", None),
        ("POST", "/v1/models/hf--org--name/verify", None),
        ("POST", "/v1/models/hf--org--name/leases", {"holder": "pod"}),
        ("PUT", "/v1/models/hf--org--name/leases/x", {}),
        ("DELETE", "/v1/models/hf--org--name/leases/x", None),
    ],
)
def test_without_a_stripe_every_call_that_needs_one_says_so(striped: Striped, method: str, path: str, body: object) -> None:
    striped.say(StripeStatus.ABSENT, "N03", "/dev/nvme2n1 (serial C): D07 it has partitions")
    wait(lambda: "N03" in str(striped.ask("GET", "/readyz").json))
    answer = striped.ask(method, path, body)
    assert answer.code == "no-stripe"
    assert answer.status == 503
    assert "N03 /dev/nvme2n1 (serial C): D07 it has partitions" in answer.json["detail"]
    assert (answer.json["retryable"], answer.json["disk_code"], answer.json["stripe"]) == (True, "N03", "absent")
    assert int(answer.headers["retry-after"]) > 0


def test_without_a_stripe_the_rest_of_the_api_answers(striped: Striped) -> None:
    striped.say(StripeStatus.ABSENT, "N03", "D07")
    for path in ("/v1/models", "/v1/jobs", "/v1/leases", "/v1/space", "/v1/stripe", "/v1/sources", "/healthz", "/version", "/metrics"):
        assert striped.ask("GET", path).status == 200, path
    assert striped.ask("GET", "/v1/models").json == {"models": []}
    assert striped.ask("GET", "/v1/space").json["total"] == 0
    ready = striped.ask("GET", "/readyz")
    assert ready.status == 503
    assert ready.json["problems"] == ["the stripe is absent: N03 D07"]


def test_the_stripe_is_told_whole(striped: Striped) -> None:
    striped.mount()
    told = striped.ask("GET", "/v1/stripe").json
    assert {name: told[name] for name in DETAILS} == DETAILS
    assert (told["state"], told["code"], told["reason"], told["fs_uuid"], told["health"]) == ("mounted", "R01", "made anew", "uuid-a", "ok")
    assert told["path"] == str(striped.settings.store.with_name("uuid-a"))
    assert told["generation"] == striped.generation
    assert told["space"]["total"] > 0
    striped.withdraw()
    told = striped.ask("GET", "/v1/stripe").json
    assert (told["state"], told["path"], told["direct_io"]) == ("withdrawing", None, False)
    assert "nvme1n1 vanished" in told["health"]


def test_a_plain_directory_is_a_mounted_stripe(daemon: Daemon) -> None:
    told = daemon.ask("GET", "/v1/stripe").json
    assert (told["backend"], told["state"], told["generation"], told["code"], told["fs_uuid"]) == ("directory", "mounted", 1, None, None)
    assert told["path"] == str(daemon.settings.store)


def test_metrics_tell_the_stripe(striped: Striped) -> None:
    striped.mount()
    lines = striped.ask("GET", "/metrics").data.decode().splitlines()
    for line in (
        'nvcache_stripe_state{state="mounted"} 1.0',
        'nvcache_stripe_state{state="lost"} 0.0',
        'nvcache_stripe_info{backend="md",case="C3",code="R01",filesystem="xfs",fs_uuid="uuid-a"} 1.0',
        f"nvcache_stripe_generation {float(striped.generation)}",
        "nvcache_stripe_members 2.0",
        'nvcache_disks{verdict="ours"} 2.0',
        'nvcache_disk_refused{code="D07"} 1.0',
        "nvcache_stripe_losses_total 0.0",
    ):
        assert line in lines, line
    striped.say(StripeStatus.LOST)
    wait(lambda: "nvcache_stripe_losses_total 1.0" in striped.ask("GET", "/metrics").data.decode())


def test_a_stream_and_a_wait_end_with_the_reason(striped: Striped) -> None:
    striped.mount()
    hub: HubServer = striped.hub  # type: ignore[attr-defined]
    hub.faults.add("model.bin", Kind.STALL, times=None, after=2**20, seconds=60)
    job = striped.ask("POST", "/v1/models", {"ref": "org/name"}).json["job"]["id"]
    wait(lambda: striped.ask("GET", f"/v1/jobs/{job}").json["entry"])
    entry = striped.ask("GET", f"/v1/jobs/{job}").json["entry"]
    client = Client(f"unix://{striped.socket}")
    told: list[object] = []

    def follow() -> None:
        try:
            told.extend(client.events(entry))
        except Problem as problem:
            told.append(problem)

    follower = threading.Thread(target=follow)
    follower.start()
    wait(lambda: told)
    striped.withdraw()
    follower.join(10)
    assert isinstance(told[-1], Problem)
    assert (told[-1].code, told[-1].retryable) == ("no-stripe", True)
    held = [frame.f_locals["response"] for frame, _ in traceback.walk_tb(told[-1].__traceback__) if "response" in frame.f_locals]
    assert [response.closed for response in held] == [True], "who keeps the error would keep the socket"
    ended = striped.ask("GET", f"/v1/jobs/{job}").json
    assert (ended["state"], ended["error"]["code"]) == ("failed", "no-stripe")
    assert 'nvcache_fill_failures_total{code="no-stripe"} 1.0' in striped.ask("GET", "/metrics").data.decode()


def test_many_callers_at_the_moment_it_goes_get_an_answer_or_the_reason(striped: Striped) -> None:
    """Neither a 500 nor a hang, whatever each of them is in the middle of."""
    striped.mount()
    striped.ready("org/name")
    answers: list[tuple[int, str]] = []
    done = threading.Event()

    def hammer(method: str, path: str, body: object) -> None:
        while not done.is_set():
            answer = striped.ask(method, path, body)
            answers.append((answer.status, str(json.loads(answer.data).get("code"))))

    calls = [
        ("GET", "/v1/models?ref=org/name", None),
        ("POST", "/v1/models", {"ref": "org/name"}),
        ("POST", "/v1/models/hf--org--name/leases", {"holder": "pod"}),
        ("POST", "/v1/models/hf--org--name/verify", None),
        ("PUT", "/v1/models/hf--org--name/pin", None),
    ]
    threads = [threading.Thread(target=hammer, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for _ in range(3):
        wait(lambda: sum(status < 300 for status, _ in answers[-20:]) > 5)
        striped.withdraw()
        wait(lambda: any(status == 503 for status, _ in answers[-5:]))
        striped.mount()
    done.set()
    for thread in threads:
        thread.join(10)
    odd = {answer for answer in answers if answer[0] >= 300 and answer != (503, "no-stripe")}
    assert odd <= {(409, "not-ready")}, odd


def test_a_restart_of_the_stripe_keeps_the_path(striped: Striped, place: Path) -> None:
    striped.mount()
    before = striped.ready("org/name")
    striped.withdraw()
    striped.mount()
    assert striped.ready("org/name")["path"] == before["path"]


def test_what_tcp_hears_of_a_store_that_cannot_be_opened_names_no_model(
    settings_of: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody in the cluster may ask; the socket's caller is told everything."""

    def broken(*_args: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    settings = settings_of(listen="127.0.0.1:0", listen_scope="metrics")
    with HubServer({"org/secret": Repo({"config.json": b"{}"})}) as hub, Striped(settings.model_copy(update={"hf_endpoint": hub.url})) as running:
        running.mount()
        running.ready("org/secret")
        running.withdraw()
        monkeypatch.setattr(Views, "_shown", broken)
        running.say(StripeStatus.MOUNTED, fs_uuid="uuid-a", store=str(settings.store.with_name("uuid-a")))
        wait(lambda: "Input/output" in str(running.ask("GET", "/readyz").json))
        assert "hf--org--secret@" in str(running.ask("GET", "/readyz").json), "or this test proves nothing"
        told = running.tcp("GET", "/readyz")
        assert told.status == 503
        assert "(disk-io)" in told.json["problems"][0]
        assert "secret" not in told.data.decode()
        assert "secret" not in running.tcp("GET", "/metrics").data.decode()
