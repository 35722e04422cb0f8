"""warm against a scripted daemon: what it asks, waits for, prints, and how it ends."""

from __future__ import annotations

import json
import re
import socket
import time

import pytest

from nvcache.cli import follow, progress
from nvcache.cli.daemon import Daemon
from nvcache.cli.follow import Follower, Task
from nvcache.cli.progress import Lines
from tests.support.stub_daemon import StubDaemon, problem
from tests.unit.cli.conftest import ENTRY, REVISION, job, model

PATH = f"/store/models/hf--org--name/{REVISION}"


class Clock:
    """Time that passes only while somebody pauses."""

    def __init__(self):
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def follow_one(stub, clock, **options):
    daemon = Daemon(f"unix://{stub.socket}")
    task = Task("org/name", lambda: daemon.post("/v1/models", {"ref": "org/name"}))
    lines: list[str] = []
    Follower(daemon, Lines(lines.append, clock), pause=clock.pause, clock=clock, **options).run([task])
    return task, lines


def accepted(**changed):
    return (202, {"job": job("queued", **changed), "entry": None})


def test_a_hit_prints_the_path_alone_on_stdout(stub, run):
    stub.answer("POST /v1/models", model(warnings=["odd"], note="the source is down"))
    ran = run("warm", "org/name")
    assert (ran.code, ran.out) == (0, f"{PATH}\n")
    assert "ready already" in ran.err
    assert "warning: org/name: odd" in ran.err
    assert "note: org/name: the source is down" in ran.err


def test_what_is_asked_is_what_was_typed(stub, run):
    stub.answer("POST /v1/models", model())
    run("warm", "org/name", "--revision", "v1", "--include", "*.json", "--include", "a/*", "--exclude", "b", "--as", "x/y", "--pin")
    expected = {"ref": "org/name", "revision": "v1", "include": ["*.json", "a/*"], "exclude": ["b"], "alias": "x/y", "pin": True}
    assert stub.asked[0].body == expected
    run("warm", "org/name")
    assert stub.asked[-1].body == {"ref": "org/name"}


