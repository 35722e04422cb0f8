"""Every route's good and bad paths over the real engine with a directory as source."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from nvcache import __version__
from nvcache.api.metrics import EngineCollector
from tests.api.harness import Daemon

UNKNOWN = "hf--a--b@" + "1" * 40


def test_health_and_version(daemon: Daemon) -> None:
    assert daemon.ask("GET", "/healthz").json == {"status": "ok"}
    assert daemon.ask("GET", "/readyz").json == {"ready": True, "problems": [], "degraded": 0}
    assert daemon.ask("GET", "/version").json == {"version": __version__, "api": "v1"}


def test_readyz_says_why_not(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon.engine, "problems", lambda: ("the disk does not answer",))
    answer = daemon.ask("GET", "/readyz")
    assert (answer.status, answer.json) == (503, {"ready": False, "problems": ["the disk does not answer"], "degraded": 0})
    assert "nvcache_ready 0.0" in daemon.ask("GET", "/metrics").data.decode()
    assert daemon.ask("GET", "/healthz").status == 200


def test_making_ready_answers_with_a_job_and_then_with_the_model(daemon: Daemon, model: str) -> None:
    assert daemon.ask("GET", "/v1/models").json == {"models": []}
    first = daemon.ask("POST", "/v1/models", {"ref": model})
    assert first.status == 202
    job = first.json["job"]
    assert first.headers["location"] == f"/v1/jobs/{job['id']}"
    ready = daemon.ready(model)
    assert ready["state"] == "ready"
    assert sorted(path.name for path in Path(ready["path"]).iterdir()) == ["config.json", "model.safetensors"]
    done = daemon.ask("GET", f"/v1/jobs/{job['id']}").json
    assert (done["state"], done["entry"], done["error"]) == ("done", ready["entry"], None)
    assert done["id"] in {found["id"] for found in daemon.ask("GET", "/v1/jobs").json["jobs"]}
    again = daemon.ask("POST", "/v1/models", {"ref": model})
    assert (again.status, again.json["path"]) == (200, ready["path"])


def test_a_ready_model_is_found_by_every_name(daemon: Daemon, model: str) -> None:
    ready = daemon.ready(model)
    slug = ready["entry"].partition("@")[0]
    for name in (model, ready["ref"], ready["entry"], slug):
        found = daemon.ask("GET", f"/v1/models?ref={name}").json
        assert (found["entry"], found["path"]) == (ready["entry"], ready["path"])
    for name in (ready["entry"], slug):
        assert daemon.ask("GET", f"/v1/models/{name}").json["entry"] == ready["entry"]
    assert [found["entry"] for found in daemon.ask("GET", "/v1/models?state=ready").json["models"]] == [ready["entry"]]
    assert daemon.ask("GET", "/v1/models?state=failed").json == {"models": []}


def test_asking_for_a_model_is_a_use_and_looking_at_it_is_none(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    before = daemon.ask("GET", f"/v1/models/{entry}").json["last_used"]
    assert daemon.ask("PUT", f"/v1/models/{entry}/pin").json["last_used"] == before
    assert daemon.ask("GET", f"/v1/models/{entry}").json["last_used"] == before
    assert daemon.ask("GET", f"/v1/models?ref={model}").json["last_used"] <= daemon.ask("GET", f"/v1/models/{entry}").json["last_used"]
    assert daemon.ask("GET", f"/v1/models/{entry}").json["last_used"] > before


def test_a_short_revision_and_a_slug_are_taken_everywhere(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    slug, _, revision = entry.partition("@")
    for name in (f"{slug}@{revision[:7]}", f"{slug}@{revision[:12]}"):
        assert daemon.ask("GET", f"/v1/models/{name}").json["entry"] == entry
        assert daemon.ask("PUT", f"/v1/models/{name}/pin").json["pinned"] is True
        assert daemon.ask("DELETE", f"/v1/models/{name}/pin").json["pinned"] is False
        assert daemon.ask("POST", f"/v1/models/{name}/verify").json["entry"] == entry
    for name in (slug, entry, f"{slug}@{revision[:7]}", f"{model}@{revision[:12]}"):
        assert daemon.ask("GET", f"/v1/models?ref={name}").json["entry"] == entry
        made = daemon.ask("POST", "/v1/models", {"ref": name})
        assert (made.status, made.json["entry"]) == (200, entry)
    lease = daemon.ask("POST", f"/v1/models/{slug}@{revision[:7]}/leases", {"holder": "x"})
    assert (lease.status, lease.json["entry"]) == (201, entry)


def test_only_what_is_here_can_be_made_ready_by_its_slug(daemon: Daemon) -> None:
    for name in ("hf--a--b", UNKNOWN, UNKNOWN[:20]):
        answer = daemon.ask("POST", "/v1/models", {"ref": name})
        assert (answer.status, answer.code) == (404, "unknown-model")
        assert "org/name" in answer.json["hint"]


def test_show_names_every_file_and_what_it_was_checked_against(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    manifest = daemon.ask("GET", f"/v1/models/{entry}").json["manifest"]
    assert {check["path"]: check["size"] for check in manifest["checks"]}["config.json"] == 23
    assert all(len(check["sha256"]) == 64 and check["check"] for check in manifest["checks"])
    assert manifest["left_out"] == [{"path": "old.bin", "size": 8}]
    assert manifest["asked"] == model
    assert manifest["parsed"] is True


def test_a_selection_is_taken_along(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model, include=["*.json", "old.bin"], exclude=["x*"])["entry"]
    manifest = daemon.ask("GET", f"/v1/models/{entry}").json["manifest"]
    assert sorted(check["path"] for check in manifest["checks"]) == ["config.json", "old.bin"]
    assert manifest["selection"] == {"include": ["*.json", "old.bin"], "exclude": ["x*"]}


def test_a_dry_run_does_nothing(daemon: Daemon, model: str) -> None:
    plan = daemon.ask("POST", "/v1/models", {"ref": model, "dry_run": True})
    assert plan.status == 200
    assert plan.json["files"] == 2
    assert plan.json["left_out"] == [{"path": "old.bin", "size": 8}]
    assert {row["path"]: row["here"] for row in plan.json["paths"]} == {"config.json": False, "model.safetensors": False}
    assert daemon.ask("GET", "/v1/models").json == {"models": []}


@pytest.mark.parametrize(
    ("bad", "where"), [("", "empty"), ("a/b/c", "too many '/'"), ("s3://x/y", "position 0"), ("hf://a/..", "position"), ("a/b@", "is empty")]
)
def test_a_malformed_reference_says_where(daemon: Daemon, bad: str, where: str) -> None:
    for answer in (daemon.ask("POST", "/v1/models", {"ref": bad}), daemon.ask("GET", f"/v1/models?ref={bad}")):
        assert (answer.status, answer.code) == (422, "bad-reference")
        assert where in answer.json["detail"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models?ref=a/b", None),
        ("GET", f"/v1/models/{UNKNOWN}", None),
        ("DELETE", f"/v1/models/{UNKNOWN}", None),
        ("GET", f"/v1/models/{UNKNOWN}/events", None),
        ("PUT", f"/v1/models/{UNKNOWN}/pin", None),
        ("DELETE", f"/v1/models/{UNKNOWN}/pin", None),
        ("POST", f"/v1/models/{UNKNOWN}/verify", None),
        ("POST", f"/v1/models/{UNKNOWN}/leases", {"holder": "x"}),
    ],
)
def test_unknown_models(daemon: Daemon, method: str, path: str, body: object) -> None:
    answer = daemon.ask(method, path, body)
    assert (answer.status, answer.code) == (404, "unknown-model")


def test_unknown_jobs_and_leases(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    for method in ("GET", "DELETE"):
        assert daemon.ask(method, "/v1/jobs/nope").code == "unknown-job"
    assert daemon.ask("PUT", f"/v1/models/{entry}/leases/nope", {}).code == "unknown-lease"
    assert daemon.ask("DELETE", f"/v1/models/{entry}/leases/nope").code == "unknown-lease"


@pytest.mark.parametrize("query", ["state=nope", "state=", "ref=" + "a" * 5000])
def test_bad_queries(daemon: Daemon, query: str) -> None:
    assert daemon.ask("GET", f"/v1/models?{query}").code == "bad-request"


def test_a_model_that_is_not_there_fails_with_its_code(daemon: Daemon, place: Path) -> None:
    job = daemon.ask("POST", "/v1/models", {"ref": f"file://{place}/nowhere"})
    if job.status == 202:  # found out by the job, or at once
        with pytest.raises(AssertionError, match="repository-not-found"):
            daemon.ready(f"file://{place}/nowhere")
    else:
        assert (job.status, job.code) == (404, "repository-not-found")


def test_leases_hold_a_model(daemon: Daemon, model: str) -> None:
    ready = daemon.ready(model)
    leases = f"/v1/models/{ready['entry']}/leases"
    lease = daemon.ask("POST", leases, {"holder": "vllm-0", "ttl_s": 60})
    assert lease.status == 201
    assert (lease.json["entry"], lease.json["path"], lease.json["holder"]) == (ready["entry"], ready["path"], "vllm-0")
    refused = daemon.ask("DELETE", f"/v1/models/{ready['entry']}")
    assert (refused.status, refused.code) == (409, "leased")
    assert refused.json["holders"] == [{"lease": lease.json["lease"], "holder": "vllm-0", "expires": refused.json["holders"][0]["expires"]}]
    assert "vllm-0" in refused.json["detail"]
    renewed = daemon.ask("PUT", f"{leases}/{lease.json['lease']}", {"ttl_s": 600}).json
    assert datetime.fromisoformat(renewed["expires"]) > datetime.fromisoformat(lease.json["expires"])
    assert daemon.ask("PUT", f"{leases}/{lease.json['lease']}").status == 200  # the body may be left out
    assert daemon.ask("GET", f"/v1/models?ref={model}").json["leases"] == 1
    released = daemon.ask("DELETE", f"{leases}/{lease.json['lease']}")
    assert (released.status, released.data) == (204, b"")
    assert daemon.ask("GET", "/v1/leases").json == {"leases": []}


@pytest.mark.parametrize(
    "body",
    [
        *({"ttl_s": ttl} for ttl in (0, -1, 1e9, "1")),
        *({"holder": holder} for holder in ("a\nb", "x" * 401, "\x9b31m", "a\u2029b", "\u202eb", "\u2069")),
        {"who": "x"},
        {"adopt": True},
        {"adopt": 1, "holder": "x"},
        b'{"ttl_s": NaN}',
    ],
)
def test_bad_lease_wishes(daemon: Daemon, body: object) -> None:
    assert daemon.ask("POST", f"/v1/models/{UNKNOWN}/leases", body).code == "bad-request"


def test_a_pinned_model_stays(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    assert daemon.ask("PUT", f"/v1/models/{entry}/pin").json["pinned"] is True
    refused = daemon.ask("DELETE", f"/v1/models/{entry}")
    assert (refused.status, refused.code) == (409, "pinned")
    assert daemon.ask("DELETE", f"/v1/models/{entry}/pin").json["pinned"] is False
    gone = daemon.ask("DELETE", f"/v1/models/{entry}")
    assert (gone.status, gone.json["entry"]) == (200, entry)
    assert daemon.ask("GET", f"/v1/models?ref={model}").code == "unknown-model"


def test_a_slug_with_two_revisions_is_not_removed_by_guess(daemon: Daemon, model: str) -> None:
    first = daemon.ready(model)["entry"]
    origin = Path(model.removeprefix("file://"))
    (origin / "config.json").write_text("{}")
    second = daemon.ready(model)["entry"]
    assert second != first
    slug = first.partition("@")[0]
    refused = daemon.ask("DELETE", f"/v1/models/{slug}")
    assert (refused.status, refused.code) == (409, "ambiguous-revision")
    assert first in json.dumps(refused.json)
    assert second in json.dumps(refused.json)


def test_verify_is_a_job(daemon: Daemon, model: str) -> None:
    entry = daemon.ready(model)["entry"]
    answer = daemon.ask("POST", f"/v1/models/{entry}/verify")
    assert answer.status == 202
    assert answer.json["job"]["ref"] == f"{model}@{entry.partition('@')[2]}"
    assert answer.json["job"]["kind"] == "verify"
    assert answer.headers["location"] == f"/v1/jobs/{answer.json['job']['id']}"


def test_an_ended_job_can_be_cancelled_without_harm(daemon: Daemon, model: str) -> None:
    job = daemon.ask("POST", "/v1/models", {"ref": model}).json["job"]["id"]
    daemon.ready(model)
    answer = daemon.ask("DELETE", f"/v1/jobs/{job}")
    assert (answer.status, answer.json["state"]) == (200, "done")


def test_space_and_stripe(daemon: Daemon, model: str) -> None:
    daemon.ready(model)
    space = daemon.ask("GET", "/v1/space").json
    assert space["total"] >= space["free"] > 0
    assert space["limit"] > 0
    most = min(space["limit"], space["free"] + space["used"] - space["min_free"])
    assert (space["high_mark"], space["low_mark"]) == (int(most * 0.95), int(most * 0.90))
    assert daemon.ask("GET", "/v1/stripe").json["backend"] == "directory"


def test_sources_are_told_without_secrets(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY", "HF_TOKEN", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    hub, azure, directory = daemon.ask("GET", "/v1/sources").json["sources"]
    assert hub == {"scheme": "hf", "endpoint": "https://huggingface.co", "token": False, "xet": True, "proxies": {}, "no_proxy": False}
    assert (directory["scheme"], directory["endpoint"]) == ("file", None)
    assert (azure["scheme"], azure["endpoint"], azure["token"]) == ("az", "https://*.blob.core.windows.net", False)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:verysecret@proxy.example:3128/")
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "verysecret")
    answer = daemon.ask("GET", "/v1/sources")
    hub, azure, _ = answer.json["sources"]
    assert azure["token"]
    assert (hub["token"], hub["proxies"], hub["no_proxy"]) == (True, {"https": "proxy.example:3128"}, True)
    assert b"verysecret" not in answer.data


def test_metrics_count(daemon: Daemon, model: str) -> None:
    daemon.ready(model)
    daemon.ask("GET", f"/v1/models?ref={model}")
    text = daemon.ask("GET", "/metrics").data.decode()
    for line in (
        f'nvcache_build_info{{version="{__version__}"}} 1.0',
        "nvcache_ready 1.0",
        'nvcache_models{state="ready"} 1.0',
        "nvcache_fills_total 1.0",
        "nvcache_misses_total 1.0",
        "nvcache_fill_seconds_count 1.0",
    ):
        assert line in text.splitlines()
    assert [family.samples for family in EngineCollector(daemon.engine).collect() if family.name == "nvcache_jobs"] == [[]]
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert all(name.startswith("nvcache_") for name in names)
    assert len(names) == len(set(names))
