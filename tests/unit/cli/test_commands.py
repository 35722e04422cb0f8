"""ls, show, path, rm, pin, unpin, df, jobs, verify against a scripted daemon: what they ask and what they print."""

from __future__ import annotations

import json
import re

import pytest

from nvcache.cli import output
from tests.support.stub_daemon import problem
from tests.unit.cli.conftest import ENTRY, REVISION, job, model

SLUG = "hf--org--name"


def calls(stub):
    return [f"{asked.method} {asked.path}" for asked in stub.asked]


def test_ls_shows_states_sizes_and_progress(stub, run):
    filling = model(ref="hf://org/other@" + "f" * 40, revision="f" * 40, state="fetching", path=None, progress=job(done=42_000_000)["progress"])
    stub.answer("GET /v1/models", {"models": [filling, model(pinned=True, leases=2)]})
    ran = run("ls")
    assert ran.code == 0
    header, ready, fetching = ran.out.splitlines()
    assert header.split() == ["MODEL", "REVISION", "STATE", "SIZE", "FILES", "VERIFIED", "LAST", "USED", "PIN", "LEASES"]
    assert ready.split()[:4] == ["hf://org/name", REVISION[:12], "ready", "90.9"]
    assert ready.split()[-2:] == ["pinned", "2"]
    assert "fetching 42% at 5.0 MB/s, 12 s left" in fetching


def test_ls_without_models_says_what_to_do_and_prints_nothing(stub, run):
    stub.answer("GET /v1/models", {"models": []})
    ran = run("ls")
    assert (ran.code, ran.out) == (0, "")
    assert "nvcache warm" in ran.err


@pytest.mark.parametrize("command", ["ls", "jobs"])
def test_json_is_the_daemons_answer(stub, run, command):
    answer = {"models": [model()]} if command == "ls" else {"jobs": [job()]}
    stub.answer("GET /v1/models" if command == "ls" else "GET /v1/jobs", answer)
    assert json.loads(run(command, "--json").out) == answer


def manifest():
    check = {"path": "model.safetensors", "size": 90_000_000, "sha256": "a" * 64, "check": "lfs-sha256", "source": "sha256:" + "a" * 64}
    return {
        "endpoint": "https://hub.example",
        "asked": "hf://org/name",
        "selection": {"include": ["*.safetensors"], "exclude": []},
        "left_out": [{"path": "pytorch_model.bin", "size": 5}],
        "parsed": True,
        "checks": [check],
    }