def test_json_of_a_fill(stub, run):
    stub.answer("POST /v1/models", accepted())
    stub.answer("GET /v1/jobs/j1", job(done=1), job("done", done=100_000_000))
    stub.answer(f"GET /v1/models/{ENTRY}", model())
    ran = run("warm", "org/name", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert list(found) == ["ref", "entry", "revision", "state", "path", "hub_cache", "files", "bytes", "fetched_bytes", "seconds"]
    assert (found["entry"], found["state"], found["path"], found["fetched_bytes"]) == (ENTRY, "ready", PATH, 100_000_000)


def test_several_models_keep_their_order_and_end_with_the_worst_cause(stub, run):
    stub.answer("POST /v1/models", model(), (422, problem("bad-reference")), (404, problem("unknown-model")))
    ran = run("warm", "org/name", "??", "org/none", "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["state"] for line in lines] == ["ready", "failed", "failed"]
    assert [line["ref"] for line in lines][1:] == ["??", "org/none"]
    assert lines[1]["error"]["code"] == "bad-reference"
    assert lines[1]["path"] is None
    assert ran.code == 2


@pytest.mark.parametrize(
    ("error", "code"), [("gated", 4), ("source-stalled", 5), ("digest-mismatch", 6), ("too-large", 7), ("cancelled", 130), ("internal", 1)]
)
def test_a_failed_job_ends_by_its_cause(stub, run, error, code):
    stub.answer("POST /v1/models", accepted())
    stub.answer("GET /v1/jobs/j1", job("failed", error=problem(error, "cannot fetch org/name: why")))
    ran = run("warm", "org/name")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.splitlines()[-2:] == ["nvcache: cannot fetch org/name: why", f"hint: a hint for {error}"]


def test_no_wait_returns_with_the_job(stub, run):
    stub.answer("POST /v1/models", accepted())
    ran = run("warm", "org/name", "--no-wait")
    assert (ran.code, ran.out) == (0, "")
    assert "job j1" in ran.err
    found = json.loads(run("warm", "org/name", "--no-wait", "--json").out)
    assert (found["state"], found["job"], found["path"]) == ("queued", "j1", None)


def test_timeout_is_exit_8_and_says_that_the_fill_goes_on(stub, run):
    stub.answer("POST /v1/models", accepted())
    stub.answer("GET /v1/jobs/j1", job(done=5))
    ran = run("warm", "org/name", "--timeout", "0.3", "--json")
    assert ran.code == 8
    assert json.loads(ran.out)["error"]["code"] == "timeout"
    assert "the fill goes on" in ran.err


@pytest.mark.parametrize("command", [["warm"], ["warm", "--dry-run"], ["verify"]])
def test_timeout_bounds_a_request_that_is_not_answered(stub, run, monkeypatch, command):
    """A stopped process: the kernel takes the connection, nobody reads it."""
    silent = stub.socket.with_name("silent.sock")
    monkeypatch.setenv("NVCACHE_SOCKET", str(silent))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(silent))
        listening.listen()
        began = time.monotonic()
        ran = run(*command, f"org/name@{REVISION}", f"org/other@{REVISION}", "--timeout", "0.3")
    assert ran.code == 8
    assert 0.3 <= time.monotonic() - began < 3


def test_a_daemon_that_is_not_there_is_exit_9_at_once(stub, run, monkeypatch):
    monkeypatch.setenv("NVCACHE_SOCKET", f"{stub.socket}-not")
    for command in (["warm", "org/name"], ["ls"], ["verify", "org/name"]):
        ran = run(*command)
        assert ran.code == 9
        assert "nvcache serve" in ran.err


def test_the_url_option_counts_before_the_environment(stub, run, monkeypatch):
    monkeypatch.setenv("NVCACHE_SOCKET", "/nowhere.sock")
    stub.answer("GET /v1/models", {"models": [model()]})
    for arguments in (["--socket", str(stub.socket), "ls"], ["ls", "--socket", str(stub.socket)], ["ls", "--url", f"unix://{stub.socket}"]):
        assert run(*arguments).code == 0


def test_dry_run_shows_files_bytes_time_and_refusal(stub, run):
    plan = {
        "entry": ENTRY,
        "ref": "hf://org/name",
        "revision": REVISION,
        "files": 2,
        "bytes": 3_000_000,
        "bytes_here": 1_000_000,
        "bytes_to_fetch": 2_000_000,
        "left_out": [{"path": "pytorch_model.bin", "size": 9_000_000}],
        "seconds": 65.0,
        "fits": True,
        "would_evict": [],
        "refusal": None,
        "paths": [{"path": "a", "size": 1_000_000, "here": True}, {"path": "b", "size": 2_000_000, "here": False}],
    }
    refusal = problem("too-large", "cannot store it: 3.0 MB into 1.0 MB")
    stub.answer("POST /v1/models", plan, {**plan, "fits": False, "seconds": None, "refusal": refusal}, plan)
    ran = run("warm", "org/name", "--dry-run")
    assert ran.code == 0
    for text in (r"a +1.0 MB +here", r"b +2.0 MB +to fetch", r"pytorch_model.bin +9.0 MB +left out", r"to fetch +2.0 MB", "1:05 min at the last"):
        assert re.search(text, ran.out), text
    ran = run("warm", "org/name", "--dry-run")
    assert ran.code == 7
    assert "cannot store it" in ran.err
    assert "no rate measured yet" in ran.out
    assert json.loads(run("warm", "org/name", "--dry-run", "--json").out) == plan
    assert all(asked.body["dry_run"] for asked in stub.asked)
    assert ran.out.splitlines()[0].split() == ["FILE", "SIZE", "STATE"]
    stub.answer("POST /v1/models", (404, problem("repository-not-found", "cannot resolve it: no such repository")), plan)
    ran = run("warm", "org/none", "org/name", "--dry-run", "--json")
    failed, planned = (json.loads(line) for line in ran.out.splitlines())
    assert (ran.code, failed["ref"], failed["error"]["code"], planned) == (3, "org/none", "repository-not-found", plan)


def test_it_asks_quickly_while_something_moves_and_slowly_while_nothing_does(stub):
    clock = Clock()
    stub.answer("POST /v1/models", accepted())
    still = [job(done=7)] * 12
    stub.answer("GET /v1/jobs/j1", job(done=1), job(done=2), *still, job("done"))
    stub.answer(f"GET /v1/models/{ENTRY}", model())
    task, _ = follow_one(stub, clock)
    assert task.model is not None
    assert clock.pauses[:3] == [follow.QUICK] * 3
    assert max(clock.pauses) == follow.SLOW


def test_lines_come_at_changes_and_every_few_seconds(stub):
    clock = Clock()
    stub.answer("POST /v1/models", accepted())
    stub.answer("GET /v1/jobs/j1", *[job(done=n * 1_000_000) for n in range(1, 61)], job("done", done=100_000_000))
    stub.answer(f"GET /v1/models/{ENTRY}", model())
    task, lines = follow_one(stub, clock)
    assert lines[0] == "org/name: queued 0 B of 100.0 MB, 0/7 files, 0% at 5.0 MB/s, 12 s left"
    assert lines[1].startswith("org/name: fetching 1.0 MB of 100.0 MB")
    assert lines[-1].startswith("org/name: ready, 100.0 MB fetched in")
    assert len(lines) == 3 + int(59 * follow.QUICK / progress.LINE_EVERY)
    assert task.seconds == pytest.approx(61 * follow.QUICK)


def test_a_restarted_daemon_is_asked_again_and_its_first_jobs_bytes_count(stub):
    clock = Clock()
    stub.answer("POST /v1/models", accepted(), (202, {"job": job("queued", id="j2"), "entry": ENTRY}))
    stub.answer("GET /v1/jobs/j1", job(done=3_000_000), (404, problem("unknown-job")))
    stub.answer("GET /v1/jobs/j2", job("done", done=4_000_000, id="j2"))
    stub.answer(f"GET /v1/models/{ENTRY}", model())
    task, _ = follow_one(stub, clock)
    assert task.problem is None
    assert task.fetched == 7_000_000


def test_a_stopping_daemon_is_waited_for(stub):
    clock = Clock()
    stub.answer("POST /v1/models", accepted(), (503, problem("starting")), (503, problem("stopping")), model())
    stub.answer("GET /v1/jobs/j1", job("failed", error=problem("stopping")))
    task, lines = follow_one(stub, clock)
    assert task.model is not None
    assert "org/name: waiting for the daemon" in lines


def test_a_daemon_that_stays_away_ends_the_wait(tmp_path_factory, stub):
    clock = Clock()
    place = stub.socket.with_name("gone.sock")
    with StubDaemon(place) as gone:
        gone.answer("POST /v1/models", accepted())
        daemon = Daemon(f"unix://{place}")
        task = Task("org/name", lambda: daemon.post("/v1/models", {"ref": "org/name"}))
        first = Follower(daemon, Lines(lambda _: None, clock), wait=False, pause=clock.pause, clock=clock)
        first.run([task])
    follower = Follower(daemon, Lines(lambda _: None, clock), pause=clock.pause, clock=clock, wait_daemon=30)
    follower.run([task])
    assert task.problem is not None
    assert task.problem["code"] == "daemon-unreachable"
    assert 30 <= clock.now <= 30 + follow.SLOW


def test_wait_daemon_covers_a_socket_that_is_not_there_yet(stub):
    clock = Clock()
    place = stub.socket.with_name("late.sock")
    daemon = Daemon(f"unix://{place}")
    task = Task("org/name", lambda: daemon.post("/v1/models", {"ref": "org/name"}))
    Follower(daemon, Lines(lambda _: None, clock), wait_daemon=5, timeout=60, pause=clock.pause, clock=clock).run([task])
    assert task.problem is not None
    assert task.problem["code"] == "daemon-unreachable"
    assert 5 <= clock.now <= 5 + follow.SLOW
