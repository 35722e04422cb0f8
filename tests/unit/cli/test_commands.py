"""ls, show, path, rm, pin, unpin, df, jobs, verify against a scripted daemon: what they ask and what they print."""

from __future__ import annotations

import json
import re

import pytest

from nvcache.cli import output
from tests.support.stub_daemon import problem
from tests.unit.cli.conftest import ENTRY, REVISION, job, model

SLUG = "hf--org--name"
DIRECTORY = {"backend": "directory", "state": "mounted", "path": "/srv/store"}


def calls(stub):
    return [f"{asked.method} {asked.path}" for asked in stub.asked]


def test_ls_shows_states_sizes_and_progress(stub, run):
    filling = model(ref="hf://org/other@" + "f" * 40, revision="f" * 40, state="fetching", path=None, progress=job(done=42_000_000)["progress"])
    stub.answer("GET /v1/models", {"models": [filling, model(pinned=True, leases=2, in_use=True, last_used="2025-01-02T03:04:05Z")]})
    ran = run("ls")
    assert ran.code == 0
    header, ready, fetching = ran.out.splitlines()
    assert header.split() == ["MODEL", "REVISION", "STATE", "SIZE", "FILES", "VERIFIED", "LAST", "USED", "PIN", "LEASES"]
    assert ready.split()[:4] == ["hf://org/name", REVISION[:12], "ready", "90.9"]
    assert ready.split()[-4:] == ["in", "use", "pinned", "2"]
    assert "in use" not in fetching
    assert "fetching 42% at 5.0 MB/s, 12 s left" in fetching


def test_ls_says_to_people_why_a_model_is_not_ready(stub, run):
    error = {"code": "degraded", "detail": "cannot serve it: 1 chunk is gone or went bad; mending it failed: cannot list it: 404"}
    stub.answer("GET /v1/models", {"models": [model(), model(ref="hf://org/other@" + "f" * 40, state="degraded", path=None, error=error)]})
    ran = run("ls")
    assert (ran.code, len(ran.out.splitlines())) == (0, 3)
    assert ran.err == f"nvcache: degraded: {error['detail']}\n"


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
        "commit": None,
        "selection": {"include": ["*.safetensors"], "exclude": []},
        "left_out": [{"path": "pytorch_model.bin", "size": 5}],
        "parsed": True,
        "checks": [check],
    }


def test_show_names_every_file_its_digest_and_what_was_left_out(stub, run):
    holders = [{"lease": "ab" * 16, "holder": "uid=1000/pid=7/team/pod", "expires": "2025-01-02T03:04:05.000Z"}]
    detail = {**model(warnings=["total_size is wrong"], pinned=True, leases=3, in_use=True), "holders": holders, "manifest": manifest()}
    stub.answer(f"GET /v1/models/{SLUG}", detail)
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
        "yes, by a process of this node",
        "uid=1000/pid=7/team/pod until 2025-01-02T03:04:05Z",
        "2 of others",
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
    stub.answer(f"GET /v1/models/{SLUG}", {**model(files=1, last_used="2025-01-02T03:04:05.678901+00:00"), "holders": [], "manifest": manifest()})
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
    free, held = run("rm", "--dry-run", "org/name"), run("rm", "--dry-run", "org/name")
    assert (free.out, free.code) == (f"would remove: {ENTRY} 90.9 MB\n", 0)
    assert (held.out, held.code) == (f"would be refused (pinned, 3 leases): {ENTRY} 90.9 MB\n", 10)
    assert json.loads(run("rm", "--dry-run", "org/name", "--json").out)["held"] == ["pinned", "3 leases"]
    assert all(call.startswith("GET") for call in calls(stub))


def test_unpin(stub, run):
    stub.answer(f"DELETE /v1/models/{SLUG}/pin", model())
    assert run("unpin", "org/name").out == f"unpinned {ENTRY}\n"


NO_ROOM = dict.fromkeys(("limit", "used", "reserved", "free", "total", "quarantined", "min_free", "high_mark", "low_mark"), 0)


