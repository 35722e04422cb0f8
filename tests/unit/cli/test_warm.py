"""warm against a scripted daemon: what it asks, waits for, prints, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path

import pytest

from nvcache.cli import follow, podstart, progress, warm
from nvcache.cli.daemon import Daemon
from nvcache.cli.exits import exit_of
from nvcache.cli.follow import Follower, Task
from nvcache.cli.progress import Amount, Lines
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


@pytest.mark.parametrize("command", [["warm"], ["warm", "--dry-run"], ["verify"], ["rm"], ["pin"], ["unpin"], ["show"], ["path"]])
@pytest.mark.parametrize("ref", ["az://acc/models?sv=1&sig=NeverToBePrinted", "https://me:NeverToBePrinted@acc.blob.core.windows.net/models"])
def test_a_secret_in_a_name_is_not_repeated(stub, run, command, ref):
    stub.answer("POST /v1/models", (400, problem("bad-reference", "cannot read it")))
    for ran in (run(*command, ref), run(*command, ref, "--json")):
        assert ran.code
        assert ran.err.startswith("nvcache: ")
        assert "NeverToBePrinted" not in ran.out + ran.err
    assert "NeverToBePrinted" not in "".join(asked.path for asked in stub.asked)


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


def test_into_the_page_cache(stub, run):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        (Path(name) / "model.safetensors").write_bytes(b"x" * 1_000_000)
        stub.answer("POST /v1/models", model(path=name))
        ran = run("warm", "org/name", "--page-cache")
        assert (ran.code, ran.out) == (0, f"{name}\n")
        assert re.search(r"org/name: read .* into the page cache.*; 1(.0)? MB of 1(.0)? MB are there now", ran.err), ran.err
        found = json.loads(run("warm", "org/name", "--page-cache", "--json").out)
    cached = found["page_cache"]
    assert (cached["bytes"], cached["left_out"], cached["notes"]) == (1_000_000, 0, [])
    assert cached["read"] + cached["already_cached"] == 1_000_000
    ran = run("warm", "org/name", "--page-cache")
    assert ran.code == 12
    assert f"nvcache: cannot read {name} here, where it is ready on the node: No such file or directory" in ran.err
    assert f"hint: mount the node's {Path(name).parent} read-only at the same path" in ran.err


def test_a_page_cache_that_cannot_be_had_is_one_models_problem(stub, run):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        (Path(name) / "model.safetensors").write_bytes(b"x")
        stub.answer("POST /v1/models", model(), model(path=name), model(), model(path=name))
        ran = run("warm", "org/name", "org/other", "--page-cache", "--json")
        lines = [json.loads(line) for line in ran.out.splitlines()]
        assert [(line["state"], line["entry"], line["path"]) for line in lines] == [("failed", ENTRY, PATH), ("ready", ENTRY, name)]
        assert lines[0]["error"]["code"] == "unreadable"
        assert ran.code == 12
        assert run("warm", "org/name", "org/other", "--page-cache").out == f"{name}\n"


def test_a_limit_of_this_process_costs_no_path(stub, run, monkeypatch):
    def full(*given, **more):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(podstart, "prefetch", full)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_bytes(b"{}")
        stub.answer("POST /v1/models", model(path=name))
        ran = run("warm", "org/name", "--page-cache")
    assert (ran.code, ran.out) == (0, f"{name}\n")
    assert "warning: org/name: cannot read it into the page cache: Too many open files; raise this container's limit" in ran.err


def test_what_is_not_waited_for_cannot_be_read(stub, run):
    for option in (["--page-cache"], ["--lease"], ["--env-file", "/nowhere/env"]):
        ran = run("warm", "org/name", *option, "--no-wait")
        assert ran.code == 2
        assert "cannot go with --no-wait" in ran.err
    assert stub.asked == []


def test_bytes_on_their_way_are_told_every_few_seconds():
    clock, lines = Clock(), []
    amount = Amount("org/name", "into the page cache", lines.append, clock)
    for now in (1.0, 4.9, 5.0, 6.0, 10.0):
        clock.now = now
        amount.update(round(now * 1e9), 140 * 10**9)
    assert lines == [
        "org/name: into the page cache 5.0 GB of 140.0 GB, 3% at 1.0 GB/s, 2:15 min left",
        "org/name: into the page cache 10.0 GB of 140.0 GB, 7% at 1.0 GB/s, 2:10 min left",
    ]


def test_several_models_keep_their_order_and_end_with_the_worst_cause(stub, run):
    stub.answer("POST /v1/models", model(), (422, problem("bad-reference")), (404, problem("unknown-model")))
    ran = run("warm", "org/name", "??", "org/none", "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["state"] for line in lines] == ["ready", "failed", "failed"]
    assert [line["ref"] for line in lines][1:] == ["?…", "org/none"]
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
    assert 0.3 <= time.monotonic() - began < 30


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
        "would_evict": ["hf--a--old@1", "hf--b--old@2"],
        "refusal": None,
        "paths": [{"path": "a", "size": 1_000_000, "here": True}, {"path": "b", "size": 2_000_000, "here": False}],
    }
    refusal = problem("too-large", "cannot store it: 3.0 MB into 1.0 MB")
    stub.answer("POST /v1/models", plan, {**plan, "fits": False, "seconds": None, "refusal": refusal}, plan)
    ran = run("warm", "org/name", "--dry-run")
    assert ran.code == 0
    for text in (r"a +1.0 MB +here", r"b +2.0 MB +to fetch", r"pytorch_model.bin +9.0 MB +left out", r"to fetch +2.0 MB", "1:05 min at the last"):
        assert re.search(text, ran.out), text
    assert re.findall(r"^makes way +(\S+)$", ran.out, re.MULTILINE) == plan["would_evict"]
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


def test_disks_that_are_made_anew_are_waited_for(stub):
    clock = Clock()
    stub.answer("POST /v1/models", (503, problem("no-stripe")), accepted(), (503, problem("no-stripe")), model())
    stub.answer("GET /v1/jobs/j1", job("failed", error=problem("no-stripe")))
    task, _ = follow_one(stub, clock)
    assert task.problem is None
    assert task.model is not None


def test_disks_that_stay_away_end_the_wait(stub):
    clock = Clock()
    stub.answer("POST /v1/models", *[(503, problem("no-stripe"))] * 100)
    task, _ = follow_one(stub, clock)
    assert task.problem is not None
    assert task.problem["code"] == "no-stripe"
    assert follow.RESTART_PATIENCE <= clock.now <= follow.RESTART_PATIENCE + 2 * follow.SLOW


def test_a_daemon_that_stays_away_ends_the_wait(tmp_path_factory, stub):
    clock = Clock()
    place = stub.socket.with_name("gone.sock")
    with StubDaemon(place) as gone:
        gone.answer("POST /v1/models", accepted())
        daemon = Daemon(f"unix://{place}")
        task = Task("org/name", lambda: daemon.post("/v1/models", {"ref": "org/name"}))
        first = Follower(daemon, Lines(lambda _: None, clock), wait=False, pause=clock.pause, clock=clock)
        first.run([task])
    lines: list[str] = []
    follower = Follower(daemon, Lines(lines.append, clock), pause=clock.pause, clock=clock, wait_daemon=30)
    follower.run([task])
    assert lines[0] == f"org/name: waiting for the daemon: cannot reach the nvcache daemon at unix://{place}: No such file or directory"
    assert 4 <= len(lines) <= 30 / progress.LINE_EVERY + 2
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


@pytest.mark.parametrize(("options", "seconds"), [([], 0), (["--lease"], 300), (["--required"], 300), (["--or-continue", "--lease"], 60)])
def test_a_pod_waits_for_the_daemon_as_long_as_it_needs_it(run, stub, monkeypatch, options, seconds):
    waits = []

    class Waiting(Follower):
        def __init__(self, *given, wait_daemon, **more):
            waits.append(wait_daemon)
            super().__init__(*given, wait_daemon=0.0, **more)

    monkeypatch.setattr(warm, "Follower", Waiting)
    monkeypatch.setenv("NVCACHE_SOCKET", f"{stub.socket}-not")
    assert run("warm", "org/name", *options).code == (0 if "--or-continue" in options else 9)
    assert run("warm", "org/name", *options, "--wait-daemon", "7").code in (0, 9)
    assert waits == [seconds, 7]


@pytest.mark.parametrize(
    "code", ["gated", "repository-not-found", "too-large", "full", "source-unreachable", "digest-mismatch", "disk-io", "internal"]
)
def test_to_go_on_without_is_one_line_and_exit_0(stub, run, code, tmp_path):
    """Where it is not wished for, the same cause has its own exit code."""
    stub.answer("POST /v1/models", accepted())
    stub.answer("GET /v1/jobs/j1", job("failed", error=problem(code, "cannot fetch org/name: why")))
    ran = run("warm", "org/name", "--or-continue", "--json", "--env-file", str(tmp_path / "env"))
    assert (ran.code, json.loads(ran.out)["error"]["code"], (tmp_path / "env").read_text()) == (0, code, "")
    assert ran.err.splitlines()[-1] == f"nvcache: going on without the cache ({code}): cannot fetch org/name: why; a hint for {code}"
    assert run("warm", "org/name", "--required").code == exit_of(code)


def test_a_model_that_cannot_be_held_is_a_failure(stub, run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    stub.answer("POST /v1/models", model(path=str(tmp_path)))
    stub.answer(f"POST /v1/models/{ENTRY}/leases", (409, problem("not-ready", "cannot lease it: it is evicting")))
    ran = run("warm", "org/name", "--lease", "--ttl", "60")
    assert (ran.code, ran.out) == (3, "")
    assert stub.asked[-1].body["adopt"] is True
    assert stub.asked[-1].body["ttl_s"] == 60


@pytest.mark.parametrize(
    "answer", [{}, {"status": "ok"}, {"job": {}}, {"entry": ENTRY, "state": "ready"}, (404, {"status": "none"}), (500, {"code": "x", "status": None})]
)
def test_what_answers_and_is_no_nvcache_keeps_no_pod_from_starting(stub, run, tmp_path, answer):
    stub.answer("POST /v1/models", answer)
    ran = run("warm", "org/name", "--lease", "--or-continue", "--wait-daemon", "0", "--env-file", str(tmp_path / "env"))
    assert (ran.code, ran.out, (tmp_path / "env").read_text()) == (0, "", "")
    assert "nvcache: going on without the cache (" in ran.err


@pytest.mark.parametrize(
    "lease", [{}, {"lease": "l", "entry": ENTRY, "path": "/x", "expires": "soon"}, {"lease": "l", "entry": ENTRY, "path": "/x", "expires": 7}]
)
def test_what_is_no_lease_is_a_failure(stub, run, tmp_path, lease):
    (tmp_path / "config.json").write_text("{}")
    stub.answer("POST /v1/models", model(path=str(tmp_path)))
    stub.answer(f"POST /v1/models/{ENTRY}/leases", lease)
    ran = run("warm", "org/name", "--lease", "--wait-daemon", "0")
    assert (ran.code, ran.out) == (9, "")


def test_a_model_whose_files_all_lie_in_folders_is_readable(stub, run, tmp_path):
    found = tmp_path / "model"
    (found / "a" / "b").mkdir(parents=True)
    (found / "a" / "b" / "unet.safetensors").write_text("x")
    stub.answer("POST /v1/models", model(path=str(found), hub_cache=None))
    ran = run("warm", "org/name", "--env-file", str(tmp_path / "env"))
    assert (ran.code, ran.out, (tmp_path / "env").read_text()) == (0, f"{found}\n", f"NVCACHE_MODEL={found}\n")


def test_the_variables_are_written_through_nothing_that_stands_there(stub, run, tmp_path):
    """Neither a link, which may lead anywhere, nor a pipe, which nobody reads."""
    kept, file, half = tmp_path / "kept", tmp_path / "env", tmp_path / ".env.new"
    kept.write_text("precious")
    stub.answer("POST /v1/models", (409, problem("full")))
    half.symlink_to(kept)
    file.symlink_to(kept)
    assert run("warm", "org/name", "--or-continue", "--env-file", str(file)).code == 0
    assert (kept.read_text(), file.read_text(), file.is_symlink()) == ("precious", "", False)
    os.mkfifo(half)
    assert run("warm", "org/name", "--or-continue", "--env-file", str(file)).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "kept"]


def test_no_name_for_the_variables_is_told(stub, run):
    stub.answer("POST /v1/models", model())
    assert run("warm", "org/name", "--env-file", "").code == 2
    ran = run("warm", "org/name", "--or-continue", "--env-file", "")
    assert (ran.code, "is no name of a file" in ran.err) == (0, True)