def test_show_names_every_file_its_digest_and_what_was_left_out(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname", model(warnings=["total_size is wrong"]))
    detail = {**model(warnings=["total_size is wrong"], pinned=True), "manifest": manifest()}
    stub.answer(f"GET /v1/models/{ENTRY}", detail)
    ran = run("show", "org/name")
    assert ran.code == 0
    for text in (
        "/store/models",
        "a" * 64,
        "lfs-sha256",
        "pytorch_model.bin",
        "left out",
        "total_size is wrong",
        "include *.safetensors",
        "org/name",
    ):
        assert text in ran.out
    assert json.loads(run("show", "org/name", "--json").out) == detail


def test_path_prints_the_directory_alone(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname", model())
    assert run("path", "org/name").out == f"/store/models/hf--org--name/{REVISION}\n"
    assert run("path", "--hub", "org/name").out == "/store/hub\n"


def test_path_of_what_is_not_ready_is_exit_3_with_a_hint(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname", model(state="fetching", path=None, hub_cache=None))
    ran = run("path", "org/name")
    assert (ran.code, ran.out) == (3, "")
    assert "it is fetching" in ran.err
    assert "hint: run `nvcache warm org/name`" in ran.err
    stub.answer("GET /v1/models?ref=org%2Fname", model(hub_cache=None, hub_id=None))
    ran = run("path", "--hub", "org/name")
    assert (ran.code, ran.out) == (3, "")
    assert "--as" in ran.err


@pytest.mark.parametrize(
    ("ref", "place"),
    [
        ("org/name", SLUG),
        (f"hf://org/name@{REVISION}", ENTRY),
        (ENTRY, ENTRY),
        (SLUG, SLUG),
        ("file:///data/a%20b", "file--data--a%3D20b"),
    ],
)
def test_rm_names_the_entry_without_asking_first(stub, run, ref, place):
    stub.answer(f"DELETE /v1/models/{place}", model())
    ran = run("rm", ref)
    assert (ran.code, ran.out) == (0, f"removed {ENTRY} 90.9 MB\n")
    assert calls(stub) == [f"DELETE /v1/models/{place}"]


def test_a_moving_revision_is_looked_up(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname%40main", model())
    stub.answer(f"PUT /v1/models/{ENTRY}/pin", model(pinned=True))
    assert run("pin", "org/name@main").out == f"pinned {ENTRY}\n"


def test_rm_of_a_held_model_is_exit_10(stub, run):
    stub.answer(f"DELETE /v1/models/{SLUG}", (409, problem("leased", "cannot remove it: pod-1 holds it")))
    ran = run("rm", "org/name")
    assert (ran.code, ran.out) == (10, "")
    assert "pod-1 holds it" in ran.err


@pytest.mark.parametrize(
    ("command", "call", "said"), [("rm", "DELETE {}", "removed"), ("pin", "PUT {}/pin", "pinned"), ("unpin", "DELETE {}/pin", "unpinned")]
)
def test_several_go_on_after_an_error_and_end_with_the_worst(stub, run, command, call, said):
    stub.answer(call.format(f"/v1/models/{SLUG}"), model())
    stub.answer(call.format("/v1/models/hf--org--held"), (409, problem("leased", "cannot remove hf--org--held@0123: pod-1 holds it")))
    stub.answer(call.format("/v1/models/hf--nope--x"), (404, problem("unknown-model", "cannot find model hf--nope--x: this node does not have it")))
    refs = ("nope/x", "org/na me", "org/held", "org/name")
    ran = run(command, *refs)
    assert (ran.code, ran.out.split()[:2]) == (2, [said, ENTRY])
    assert "nvcache: cannot find model nope/x: this node does not have it" in ran.err
    assert "nvcache: cannot remove org/held@0123: pod-1 holds it" in ran.err
    ran = run(command, *refs, "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["ref"] for line in lines[:3]] == list(refs[:3])
    assert [line["error"]["code"] for line in lines[:3]] == ["unknown-model", "bad-reference", "leased"]
    assert (ran.code, lines[3]) == (2, model())
    assert run(command, "nope/x", "org/held").code == 3


def test_a_short_revision_is_looked_up(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname%400123456789ab", model())
    stub.answer("GET /v1/models?ref=hf--org--name%400123456", model())
    stub.answer(f"DELETE /v1/models/{ENTRY}", model())
    for ref in ("org/name@0123456789ab", "hf--org--name@0123456"):
        assert run("rm", ref).out == f"removed {ENTRY} 90.9 MB\n"


def test_path_as_json(stub, run):
    stub.answer("GET /v1/models?ref=org%2Fname", model(), model(state="fetching", path=None))
    assert json.loads(run("path", "org/name", "--json").out) == model()
    ran = run("path", "org/name", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["ref"], found["error"]["code"]) == (3, "org/name", "not-ready")
    assert "it is fetching" in ran.err


def test_ls_in_a_narrow_terminal_leaves_out_what_is_empty(stub, run, monkeypatch):
    monkeypatch.setattr(output, "PIPE_WIDTH", 80)
    long = model(ref=f"hf://sentence-transformers/all-MiniLM-L6-v2-{'x' * 30}@{REVISION}")
    stub.answer("GET /v1/models", {"models": [long]}, {"models": [long, model(leases=1)]})
    ran = run("ls")
    assert ran.out.splitlines()[0].split() == ["MODEL", "REVISION", "STATE", "SIZE", "FILES", "VERIFIED"]
    assert REVISION[:12] in ran.out
    assert "hf://" not in ran.out
    assert "LEASES" in run("ls").out
    monkeypatch.setattr(output, "PIPE_WIDTH", 120)
    assert "PIN" in run("ls").out
    assert "hf://" in run("ls").out


def test_show_cuts_digests_where_they_do_not_fit(stub, run, monkeypatch):
    stub.answer("GET /v1/models?ref=org%2Fname", model())
    stub.answer(f"GET /v1/models/{ENTRY}", {**model(files=1, last_used="2025-01-02T03:04:05.678901+00:00"), "manifest": manifest()})
    monkeypatch.setattr(output, "PIPE_WIDTH", 100)
    narrow = run("show", "org/name").out
    assert "a" * 12 in narrow
    assert "a" * 13 not in narrow
    assert "in 1 file\n" in narrow
    assert "2025-01-02T03:04:05Z (" in narrow
    monkeypatch.setattr(output, "PIPE_WIDTH", 115)
    wide = run("show", "org/name").out
    assert any("a" * 64 in line and line.endswith("lfs-sha256") for line in wide.splitlines())


def test_rm_dry_run_removes_nothing(stub, run):
    stub.answer(f"GET /v1/models/{SLUG}", model(), model(pinned=True, leases=3))
    assert run("rm", "--dry-run", "org/name").out == f"would remove: {ENTRY} 90.9 MB\n"
    assert run("rm", "--dry-run", "org/name").out == f"would be refused (pinned, 3 leases): {ENTRY} 90.9 MB\n"
    assert json.loads(run("rm", "--dry-run", "org/name", "--json").out)["held"] == ["pinned", "3 leases"]
    assert all(call.startswith("GET") for call in calls(stub))


def test_unpin(stub, run):
    stub.answer(f"DELETE /v1/models/{SLUG}/pin", model())
    assert run("unpin", "org/name").out == f"unpinned {ENTRY}\n"


def test_df_draws_the_room_and_the_biggest_models(stub, run):
    space = {"limit": 1000, "used": 400, "reserved": 100, "free": 5000, "total": 9000, "quarantined": 0}
    stub.answer("GET /v1/space", space)
    filling = model(bytes=999, state="fetching", path=None)
    stub.answer("GET /v1/models", {"models": [model(bytes=10), filling, model(bytes=360, entry=f"big@{REVISION}", state="degraded")]})
    ran = run("df")
    assert re.search(r"unfinished +30 B of fills", ran.out)
    assert "999" not in ran.out
    assert "█" * 20 + "▒" * 5 + "·" * 25 + " 40%" in ran.out
    assert ran.out.index("big@") < ran.out.index(ENTRY)
    assert json.loads(run("df", "--json").out) == {
        **space,
        "models": [{"entry": f"big@{REVISION}", "state": "degraded", "bytes": 360}, {"entry": ENTRY, "state": "ready", "bytes": 10}],
    }
    stub.answer("GET /v1/models", {"models": [model(bytes=400)]})
    assert "unfinished" not in run("df").out


def test_df_of_an_overfull_store_still_draws(stub, run):
    stub.answer("GET /v1/space", {"limit": 0, "used": 400, "reserved": 100, "free": 0, "total": 9000, "quarantined": 7})
    stub.answer("GET /v1/models", {"models": []})
    ran = run("df")
    assert ran.code == 0
    assert "quarantine" in ran.out


def test_jobs_and_their_reasons(stub, run):
    failed = job(
        "failed", id="j2", ended_at="2025-01-02T03:05:00Z", created_at="2025-01-02T03:04:06.000Z", error=problem("gated", "cannot have it: gated")
    )
    stub.answer("GET /v1/jobs", {"jobs": [failed, job(done=50_000_000)]})
    _, running, ended = run("jobs").out.splitlines()
    assert running.split()[:5] == ["j1", "fill", "hf://org/name", "fetching", "50%"]
    assert "gated" in ended
    stub.answer("DELETE /v1/jobs/j1", job("cancelled", ended_at="2025-01-02T03:05:00Z"))
    assert "cancelled" in run("jobs", "--cancel", "j1").out


def test_verify_follows_the_job_and_tells_what_was_mended(stub, run):
    stub.answer(f"POST /v1/models/{SLUG}/verify", {"job": job("verifying", kind="verify"), "entry": ENTRY}, status=202)
    ended = job("done", done=1_000, kind="verify", bad_files=["model.safetensors"], repaired_chunks=1)
    stub.answer("GET /v1/jobs/j1", job("verifying", kind="verify"), ended)
    ran = run("verify", "org/name")
    assert ran.code == 0
    assert "wrong bytes in model.safetensors" in ran.out
    assert "1 chunk mended, 1.0 kB fetched" in ran.out
    found = json.loads(run("verify", "org/name", "--json").out)
    assert {name: found[name] for name in ("state", "bad_files", "repaired_chunks", "fetched_bytes")} == {
        "state": "ok",
        "bad_files": ["model.safetensors"],
        "repaired_chunks": 1,
        "fetched_bytes": 1000,
    }


def test_verify_that_cannot_mend_is_exit_by_cause(stub, run):
    stub.answer(f"POST /v1/models/{SLUG}/verify", {"job": job("verifying", kind="verify"), "entry": ENTRY}, status=202)
    broken = job("failed", kind="verify", bad_files=["model.safetensors"], error=problem("source-unreachable", "cannot mend it: the source is away"))
    stub.answer("GET /v1/jobs/j1", broken)
    ran = run("verify", "org/name")
    assert ran.code == 5
    assert "wrong bytes in model.safetensors" in ran.out
    assert "cannot mend it" in ran.err
    assert json.loads(run("verify", "org/name", "--json").out)["error"]["code"] == "source-unreachable"