def test_df_draws_the_room_and_the_biggest_models(stub, run):
    space = {**NO_ROOM, "limit": 1000, "used": 400, "reserved": 100, "free": 500, "total": 9000, "min_free": 200, "high_mark": 665, "low_mark": 630}
    stub.answer("GET /v1/space", space)
    stub.answer("GET /v1/stripe", DIRECTORY)
    filling = model(bytes=999, state="fetching", path=None)
    stub.answer("GET /v1/models", {"models": [model(bytes=10), filling, model(bytes=360, entry=f"big@{REVISION}", state="degraded")]})
    ran = run("df")
    assert re.search(r"unfinished +30 B of fills", ran.out)
    assert re.search(r"^free +200 B in the cache, 500 B of 9.0 kB on the file system, 200 B of it for others$", ran.out, re.MULTILINE)
    assert re.search(r"^evicts +above 665 B, down to 630 B$", ran.out, re.MULTILINE)
    assert "999" not in ran.out
    assert "█" * 20 + "▒" * 5 + "·" * 25 + " 40%" in ran.out
    assert ran.out.index("big@") < ran.out.index(ENTRY)
    assert json.loads(run("df", "--json").out) == {
        **space,
        "stripe": DIRECTORY,
        "models": [{"entry": f"big@{REVISION}", "state": "degraded", "bytes": 360}, {"entry": ENTRY, "state": "ready", "bytes": 10}],
    }
    stub.answer("GET /v1/models", {"models": [model(bytes=400)]})
    assert "unfinished" not in run("df").out
    assert "stripe" not in run("df").out


def test_df_says_what_the_nodes_disks_are(stub, run):
    stripe = {"backend": "md", "state": "mounted", "members": ["a", "b"], "array": "/dev/md127", "filesystem": "xfs", "mount": "/m"}
    stub.answer("GET /v1/stripe", stripe, {"backend": "md", "state": "lost", "code": "R01", "reason": "/dev/nvme1n1 (serial S1) vanished"})
    stub.answer("GET /v1/space", NO_ROOM)
    stub.answer("GET /v1/models", {"models": []})
    assert re.search(r"^stripe +md of 2 disks, /dev/md127, xfs, mounted at /m$", run("df").out, re.MULTILINE)
    assert re.search(r"^stripe +lost: R01 /dev/nvme1n1 \(serial S1\) vanished$", run("df").out, re.MULTILINE)


def test_df_of_an_overfull_store_still_draws(stub, run):
    stub.answer("GET /v1/stripe", DIRECTORY)
    stub.answer("GET /v1/space", {**NO_ROOM, "used": 400, "reserved": 100, "total": 9000, "quarantined": 7})
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


def test_verify_all_takes_one_after_the_other_at_the_bandwidth(stub, run):
    others = {"degraded": "hf--a--b@" + "d" * 40, "fetching": "hf--c--d@" + "e" * 40}
    models = [{"entry": ENTRY, "state": "ready"}, *({"entry": entry, "state": state} for state, entry in others.items())]
    stub.answer("GET /v1/models", {"models": models})
    for number, entry in enumerate((ENTRY, others["degraded"])):
        begun = job("verifying", kind="verify", id=f"j{number}")
        stub.answer(f"POST /v1/models/{entry}/verify", {"job": begun, "entry": entry}, status=202)
        stub.answer(f"GET /v1/jobs/j{number}", begun, job("done", kind="verify", id=f"j{number}", cached_before=4_000_000, cached_after=4_000_000))
    ran = run("verify", "--all", "--bandwidth", "20MB")
    assert ran.code == 0
    assert ran.out.count("every byte is right") == 2
    assert "4.0 MB of it in memory before, 4.0 MB after" in ran.out
    calls = [asked.path for asked in stub.asked if asked.path != "/v1/models"]
    assert list(dict.fromkeys(calls)) == [f"/v1/models/{ENTRY}/verify", "/v1/jobs/j0", f"/v1/models/{others['degraded']}/verify", "/v1/jobs/j1"]
    assert [asked.body for asked in stub.asked if asked.method == "POST"] == [{"bandwidth": 20_000_000}] * 2


