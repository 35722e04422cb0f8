"""The pods of the manifests, really run: the daemon's of the overlay `directory`, and those of model pods with a loader in the engine's place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.cli.exits import Exit
from tests.kube.playing import DIRECTORY, PLAY_SECONDS, Playing, eventually, playing
from tests.support.hub import HubServer, Kind, Repo
from tests.support.kubeplay import pod_spec, workload
from tests.support.kubetools import ROOT, Object, kustomize, objects
from tests.support.models import make_llama
from tests.support.podman import Podman

MIB = 1 << 20
SLOW = 48 * MIB  # about
LEASES = (
    "import json, nvcache.client as c; print(json.dumps(c.Client('unix:///run/nvcache-admin/admin.sock').request('GET', '/v1/leases')['leases']))"
)
ENGINE = 1000  # the engine's user and group
DAEMON = "nvcache-nvcache"  # as podman calls the container of that name in the pod of that name


@pytest.fixture(scope="module")
def daemonset() -> list[Object]:
    """The overlay `directory`, rendered."""
    return kustomize(ROOT / "deploy/daemonset/overlays/directory")


@pytest.fixture(scope="module")
def node(podman: Podman, daemonset: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playing]:
    """A node with the daemon's pod, ready."""
    repos = {}
    for seed, (name, size, shards) in enumerate((("first", 4, 2), ("kept", 1, 1), ("shared", 4, 2), ("slow", SLOW // MIB, 3), ("away", 1, 1))):
        source = tmp_path_factory.mktemp(name)
        make_llama(source, size * MIB, shards=shards, seed=seed)
        repos[f"acme/{name}"] = Repo.of_directory(source)
    repos["acme/gated"] = Repo({"model.safetensors": b"secret"}, gated=True, granted=False)
    with tempfile.TemporaryDirectory(prefix="nvc-") as folder, HubServer(repos) as hub, playing(podman, hub, Path(folder)) as node:
        program = node.node.path("/usr/local/bin/vllm")
        program.parent.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("engine.py"), program)
        node.played(daemonset, "nvcache")
        eventually(200, lambda: node.get("/readyz"))
        yield node


@pytest.fixture
def stopped_daemon(node: Playing) -> Iterator[None]:
    """Without the daemon's pod, for the length of a test."""
    node.podman("pod", "stop", "--time=15", "nvcache")
    yield
    node.podman("pod", "start", "nvcache")
    eventually(200, lambda: node.get("/readyz"))


def example(name: str, model: str, *warm: str) -> list[Object]:
    """A file of deploy/examples as one would adapt it to this node: the model, the overlay's host path, further options of `warm`.

    The engine's image is nvcache's, with a loader by the engine's name, and another user: real images would be gigabytes and need a GPU.
    """
    text = (ROOT / f"deploy/examples/{name}.yaml").read_text().replace("Qwen/Qwen3-0.6B", model)
    found = objects(text.replace("path: /var/lib/nvcache/mnt/", f"path: {DIRECTORY}/"))
    spec = pod_spec(workload(found, name))
    spec["initContainers"][0]["command"] += warm
    (engine,) = spec["containers"]
    engine["image"] = spec["initContainers"][0]["image"]
    engine["securityContext"] |= {"runAsUser": ENGINE, "runAsGroup": ENGINE}
    engine["resources"] = {}
    engine["volumeMounts"].append({"name": "engine", "mountPath": "/usr/local/bin/vllm", "readOnly": True})
    spec["volumes"].append({"name": "engine", "hostPath": {"path": "/usr/local/bin/vllm", "type": "File"}})
    return found


def weights(hub: HubServer, model: str) -> dict[str, str]:
    """The SHA-256 of each file of weights, as the Hub has them."""
    repo = hub.repos[model]
    return {path: str(blob.sha256) for path, blob in repo.commits[repo.names["main"]].items() if path.endswith(".safetensors")}


def holders(node: Playing) -> list[str]:
    """Who has a lease, as the operator sees it."""
    return [lease["holder"] for lease in json.loads(node.podman("exec", DAEMON, "python3", "-c", LEASES).stdout)]


def test_the_probes_of_the_daemons_pod_are_answered(node: Playing, daemonset: list[Object]) -> None:
    (container,) = pod_spec(workload(daemonset, "nvcache"))["containers"]
    probes = [container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [node.get(probe["path"]) for probe in probes] == [200, 200, 200]
    assert {probe["port"] for probe in probes} == {port["name"] for port in container["ports"]}


def test_the_network_gets_health_and_metrics_and_nothing_else(node: Playing) -> None:
    assert [node.get(path) for path in ("/version", "/metrics")] == [200, 200]
    assert {node.get(path) for path in ("/v1/models", "/v1/stripe", "/docs", "/")} <= {401, 403, 404}


def test_the_daemon_has_no_rights_and_no_writable_root(node: Playing) -> None:
    look = "id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; touch /opt/nvcache/x /etc/x 2>&1"
    said = node.podman("exec", DAEMON, "sh", "-c", look, check=False).stdout.split()
    assert said[:7] == ["65532", "CapEff:", "0000000000000000", "CapBnd:", "0000000000000000", "NoNewPrivs:", "1"]
    assert said.count("Read-only") == 2


def test_the_init_container_made_the_sockets_directory(node: Playing) -> None:
    run = node.node.path("/run/nvcache")
    assert [(path.stat().st_uid, path.stat().st_gid, oct(path.stat().st_mode & 0o7777)) for path in (run, run / "pods")] == [
        (0, 65532, "0o3775"),
        (65532, 65532, "0o2750"),
    ]
    assert oct((run / "pods/nvcache.sock").stat().st_mode & 0o777) == "0o660"
    assert [path.name for path in (run / "pods").iterdir()] == ["nvcache.sock"]


def test_exec_is_the_operator(node: Playing) -> None:
    """`kubectl exec … -- nvcache …` speaks to the admin socket, which no other pod can see."""
    asked = node.podman(
        "exec", DAEMON, "sh", "-c", "nvcache warm acme/kept && nvcache pin acme/kept && nvcache unpin acme/kept && nvcache rm acme/kept"
    )
    assert asked.stdout.startswith("/var/lib/nvcache/mnt/store/models/")
    assert list(node.node.root.rglob("admin.sock")) == []


def test_a_pod_warms_and_loads_and_its_sidecar_holds(node: Playing) -> None:
    """The engine is another user, reads through a read-only mount, and finds the model by its name."""
    node.played(example("vllm-hub", "acme/first"), "vllm-hub")
    assert node.ended("vllm-hub-vllm") == 0, node.logs("vllm-hub-vllm")
    found = json.loads(node.podman("logs", "vllm-hub-vllm").stdout)
    assert found == {
        "place": found["place"],
        "uid": ENGINE,
        "read_only": True,
        "sha256": weights(node.hub, "acme/first"),
    }
    assert found["place"].startswith("/var/lib/nvcache/mnt/store/hub/models--acme--first/snapshots/")
    eventually(["uid=65532/default/vllm-hub"], lambda: holders(node))
    node.podman("pod", "stop", "--time=10", "vllm-hub")
    eventually([], lambda: holders(node))


def test_a_pod_is_no_operator(node: Playing) -> None:
    node.played(example("vllm-hub", "acme/first"), "vllm-hub", pod="curious")
    done = node.podman("exec", "curious-hold", "nvcache", "rm", "acme/first", check=False)
    assert done.returncode != 0
    assert "this socket may only ask, warm and lease" in done.stderr


def test_the_second_pod_is_a_hit(node: Playing) -> None:
    for pod in ("one", "two"):
        node.played(example("vllm-directory", "acme/shared"), "vllm-directory", pod=pod)
        assert node.ended(f"{pod}-vllm") == 0, node.logs(f"{pod}-vllm")
        found = json.loads(node.podman("logs", f"{pod}-vllm").stdout)
        assert found["sha256"] == weights(node.hub, "acme/shared")
        assert found["place"].startswith("/var/lib/nvcache/mnt/store/models/")
        assert found["read_only"]
        if pod == "one":
            sent = len(node.hub.requests)
    assert [request for request in node.hub.requests[sent:] if request.file and request.sent] == []


def test_a_restart_of_the_daemon_amid_a_fill_costs_a_pod_time_only(node: Playing) -> None:
    """The pod is replaced, as in an update of the DaemonSet; what was there is not fetched again."""
    node.hub.faults.add("/acme/slow/*model-00002*", Kind.STALL, times=None, after=MIB, seconds=PLAY_SECONDS)
    with node.play(example("vllm-directory", "acme/slow"), "vllm-directory", pod="patient") as pod:
        eventually(True, lambda: node.hub.bytes_sent("model-00001-of-00003.safetensors") >= SLOW // 3)
        node.podman("pod", "stop", "--time=15", "nvcache")
        node.hub.faults.clear()
        node.podman("pod", "start", "nvcache")
        node.started(pod, "patient")
    assert node.ended("patient-vllm") == 0, node.logs("patient-vllm")
    assert json.loads(node.podman("logs", "patient-vllm").stdout)["sha256"] == weights(node.hub, "acme/slow")
    assert node.hub.bytes_sent("model-00001-of-00003.safetensors") < SLOW // 2


def test_without_a_daemon_an_opportunistic_pod_downloads_by_itself(node: Playing, stopped_daemon: None) -> None:
    node.played(example("vllm-opportunistic", "acme/away", "--wait-daemon=1"), "vllm-opportunistic")
    assert node.ended("vllm-opportunistic-vllm") == 0, node.logs("vllm-opportunistic-vllm")
    found = json.loads(node.podman("logs", "vllm-opportunistic-vllm").stdout)
    assert found["place"].startswith("/download/")
    assert found["sha256"] == weights(node.hub, "acme/away")
    assert "/run/nvcache/nvcache.sock" in node.logs("vllm-opportunistic-warm")


def test_without_a_daemon_a_pod_that_needs_it_does_not_start(node: Playing, stopped_daemon: None) -> None:
    with node.play(example("vllm-hub", "acme/away", "--wait-daemon=1"), "vllm-hub", pod="strict") as pod:
        node.refused(pod)
    assert node.ended("strict-warm") == Exit.DAEMON
    assert "/run/nvcache/nvcache.sock" in node.logs("strict-warm")
    assert node.logs("strict-vllm") == ""


def test_a_gated_model_without_a_token_says_so(node: Playing) -> None:
    with node.play(example("vllm-hub", "acme/gated"), "vllm-hub", pod="gated") as pod:
        node.refused(pod)
    assert node.ended("gated-warm") == Exit.REFUSED
    assert "token" in node.logs("gated-warm")
