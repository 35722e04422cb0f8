"""What a Node shows of its cache: a real daemon and a real client against an API server of ours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nvcache import settings
from nvcache.core.ref import parse_ref
from nvcache.core.signals import CACHE, MODELS, label_of
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeStatus
from nvcache.engine.stripefile import FollowedFile
from nvcache.kubernetes import reading, signals
from tests.api.conftest import make_model
from tests.engine.conftest import ready, run, weights
from tests.kube.signalled import DISK, NODE, SKU, TAINT, Bed, followed, warm
from tests.support.hub import HubServer
from tests.support.kubeapi import READING
from tests.support.kubetools import KUBECTL
from tests.support.repo import Repo

# -- labels, annotations, condition


def test_a_ready_model_is_a_label_until_it_is_removed_and_nothing_of_others_is_touched(bed: Bed) -> None:
    before = json.loads(json.dumps(bed.node))
    one, two = bed.origin("one"), bed.origin("two", 1)
    with bed.daemon() as daemon:
        entry = warm(daemon, one)
        exact = f"{one}@{entry.rpartition('@')[2]}"
        bed.api.wait(bed.shows(one, exact))
        assert len(bed.labels) == 2
        assert set(bed.labels.values()) == {"ready"}
        assert [model["ref"] for model in bed.note(MODELS)] == [exact]
        warm(daemon, two)
        bed.api.wait(bed.shows(one, two))
        assert daemon.cli("rm", one).returncode == 0, daemon.last_words()
        bed.api.wait(lambda: not bed.shows(one)() and bed.shows(two)())
        assert len(bed.note(MODELS)) == 1
        space = json.loads(daemon.cli("df", "--json").stdout)
        assert bed.note(CACHE).keys() == {"total", "free", "used", "limit"}
        assert bed.note(CACHE)["total"] > space["used"] > 0
        assert bed.condition["status"] == "True"
        assert bed.condition["lastTransitionTime"]
        assert daemon.cli("affinity", two, "--label").stdout.strip() in {f"{key}={value}" for key, value in bed.labels.items()}
    node = bed.node
    theirs = {key: value for key, value in node["metadata"]["labels"].items() if not key.startswith("nvcache.io/")}
    assert theirs == before["metadata"]["labels"]
    assert node["spec"] == before["spec"]
    assert [each for each in node["status"]["conditions"] if each["type"] != "NvcacheStripe"] == before["status"]["conditions"]
    assert not bed.api.events, "all went well: there is nothing to tell"


def test_labels_outlive_a_graceful_stop_and_the_next_start_withdraws_what_is_gone(bed: Bed) -> None:
    one, two = bed.origin("one"), bed.origin("two", 1)
    daemon = bed.daemon()
    with daemon:
        entry = warm(daemon, one)
        warm(daemon, two)
        bed.api.wait(bed.shows(one, two))
    assert bed.shows(one, two)(), "the models are there and usable without a daemon"
    slug, _, revision = entry.partition("@")
    (daemon.store / "meta" / "manifests" / f"{slug}@{revision}.json").unlink(missing_ok=True)
    found = [path for path in daemon.store.rglob(f"*{revision}*.json") if "manifest" in str(path)]
    for path in found:
        path.unlink()
    stale = label_of(parse_ref("hf://of/an-earlier-life"))
    with bed.api.writing():
        bed.node["metadata"]["labels"][stale] = "ready"
    seen = len(bed.api.requests)
    with bed.daemon():
        bed.api.wait(lambda: stale not in bed.labels and not bed.shows(one)())
        assert bed.shows(two)()
    writes = [request for request in bed.api.requests[seen:] if request.verb == "patch" and request.resource == "nodes"]
    kept = label_of(parse_ref(two))
    assert all(kept not in request.body["metadata"]["labels"] for request in writes), "what stays true is never withdrawn meanwhile"


def test_a_model_is_labelled_by_every_name_it_has_just_now(bed: Bed) -> None:
    repo = Repo({"config.json": b"{}", "model.safetensors": weights(1, 64)})
    first = repo.find("main")
    with HubServer({"org/name": repo}) as hub, bed.daemon(hf_endpoint=hub.url, resolve_ttl=0) as daemon:
        daemon.environment["HF_ENDPOINT"] = hub.url
        warm(daemon, "org/name")
        bed.api.wait(bed.shows("org/name", f"org/name@{first}", "org/name@main"))
        repo.push({"config.json": b'{"new": 1}', "model.safetensors": weights(2, 64)})
        second = repo.find("main")
        warm(daemon, "org/name")
        bed.api.wait(bed.shows("org/name", f"org/name@{first}", f"org/name@{second}"))
        assert len(bed.labels) == 3
        done = daemon.cli("warm", bed.origin("one"), "--as", "some/alias")
        assert done.returncode == 0, done.stderr
        bed.api.wait(bed.shows("some/alias", f"file://{bed.place}/origin/one"))
        for ref in ("org/name", f"org/name@{first}", "some/alias"):
            assert daemon.cli("affinity", ref, "--label").stdout.strip().removesuffix("=ready") in bed.labels


def test_labels_of_an_earlier_daemon_stand_until_it_is_known_what_is_here(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(bed.config))
    monkeypatch.setattr(reading, "GRACE", 2.0)
    stale = label_of(parse_ref("a/b"))
    with bed.api.writing():
        bed.node["metadata"]["labels"][stale] = "ready"
    run_directory = bed.place / "run" / "disks"
    flags = {"store": bed.place / "store", "socket": bed.place / "s", "kubernetes": True, "node_name": NODE, "follow": True, "workers": 1}
    given = settings.load(flags={**flags, "run_directory": run_directory}, environ={}, uid=1000)

    async def test() -> None:
        engine = Engine(given, FollowedFile(run_directory))
        await engine.start()
        began = time.monotonic()
        following = asyncio.create_task(signals.follow(given, engine))
        try:
            await asyncio.to_thread(bed.api.wait, lambda: bed.condition, 40)
            assert time.monotonic() - began >= 2
            assert stale not in bed.labels
            assert "stripe.json is not there" in bed.condition["message"]
        finally:
            following.cancel()
            await asyncio.wait({following}, timeout=5)
            await engine.stop()

    monkeypatch.setattr(signals, "LOOK", 0.2)
    run(test())


def test_by_itself_it_reads_the_node_anew_beats_and_withdraws_a_model_whose_bytes_went_bad(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(bed.config))
    monkeypatch.setattr(signals, "LOOK", 0.2)
    monkeypatch.setattr(signals, "RESYNC", 1.0)
    one = bed.origin("one")
    flags = {"store": bed.place / "store", "socket": bed.place / "s", "kubernetes": True, "node_name": NODE, "workers": 1, "lanes": 1}
    given = settings.load(flags=flags, environ={}, uid=1000)

    async def test() -> None:
        engine = Engine(given)
        await engine.start()
        following = asyncio.create_task(signals.follow(given, engine))
        try:
            model = await ready(engine, one)
            await asyncio.to_thread(bed.api.wait, bed.shows(one))
            with bed.api.writing():  # somebody takes the label away
                bed.node["metadata"]["labels"].pop(label_of(parse_ref(one)))
            await asyncio.to_thread(bed.api.wait, bed.shows(one))
            beats = {bed.condition["lastHeartbeatTime"]}
            await asyncio.to_thread(bed.api.wait, lambda: bed.condition["lastHeartbeatTime"] not in beats)
            (bed.place / "origin" / "one").rename(bed.place / "origin" / "away")
            os.truncate(Path(model.path or "") / "model.safetensors", 10)
            await asyncio.to_thread(bed.api.wait, bed.shows())
        finally:
            following.cancel()
            await asyncio.wait({following}, timeout=5)
            await engine.stop()

    run(test())


# -- the disks


def test_why_disks_are_refused_is_in_describe_node(bed: Bed, tmp_path: Path) -> None:
    daemon, disks = followed(bed)
    reason = "1 of 1 disks is refused, and require_all is set"
    disks.say(StripeStatus.ABSENT, "N03", reason, details={"case": "C10", "disks": [DISK], "remedy": "free the disk"})
    with daemon:
        bed.api.wait(lambda: bed.condition and bed.reasons())
        assert (bed.condition["status"], bed.condition["reason"]) == ("False", "N03")
        bed.api.tokens.add("person")
        bed.api.rights |= READING
        (tmp_path / "person").write_text("person")
        config = bed.api.kubeconfig(tmp_path / "person.config", tmp_path / "person")
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": str(config)}

        def person(*arguments: str) -> str:
            done = subprocess.run([KUBECTL, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert NODE in person("get", "nodes")
        told = person("describe", "node", NODE)
        conditions, events = told.partition("\nEvents:")[::2]
        assert "NvcacheStripe" in conditions
        for part in (conditions, events):
            for word in ("N03", reason, DISK["node"], "D07", DISK["reason"]):
                assert word in part, (word, told)
        assert "what to do: free the disk" in conditions
        assert "DisksRefused" in events


def test_a_lost_cache_is_told_its_labels_go_and_the_rebuilt_one_is_told(bed: Bed) -> None:
    one = bed.origin("one")
    daemon, disks = followed(bed)
    disks.mounted(bed.place / "a" / "store", "uuid-1", backend="md", filesystem="xfs", members=["/dev/a", "/dev/b"], mount=str(bed.place / "a"))
    with daemon:
        bed.api.wait(lambda: bed.condition.get("status") == "True")
        assert "md of 2 disks with xfs" in bed.condition["message"]
        warm(daemon, one)
        bed.api.wait(bed.shows(one))
        (bed.place / "origin" / "one").rename(bed.place / "origin" / "away")
        disks.say(StripeStatus.WITHDRAWING, "R01", "/dev/a (serial A1) vanished")
        bed.api.wait(bed.shows())
        disks.say(StripeStatus.LOST, "R01", "/dev/a (serial A1) vanished")
        bed.api.wait(lambda: "CacheLost" in bed.reasons())
        bed.api.wait(lambda: bed.condition["status"] == "False" and "/dev/a" in bed.condition["message"])
        disks.mounted(bed.place / "b" / "store", "uuid-2", backend="md", filesystem="xfs", members=["/dev/b"], mount=str(bed.place / "b"))
        bed.api.wait(lambda: "CacheRebuilt" in bed.reasons() and bed.condition["status"] == "True")
        assert not bed.labels
    lost = next(event for event in bed.api.events.values() if event["reason"] == "CacheLost")
    assert lost["type"] == "Warning"
    assert lost["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": f"uid-of-{NODE}"}
    assert "/dev/a (serial A1) vanished" in lost["message"]
    assert lost["metadata"]["namespace"] == "default"


def test_a_directory_that_is_refused_is_told_though_no_daemon_comes_up(bed: Bed) -> None:
    with bed.api.writing():
        bed.node["metadata"]["labels"][label_of(parse_ref("a/b"))] = "ready"
    daemon = bed.daemon("--backend=directory", "--store=/etc/nvcache-store")
    with pytest.raises(AssertionError, match="P01"):
        daemon.start()
    assert (bed.condition["status"], bed.condition["reason"]) == ("False", "P01")
    assert "/etc" in bed.condition["message"]
    assert bed.reasons() == ["DisksRefused"]
    assert not bed.labels
    with pytest.raises(AssertionError, match="P01"):
        daemon.start()
    assert bed.reasons() == ["DisksRefused"], "a daemon that is started again and again tells it once"


# -- models that fail, and the taint


def test_the_taint_goes_once_all_declared_models_are_ready_and_no_other_taint(bed: Bed) -> None:
    here, later = bed.origin("here"), f"file://{bed.place}/origin/later"
    with bed.api.writing():
        bed.node["spec"]["taints"] = [SKU, TAINT, {**TAINT, "effect": "NoExecute"}]
    with bed.daemon(bed.declare(here, later)) as daemon:
        bed.api.wait(bed.shows(here))
        bed.api.wait(lambda: "ModelFailed" in bed.reasons())
        assert len(bed.node["spec"]["taints"]) == 3, "one of two is missing"
        failed = [event for event in bed.api.events.values() if event["reason"] == "ModelFailed"]
        assert len(failed) == 1
        assert later in failed[0]["message"]
        make_model(bed.place / "origin" / "later")
        warm(daemon, later)  # sooner than its next try
        bed.api.wait(lambda: bed.node["spec"]["taints"] == [SKU])
        assert bed.shows(here, later)()


@pytest.mark.parametrize("times", [1, 5])
def test_a_conflict_over_the_taints_loses_nobodys_change(bed: Bed, times: int) -> None:
    with bed.api.writing():
        bed.node["spec"]["taints"] = [TAINT]
    added: list[dict[str, str]] = []

    def somebody(resource: str, body: dict[str, Any]) -> None:
        """Faster than us: after we read the node, and before we write its taints."""
        if resource == "nodes" and "spec" in body and len(added) < times:
            added.append({"key": f"node.kubernetes.io/{len(added)}", "effect": "NoSchedule"})
            with bed.api.writing():
                bed.node["spec"]["taints"].append(added[-1])

    bed.api.meddle = somebody
    with bed.daemon() as daemon:
        bed.api.wait(lambda: bed.node["spec"]["taints"] == added and len(added) == times)
        assert [request.status for request in bed.api.requests].count(409) == times
        assert ("cannot tell the cluster" in daemon.last_words(None)) is (times > 3), "a conflict is nothing to complain of, a lasting one is"


def test_a_node_that_may_not_be_read_again_after_a_conflict_is_told_of_what_comes(bed: Bed) -> None:
    one = bed.origin("one")
    with bed.api.writing():
        bed.node["spec"]["taints"] = [TAINT]

    def somebody(resource: str, body: dict[str, Any]) -> None:
        """Changes the node before the taint can be written, and takes the right to read it."""
        if resource == "nodes" and "spec" in body:
            bed.api.rights.discard(("get", "nodes"))
            with bed.api.writing():
                bed.node["spec"]["taints"] = [TAINT, SKU]

    bed.api.meddle = somebody
    with bed.daemon() as daemon:
        daemon.wait_for_log("cannot tell the cluster (node)")
        warm(daemon, one)
        bed.api.wait(bed.shows(one))
        assert bed.node["spec"]["taints"] == [TAINT, SKU]