@pytest.mark.parametrize("given", [(), ("org/name", "--all"), ("org/name", "--bandwidth", "0"), ("org/name", "--bandwidth", "quick")])
def test_verify_is_told_what_to_read(run, given):
    assert run("verify", *given).code == 2


def test_verify_that_cannot_mend_is_exit_by_cause(stub, run):
    stub.answer(f"POST /v1/models/{SLUG}/verify", {"job": job("verifying", kind="verify"), "entry": ENTRY}, status=202)
    broken = job("failed", kind="verify", bad_files=["model.safetensors"], error=problem("source-unreachable", "cannot mend it: the source is away"))
    stub.answer("GET /v1/jobs/j1", broken)
    ran = run("verify", "org/name")
    assert ran.code == 5
    assert "wrong bytes in model.safetensors" in ran.out
    assert "cannot mend it" in ran.err
    assert json.loads(run("verify", "org/name", "--json").out)["error"]["code"] == "source-unreachable"


def eviction(**more):
    victim = {"entry": ENTRY, "frees": 90_000_000, "last_used": "2026-01-01T00:00:00Z", "in_use": True}
    return {"need": 140_000_000, "short": 80_000_000, "freed": 90_000_000, "enough": True, "victims": [victim], "in_the_way": [], **more}


def test_evict_shows_what_would_go(stub, run):
    stub.answer("POST /v1/evict", eviction())
    ran = run("evict", "--need", "140MB", "--dry-run")
    assert ran.code == 0
    assert stub.asked[0].body == {"need_bytes": 140_000_000, "dry_run": True}
    assert [line.split()[:3] for line in ran.out.splitlines()[:2]] == [["MODEL", "FREES", "LAST"], [ENTRY, "90.0", "MB"]]
    assert "a process reads it" in ran.out
    assert "would free" in ran.out


def test_evict_that_is_not_enough_names_who_is_in_the_way(stub, run):
    held = {"entry": ENTRY, "bytes": 90_000_000, "held": ["pinned", "leased by uid=0/pod"]}
    stub.answer("POST /v1/evict", eviction(enough=False, victims=[], freed=0, in_the_way=[held]))
    ran = run("evict", "--need", "140MB", "--dry-run")
    assert ran.code == 7
    assert re.search(rf"{re.escape(ENTRY)}\s+90.0 MB\s+pinned, leased by uid=0/pod", ran.out)


@pytest.mark.parametrize("size", ["0", "-5", "lots", "5XB"])
def test_evict_takes_sizes(stub, run, size):
    ran = run("evict", "--need", size)
    assert (ran.code, stub.asked) == (2, [])
    assert "cannot run nvcache evict: Invalid value for '--need'" in ran.err


def lease(number, holder="uid=1000/pid=7/team/pod"):
    return {
        "lease": f"{number:032x}",
        "entry": ENTRY,
        "holder": holder,
        "path": "/srv/m",
        "hub_cache": None,
        "expires": "2026-01-01T00:00:00Z",
    }


def test_leases_are_listed_and_broken_by_their_first_digits(stub, run):
    stub.answer("GET /v1/leases", {"leases": [lease(0xAB << 120), lease(0xAC << 120, "other")]})
    ran = run("leases")
    assert ran.code == 0
    assert [line.split()[:3] for line in ran.out.splitlines()[1:]] == [
        ["ab0000000000", ENTRY, "uid=1000/pid=7/team/pod"],
        ["ac0000000000", ENTRY, "other"],
    ]
    stub.answer(f"DELETE /v1/models/{ENTRY}/leases/{0xAB << 120:032x}", {})
    assert run("leases", "--break", "ab").code == 0
    assert calls(stub)[-1] == f"DELETE /v1/models/{ENTRY}/leases/{0xAB << 120:032x}"
    for wanted, why in (("a", "2 leases begin so"), ("f", "no lease has this id"), ("", "no lease has this id")):
        ran = run("leases", "--break", wanted)
        assert ran.code == 3
        assert why in ran.err
