"""The command line against a real daemon and a Hub-shaped server: every command, JSON shapes, exit codes by cause, progress without a terminal."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nvcache import client
from tests.support.daemon import DaemonProcess
from tests.support.hub import HubServer, Kind, Repo
from tests.support.models import make_llama

TINY, GATED, HUGE, SLOW, WRONG = "acme/tiny", "acme/gated", "acme/huge", "acme/slow", "acme/wrong"
RESULT = ["ref", "entry", "revision", "state", "path", "hub_cache", "files", "bytes", "fetched_bytes", "seconds"]


def llama(directory: Path, seed: int, **options: object) -> Repo:
    make_llama(directory, 3_000_000, shards=2, seed=seed)
    (directory / "pytorch_model.bin").write_bytes(b"not taken" * 100)
    return Repo.of_directory(directory) if not options else Repo({p.name: p for p in directory.iterdir()}, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    made = tmp_path_factory.mktemp("source")
    repos = {
        TINY: llama(made / "tiny", 1),
        GATED: llama(made / "gated", 2, gated=True, granted=False),
        HUGE: Repo({"config.json": b"{}", "model.safetensors": b"x"}, listed_sizes={"model.safetensors": 40 * 10**9}),
        SLOW: llama(made / "slow", 3),
        WRONG: llama(made / "wrong", 4),
    }
    with HubServer(repos) as server:
        yield server


@pytest.fixture(scope="module")
def daemon(hub: HubServer):
    with tempfile.TemporaryDirectory(prefix="nvc-") as place, DaemonProcess(Path(place), hub.url, max_bytes="2GB", workers=1) as running:
        yield running


@pytest.fixture
def stalled(hub: HubServer):
    """A model of which no byte comes until the fault is released."""
    fault = hub.faults.add("*model-00001*", Kind.STALL, times=None, origin="cdn", seconds=60)
    yield fault
    hub.faults.clear()


@pytest.fixture
def tiny(daemon: DaemonProcess) -> Path:
    """The model, ready."""
    done = daemon.cli("warm", TINY)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def flip(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    path.chmod(0o444)


def test_warm_prints_the_path_alone_and_progress_lines_on_stderr(daemon, hub):
    daemon.cli("rm", TINY)
    done = daemon.cli("warm", f"hf://{TINY}")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.removesuffix("\n"))
    assert path.is_dir()
    assert {p.name for p in path.iterdir()} == {p for p in hub.repos[TINY].commits[hub.repos[TINY].commit] if p != "pytorch_model.bin"}
    lines = done.stderr.splitlines()
    assert all(line.startswith(f"nvcache: hf://{TINY}: ") for line in lines)
    assert "ready" in lines[-1]
    assert "\x1b" not in done.stderr


def test_bars_are_for_a_terminal_and_stdout_still_has_the_path_alone(daemon):
    daemon.cli("rm", TINY)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nvcache", "warm", TINY]
    environment = {**daemon.environment, "TERM": "xterm-256color", "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # EIO is how a terminal ends
        while piece := terminal.read(65536):
            shown += piece
    assert Path(done.stdout.decode().removesuffix("\n")).is_dir()
    assert b"\x1b[" in shown
    assert TINY.encode() in shown
    assert b"ready" in shown.splitlines()[-1] + shown.splitlines()[-2]


def test_json_of_a_fill_and_of_a_hit(daemon, hub):
    daemon.cli("rm", TINY)
    first = json.loads(daemon.cli("warm", TINY, "--json").stdout)
    assert list(first) == RESULT
    assert first["revision"] == hub.repos[TINY].commit
    assert first["entry"] == f"hf--acme--tiny@{first['revision']}"
    assert first["state"] == "ready"
    assert first["fetched_bytes"] == first["bytes"] > 2_900_000
    requests = len(hub.seen(origin="cdn"))
    second = json.loads(daemon.cli("warm", TINY, "--json").stdout)
    assert second["fetched_bytes"] == 0
    assert second["path"] == first["path"]
    assert len(hub.seen(origin="cdn")) == requests


def test_show_names_every_file_with_digest_and_check(daemon, tiny):
    detail = json.loads(daemon.cli("show", TINY, "--json").stdout)
    checks = {check["path"]: check for check in detail["manifest"]["checks"]}
    assert set(checks) == {str(path.relative_to(tiny)) for path in tiny.rglob("*") if path.is_file()}
    for path, check in checks.items():
        data = (tiny / path).read_bytes()
        assert (check["size"], check["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert check["check"] == ("lfs-sha256" if path.endswith(".safetensors") else "git-sha1")
    assert [left["path"] for left in detail["manifest"]["left_out"]] == ["pytorch_model.bin"]
    text = daemon.cli("show", TINY).stdout
    assert str(tiny) in text
    assert all(check["sha256"] in text for check in checks.values())


def test_ls_path_df_jobs(daemon, tiny):
    assert "hf://acme/tiny" in daemon.cli("ls").stdout
    (listed,) = [model for model in json.loads(daemon.cli("ls", "--json").stdout)["models"] if model["path"] == str(tiny)]
    assert listed["state"] == "ready"
    assert daemon.cli("path", TINY).stdout == f"{tiny}\n"
    assert daemon.cli("path", listed["entry"]).stdout == f"{tiny}\n"
    hub_cache = Path(daemon.cli("path", "--hub", TINY).stdout.strip())
    assert (hub_cache / "models--acme--tiny" / "snapshots").is_dir()
    space = json.loads(daemon.cli("df", "--json").stdout)
    assert space["limit"] == 2 * 10**9
    assert {"entry": listed["entry"], "state": "ready", "bytes": listed["bytes"]} in space["models"]
    assert 0 < space["free"] < space["total"]
    assert "reserved" in daemon.cli("df").stdout
    jobs = json.loads(daemon.cli("jobs", "--json").stdout)["jobs"]
    assert any(job["entry"] == listed["entry"] and job["state"] == "done" for job in jobs)
    assert "fill" in daemon.cli("jobs").stdout


def test_every_command_takes_a_short_revision(daemon, tiny):
    listed = next(model for model in json.loads(daemon.cli("ls", "--json").stdout)["models"] if model["path"] == str(tiny))
    short = listed["revision"][:12]
    assert short in daemon.cli("ls").stdout
    for ref in (f"{TINY}@{short}", f"hf://{TINY}@{short}", f"hf--acme--tiny@{short}", listed["entry"], "hf--acme--tiny"):
        assert daemon.cli("path", ref).stdout == f"{tiny}\n"
        assert daemon.cli("warm", ref).stdout == f"{tiny}\n"
        assert json.loads(daemon.cli("show", ref, "--json").stdout)["entry"] == listed["entry"]
        for command, said in (("pin", "pinned"), ("unpin", "unpinned")):
            assert daemon.cli(command, ref).stdout == f"{said} {listed['entry']}\n"
        assert daemon.cli("verify", ref).returncode == 0
    unknown = daemon.cli("warm", "hf--acme--none")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert "org/name" in unknown.stderr
    assert daemon.cli("rm", f"{TINY}@{short}").stdout.startswith(f"removed {listed['entry']}")


def test_what_is_not_there_is_named_as_it_was_typed(daemon):
    for command in ("rm", "pin", "verify"):
        done = daemon.cli(command, "nope/x")
        assert (done.returncode, done.stdout) == (3, "")
        assert "cannot find model nope/x: " in done.stderr


def test_a_selection_of_nothing_says_how_to_see_the_files(daemon):
    done = daemon.cli("warm", TINY, "--include", "*.none")
    assert done.returncode == 2
    assert "hint: change --include/--exclude; `nvcache warm REF --dry-run` lists the files" in done.stderr


def test_an_unknown_job_says_how_to_list_them(daemon):
    done = daemon.cli("jobs", "--cancel", "foo")
    assert done.returncode == 3
    assert "`nvcache jobs` lists them" in done.stderr


def test_a_dry_run_of_several_tells_each(daemon, tiny):
    done = daemon.cli("warm", "acme/none", TINY, "--dry-run", "--json")
    failed, planned = (json.loads(line) for line in done.stdout.splitlines())
    assert (failed["ref"], failed["error"]["code"]) == ("acme/none", "repository-not-found")
    assert "or it is private and no token is set" in failed["error"]["detail"]
    assert (planned["fits"], done.returncode) == (True, 3)


def test_pinned_and_leased_models_are_not_removed(daemon, tiny):
    assert daemon.cli("pin", TINY).returncode == 0
    assert json.loads(daemon.cli("show", TINY, "--json").stdout)["pinned"] is True
    refused = daemon.cli("rm", TINY)
    assert (refused.returncode, refused.stdout) == (10, "")
    assert daemon.cli("unpin", TINY).returncode == 0
    with client.Client(f"unix://{daemon.socket}").lease(TINY, holder="a-test"):
        assert "1 lease)" in daemon.cli("rm", "--dry-run", TINY).stdout
        refused = daemon.cli("rm", TINY)
        assert refused.returncode == 10
        assert "a-test" in refused.stderr
    assert tiny.is_dir()
    assert "would remove" in daemon.cli("rm", "--dry-run", TINY).stdout
    assert daemon.cli("rm", TINY).stdout.startswith("removed hf--acme--tiny@")
    assert not tiny.exists()
    gone = daemon.cli("path", TINY)
    assert (gone.returncode, gone.stdout) == (3, "")


def test_leases_are_seen_and_broken_by_an_operator(daemon, tiny):
    with client.Client(f"unix://{daemon.socket}").lease(TINY, holder="ns/vllm-0", ttl=600) as lease:
        shown = daemon.cli("show", TINY).stdout
        assert f"ns/vllm-0 until {lease.expires:%Y-%m-%dT%H:%M}" in shown
        [line] = [line for line in daemon.cli("leases").stdout.splitlines() if "ns/vllm-0" in line]
        assert line.startswith(lease.id[:12])
        assert "(in " in line, "how long it has"
        (told,) = json.loads(daemon.cli("show", TINY, "--json").stdout)["holders"]
        assert (told["lease"], told["holder"]) == (lease.id, "ns/vllm-0")
        refused = daemon.cli("rm", TINY)
        assert (refused.returncode, "ns/vllm-0" in refused.stderr) == (10, True)
        assert daemon.cli("leases", "--break", lease.id[:8]).returncode == 0
        assert lease.id not in daemon.cli("leases", "--json").stdout
        assert daemon.cli("rm", TINY).returncode == 0
    assert daemon.cli("warm", TINY).returncode == 0


def test_evict_says_what_would_go_and_why_it_cannot(daemon, tiny):
    here = {model["entry"] for model in json.loads(daemon.cli("ls", "--json").stdout)["models"] if model["state"] == "ready"}
    plan = json.loads(daemon.cli("evict", "--dry-run", "--need", "2GB", "--json").stdout)
    assert (plan["in_the_way"], {victim["entry"] for victim in plan["victims"]}) == ([], here)
    assert tiny.is_dir(), "nothing is removed"
    assert daemon.cli("pin", TINY).returncode == 0
    seen = daemon.cli("evict", "--dry-run", "--need", "140GB")
    assert seen.returncode == 7
    assert re.search(r"^hf--acme--tiny@\S+ .* pinned$", seen.stdout, re.MULTILINE)
    full = daemon.cli("evict", "--need", "1999MB")
    assert (full.returncode, "pinned" in full.stderr, tiny.is_dir()) == (7, True, True)
    never = daemon.cli("evict", "--need", "140GB")
    assert never.returncode == 7
    assert "an empty cache could hold 2.0 GB" in never.stderr
    assert daemon.cli("unpin", TINY).returncode == 0
    assert daemon.cli("evict", "--need", "1999MB").returncode == 0
    assert not tiny.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["acme/none"], 3, "repository-not-found"),
        ([f"{TINY}@v9"], 3, "revision-not-found"),
        ([GATED], 4, "gated"),
        (["not a reference"], 2, "bad-reference"),
        ([TINY, "--revision", ".."], 2, "bad-reference"),
        ([HUGE], 7, "too-large"),
    ],
)
def test_exit_codes_by_cause(daemon, arguments, code, error):
    done = daemon.cli("warm", *arguments, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["state"], found["error"]["code"]) == (code, "failed", error)
    assert "nvcache: cannot " in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_bytes_are_exit_6_and_nothing_is_served(daemon, hub):
    hub.faults.add("*model-00002*", Kind.FLIP, times=None, origin="cdn", after=1000)
    done = daemon.cli("warm", WRONG)
    hub.faults.clear()
    assert (done.returncode, done.stdout) == (6, "")
    assert daemon.cli("path", WRONG).returncode == 3


def test_several_models_are_one_line_each_and_the_worst_counts(daemon, tiny):
    done = daemon.cli("warm", TINY, "acme/none", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["ref"].rpartition("@")[0] or one["ref"], one["state"]) for one in found] == [(f"hf://{TINY}", "ready"), ("acme/none", "failed")]
    assert done.returncode == 3


def test_dry_run_fetches_nothing_and_sees_what_is_here(daemon, hub, tiny):
    sent = hub.bytes_sent()
    here = json.loads(daemon.cli("warm", TINY, "--dry-run", "--json").stdout)
    assert here["bytes_to_fetch"] <= here["bytes"] - here["bytes_here"]
    assert here["bytes_here"] > 2_900_000
    missing = json.loads(daemon.cli("warm", SLOW, "--dry-run", "--json").stdout)
    assert missing["fits"] is True
    assert missing["bytes_to_fetch"] == missing["bytes"] - missing["bytes_here"]
    assert [left["path"] for left in missing["left_out"]] == ["pytorch_model.bin"]
    assert "to fetch" in daemon.cli("warm", SLOW, "--dry-run").stdout
    assert daemon.cli("warm", HUGE, "--dry-run").returncode == 7
    assert hub.bytes_sent() == sent
    assert daemon.cli("path", SLOW).returncode == 3


def test_a_byte_flipped_on_the_disk_is_found_and_mended(daemon, tiny):
    shard = next(tiny.glob("model-00001*"))
    before = shard.read_bytes()
    flip(shard)
    done = daemon.cli("verify", TINY, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (found["bad_files"], found["repaired_chunks"], found["state"]) == ([shard.name], 1, "ok")
    assert 0 < found["fetched_bytes"] <= 16 * 2**20
    assert shard.read_bytes() == before
    again = daemon.cli("verify", TINY)
    assert again.returncode == 0
    assert "every byte is right" in again.stdout


def test_page_cache(daemon, tiny):
    done = daemon.cli("warm", TINY, "--page-cache")
    assert done.stdout == f"{tiny}\n"
    assert "page cache" in done.stderr


def test_timeout_is_exit_8_and_the_fill_goes_on(daemon, stalled):
    done = daemon.cli("warm", SLOW, "--timeout", "1")
    assert done.returncode == 8
    assert "goes on" in done.stderr
    assert "hf://acme/slow" in daemon.cli("jobs").stdout
    joined = daemon.cli("warm", SLOW, "--no-wait", "--json")
    assert json.loads(joined.stdout)["state"] in ("queued", "resolving", "fetching")
    assert joined.returncode == 0
    assert daemon.cli("path", SLOW).returncode == 3
    stalled.released.set()
    assert daemon.cli("warm", SLOW).returncode == 0
    assert daemon.cli("rm", SLOW).returncode == 0


def waiting_for(daemon: DaemonProcess, ref: str) -> subprocess.Popen[str]:
    """A `warm` that is told to wait, once it has said that it does."""
    command = [sys.executable, "-m", "nvcache", "warm", ref, "--timeout", "90"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it, and so what they start
    try:
        process = subprocess.Popen(command, env=daemon.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert ref in process.stderr.readline()
    return process


def test_ctrl_c_stops_the_waiting_and_not_the_fill(daemon, stalled):
    process = waiting_for(daemon, SLOW)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "the fill goes on" in err
    assert "Traceback" not in err
    (running,) = [job for job in json.loads(daemon.cli("jobs", "--json").stdout)["jobs"] if job["ended_at"] is None]
    cancelled = daemon.cli("jobs", "--cancel", running["id"])
    assert cancelled.returncode == 0
    stalled.released.set()


def test_warm_waits_through_a_restart_of_the_daemon(daemon, stalled):
    process = waiting_for(daemon, SLOW)
    assert daemon.stop() == 0
    stalled.released.set()
    daemon.start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert Path(out.strip()).is_dir()


def test_no_daemon_is_exit_9_with_a_hint(daemon, tmp_path):
    for command in (["ls"], ["warm", TINY], ["verify", TINY], ["path", TINY]):
        done = daemon.cli(*command, NVCACHE_SOCKET=str(tmp_path / "none.sock"))
        assert (done.returncode, done.stdout) == (9, "")
        assert "hint: start one with `nvcache serve`" in done.stderr


def test_a_daemon_that_cannot_start_is_exit_2(daemon, tmp_path):
    for arguments in (["--socket", "other.sock"], ["--store", str(tmp_path / "other")], ["--store", "/proc/x", "--socket", "other.sock"]):
        done = daemon.cli("serve", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "nvcache: cannot " in done.stderr
        assert "Traceback" not in done.stderr


def test_serve_prints_one_line_and_its_flags_count_before_the_environment(hub):
    with tempfile.TemporaryDirectory(prefix="nvc-") as place:
        flags = ("--max-bytes", "1.5GB", "--no-direct-io", "--workers", "1", "--log-format", "json")
        with DaemonProcess(Path(place), hub.url, *flags, max_bytes="2GB") as other:
            assert other.ready_line.startswith("nvcache ")
            assert str(other.socket) in other.ready_line
            assert json.loads(other.cli("df", "--json").stdout)["limit"] == 1_500_000_000
            assert other.cli("warm", TINY).returncode == 0
            assert other.cli("--socket", str(other.socket), "path", TINY, NVCACHE_SOCKET="/nowhere.sock").returncode == 0


def test_doctor_finds_nothing_that_fails(daemon):
    done = daemon.cli("doctor", "--json")
    found = json.loads(done.stdout)
    assert [finding for finding in found["findings"] if finding["verdict"] == "fail"] == []
    assert done.returncode == 0
    assert str(daemon.store) in done.stdout
    told = {finding["check"]: finding["detail"] for finding in found["findings"]}
    assert told["hub"] == f"{daemon.environment['HF_ENDPOINT']} answers (this shell)"
    assert "(this shell)" not in told["hub token"]
    away = json.loads(daemon.cli("doctor", "--json", NVCACHE_SOCKET="/nowhere.sock").stdout)
    assert "(this shell)" in {finding["check"]: finding["detail"] for finding in away["findings"]}["hub token"]
