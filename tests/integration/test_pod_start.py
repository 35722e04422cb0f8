"""What a pod's containers do with nvcache, as processes against a real daemon: an init container's `warm`, then the sidecar's `hold`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvcache.client import Client, Problem
from tests.support.daemon import DaemonProcess
from tests.support.hub import HubServer, Kind, Repo
from tests.support.models import make_llama
from tests.support.pod import in_pod, pods_place

MODEL, SLOW, GATED = "acme/tiny", "acme/slow", "acme/gated"
POD = {"POD_NAMESPACE": "default", "POD_NAME": "vllm-0"}
LIMITS = {"max_bytes": "2GB", "workers": 1}
SECONDS = 30


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    made = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(("tiny", "slow", "gated")):
        make_llama(made / name, 2_000_000, shards=2, seed=seed)
    files = {file.name: file for file in (made / "gated").iterdir()}
    repos = {MODEL: Repo.of_directory(made / "tiny"), SLOW: Repo.of_directory(made / "slow"), GATED: Repo(files, gated=True, granted=False)}
    with HubServer(repos) as server:
        yield server


@pytest.fixture(scope="module")
def daemon(hub: HubServer) -> Iterator[DaemonProcess]:
    """One whose pods' socket is for pods only."""
    with (
        tempfile.TemporaryDirectory(prefix="nvc-") as place,
        DaemonProcess(Path(place), hub.url, **LIMITS, admin_socket=f"{place}/admin.sock") as node,
    ):
        yield node


@pytest.fixture
def admin(daemon: DaemonProcess) -> Iterator[Client]:
    """The admin socket; leases that a test left are ended."""
    client = Client(f"unix://{daemon.place}/admin.sock")
    yield client
    for lease in leases(client):
        client.request("DELETE", f"/v1/models/{lease['entry']}/leases/{lease['lease']}")


@contextmanager
def running(daemon: DaemonProcess, *arguments: str, first: bool = False, **env: str) -> Iterator[Process]:
    """A command under way; killed at the end if it is still there. `first`: as the first process of a PID namespace, as in a container."""
    log = daemon.place / "command.log"
    command = [*(["unshare", "--pid", "--fork", "--kill-child"] if first else []), sys.executable, "-m", "nvcache", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**daemon.environment, **POD, **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield Process(process, log, first)
    finally:
        process.kill()
        process.wait()


class Process:
    """A command under way and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, first: bool) -> None:
        self._process, self._log, self._first = process, log, first

    def told(self, text: str, times: int = 1) -> str:
        """All it said, once `text` has come so often."""
        until = time.monotonic() + SECONDS
        while (said := self._log.read_text()).count(text) < times:
            assert time.monotonic() < until, f"{text!r} did not come {times} times:\n{said}"
            assert self._process.poll() is None, f"it ended with {self._process.returncode}:\n{said}"
            self._pause()
        return said

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send it a signal; its exit code and all it said."""
        pid = self._process.pid
        if self._first:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        os.kill(pid, number)
        return self._process.wait(SECONDS), self._log.read_text()

    def ended(self) -> int:
        """Its exit code, once it has come to its end."""
        return self._process.wait(SECONDS)

    def _pause(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.02)


def leases(admin: Client) -> list[dict[str, str]]:
    found: list[dict[str, str]] = admin.request("GET", "/v1/leases")["leases"]
    return found


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, bounded."""
    end = time.monotonic() + SECONDS
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        pause.wait(0.02)


def test_a_lease_outlives_the_init_container_and_is_the_sidecar_s_until_it_ends(daemon: DaemonProcess, admin: Client) -> None:
    warmed = daemon.cli("warm", MODEL, "--lease", "--page-cache", "--ttl", "300", "--json", **POD)
    assert warmed.returncode == 0, warmed.stderr
    found = json.loads(warmed.stdout)
    assert found["page_cache"]["bytes"] > 1_900_000
    assert "held as default/vllm-0" in warmed.stderr
    (left,) = leases(admin)
    assert left["holder"].startswith(f"uid={os.getuid()}/pid=")
    assert left["holder"].endswith("/default/vllm-0")
    again = daemon.cli("warm", MODEL, "--lease", **POD)  # an init container that is run again leaves no second one
    assert (again.returncode, len(leases(admin))) == (0, 1)
    with running(daemon, "hold", MODEL, "--ttl", "60", first=True) as sidecar:
        sidecar.told(f"holding {MODEL} as default/vllm-0: {found['path']}")
        (held,) = leases(admin)
        assert (held["lease"] != left["lease"], held["holder"] != left["holder"]) == (True, True)
        with pytest.raises(Problem, match="default/vllm-0"):
            admin.request("DELETE", f"/v1/models/{found['entry']}")
        code, said = sidecar.end()
    assert (code, said.splitlines()[-1], leases(admin)) == (0, f"nvcache: released {MODEL}", [])


def test_a_pod_that_ends_late_leaves_the_next_of_its_name_held(daemon: DaemonProcess, admin: Client) -> None:
    """As a pod of a StatefulSet that was deleted with force."""
    assert daemon.cli("warm", MODEL).returncode == 0
    with running(daemon, "hold", MODEL, "--ttl", "60") as old:
        old.told("holding")
        old_lease = leases(admin)[0]["lease"]
        assert daemon.cli("warm", MODEL, "--lease", **POD).returncode == 0
        (new,) = leases(admin)
        assert new["lease"] != old_lease
        assert old.end()[0] == 0
        assert leases(admin) == [new]


def test_what_is_held_by_name_is_what_the_name_means(daemon: DaemonProcess, admin: Client, hub: HubServer) -> None:
    """And not the revision that another pod asked for last."""
    entry = json.loads(daemon.cli("warm", MODEL, "--json").stdout)["entry"]
    hub.repos[MODEL].push({"config.json": b"{}"}, "other")
    assert json.loads(daemon.cli("warm", f"{MODEL}@other", "--json").stdout)["entry"] != entry
    with running(daemon, "hold", MODEL) as sidecar:
        sidecar.told("holding")
        assert [lease["entry"] for lease in leases(admin)] == [entry]
        assert sidecar.end()[0] == 0


def test_a_failed_start_leaves_no_lease(daemon: DaemonProcess, admin: Client) -> None:
    done = daemon.cli("warm", MODEL, "acme/none", "--lease", **POD)
    assert (done.returncode, leases(admin)) == (3, [])
    assert daemon.cli("warm", MODEL, "acme/none", "--lease", "--or-continue", **POD).returncode == 0
    assert len(leases(admin)) == 1


def test_hold_waits_for_a_model_and_outlives_the_daemon(daemon: DaemonProcess, admin: Client) -> None:
    assert daemon.cli("warm", MODEL).returncode == 0
    assert daemon.stop() == 0
    with running(daemon, "hold", MODEL, SLOW, "--ttl", "3") as sidecar:
        sidecar.told(f"cannot hold {MODEL} just now: cannot reach the nvcache daemon at unix://{daemon.socket}: No such file or directory")
        daemon.start()
        sidecar.told(f"holding {MODEL} as default/vllm-0")
        sidecar.told(f"cannot hold {SLOW} just now: cannot find model hf://{SLOW}")
        assert daemon.cli("warm", SLOW).returncode == 0
        sidecar.told(f"holding {SLOW}")
        before = {lease["lease"] for lease in leases(admin)}
        assert len(before) == 2
        daemon.kill()
        sidecar.told("cannot reach", times=4)  # both meet a socket that nobody listens on
        daemon.start()
        sidecar.told("holding", times=4)
        assert {lease["lease"] for lease in leases(admin)} == before
        assert sidecar.end(signal.SIGINT)[0] == 0
    assert leases(admin) == []


def test_hold_says_what_becomes_of_its_model_and_goes_on(daemon: DaemonProcess, admin: Client, hub: HubServer) -> None:
    """Withdrawn while its bytes are bad; then gone with its lease, and there again."""
    path = Path(daemon.cli("warm", SLOW).stdout.strip())
    with running(daemon, "hold", SLOW, "--ttl", "1") as sidecar:
        sidecar.told("holding", times=1)
        stalled = hub.faults.add("*model-00001*", Kind.STALL, times=None, origin="cdn", seconds=60)
        next(path.glob("model-00001*")).resolve().unlink()
        sidecar.told("what is open stays so, the daemon brings it back")
        hub.faults.clear()
        stalled.released.set()
        until(lambda: admin.model(SLOW).ready)
        sidecar.told("holding", times=3)
        (held,) = leases(admin)
        admin.request("DELETE", f"/v1/models/{held['entry']}/leases/{held['lease']}")
        sidecar.told("holding")  # it takes another one; so the removal may have to be tried again
        until(lambda: removed(admin, held["entry"]))
        sidecar.told("cannot find model")
        assert daemon.cli("warm", SLOW).returncode == 0
        sidecar.told("holding", times=4)
        assert sidecar.end()[0] == 0


def removed(admin: Client, entry: str) -> bool:
    """Whether a model that is held again and again is gone."""
    try:
        for lease in leases(admin):
            admin.request("DELETE", f"/v1/models/{entry}/leases/{lease['lease']}")
        admin.request("DELETE", f"/v1/models/{entry}")
    except Problem as problem:
        return problem.code == "unknown-model"
    return True


def test_hold_ends_when_it_is_told_to_though_the_daemon_does_not_answer(daemon: DaemonProcess, admin: Client) -> None:
    assert daemon.cli("warm", MODEL).returncode == 0
    assert daemon.process is not None
    with running(daemon, "hold", MODEL, "--ttl", "60") as sidecar:
        sidecar.told("holding")
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            code, said = sidecar.end()
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
    assert code == 0
    assert said.endswith("the daemon does not answer: the leases are not released, they run out by themselves\n")


def test_hold_of_a_name_that_cannot_be_read_is_no_crash_loop(daemon: DaemonProcess) -> None:
    with running(daemon, "hold", "/models/mine") as sidecar:
        sidecar.told("cannot hold")
        assert sidecar.end()[0] == 0


def test_sigterm_ends_an_init_container_and_not_the_fill(daemon: DaemonProcess, admin: Client, hub: HubServer) -> None:
    daemon.cli("rm", SLOW, "--socket", str(daemon.place / "admin.sock"))
    stalled = hub.faults.add("*model-00001*", Kind.STALL, times=None, origin="cdn", seconds=60)
    with running(daemon, "warm", SLOW, "--lease", "--or-continue", first=True) as init:
        init.told("fetching")
        code, said = init.end()
    assert code == 130
    assert "stopped waiting; the fill goes on" in said
    assert "Traceback" not in said
    hub.faults.clear()
    stalled.released.set()
    assert daemon.cli("warm", SLOW).returncode == 0
    assert leases(admin) == []


def test_a_pod_that_can_do_without_starts_in_any_case(daemon: DaemonProcess, hub: HubServer, tmp_path: Path) -> None:
    file = tmp_path / "env"
    nowhere = {"NVCACHE_SOCKET": f"{tmp_path}/run/nvcache.sock"}
    for ref, env, why in (
        (MODEL, nowhere, f"(daemon-unreachable): cannot reach the nvcache daemon at unix://{tmp_path}/run/nvcache.sock: No such file or directory; "),
        ("acme/none", {}, "(repository-not-found): "),
        (GATED, {}, "(gated): "),
        ("/models/mine", {}, "(bad-reference): "),
        ("", {}, "(bad-reference): "),
        (MODEL, {"NVCACHE_URL": "ftp://x"}, "(bad-config): "),
    ):
        file.write_text("NVCACHE_MODEL=/old\n")
        done = daemon.cli("warm", ref, "--lease", "--or-continue", "--wait-daemon", "0.2", "--env-file", str(file), **POD, **env)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"nvcache: going on without the cache {why}"), last
        assert file.read_text() == ""
    stalled = hub.faults.add("*", Kind.STALL, times=None, origin="cdn", seconds=60)
    daemon.cli("rm", SLOW, "--socket", str(daemon.place / "admin.sock"))
    late = daemon.cli("warm", SLOW, "--or-continue", "--timeout", "1")
    hub.faults.clear()
    stalled.released.set()
    assert late.returncode == 0
    assert "going on without the cache (timeout): cannot wait longer for acme/slow: 1 s are over and it is" in late.stderr
    unwritable = daemon.cli("warm", MODEL, "--env-file", f"{tmp_path}/not/env")
    assert (unwritable.returncode, unwritable.stdout) == (2, "")
    assert f"cannot write {tmp_path}/not/env: No such file or directory" in unwritable.stderr


def test_a_daemon_that_comes_late_is_waited_for(daemon: DaemonProcess) -> None:
    assert daemon.cli("warm", MODEL).returncode == 0
    for required in ("--required", "--lease"):
        assert daemon.stop() == 0
        with running(daemon, "warm", MODEL, required) as init:
            init.told("waiting for the daemon: cannot reach the nvcache daemon")
            daemon.start()
            assert init.ended() == 0


def test_the_variables_are_a_shell_s(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "env"
    done = daemon.cli("warm", MODEL, "--env-file", str(file))
    assert done.returncode == 0, done.stderr
    told = subprocess.run(["sh", "-c", f"set -a; . {file}; env"], capture_output=True, text=True, check=True, env={}).stdout.splitlines()
    assert {line for line in told if not line.startswith("PWD=")} == {
        f"NVCACHE_MODEL={done.stdout.strip()}",
        f"HF_HUB_CACHE={daemon.store}/hub",
        "HF_HUB_OFFLINE=1",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["env"]


@dataclass(frozen=True)
class Pods:
    """A node as another user's pods meet it: where its socket and its store are, and where it has the model in both views."""

    place: Path
    env: dict[str, str]
    model: str
    snapshot: str


@pytest.fixture(scope="module")
def pods(hub: HubServer) -> Iterator[Pods]:
    with pods_place() as place, DaemonProcess(place, hub.url, **LIMITS) as daemon:
        warmed = daemon.cli("warm", MODEL, "--json")
        assert warmed.returncode == 0, warmed.stderr
        found = json.loads(warmed.stdout)
        snapshot = f"{found['hub_cache']}/models--acme--tiny/snapshots/{found['revision']}"
        yield Pods(place, {"NVCACHE_SOCKET": str(daemon.socket), **POD}, found["path"], snapshot)


@pytest.mark.parametrize(
    ("mounted", "change", "told"),
    [
        (
            [],
            "",
            ["here, where it is ready on the node: No such file or directory", "hint: mount the node's {store}/models read-only at the same path"],
        ),
        ([], "mkdir models", ["No such file or directory", "hint: {store}/models is here without it, so it was mounted before the node's disks"]),
        (["models"], "chmod 0700 models", ["Permission denied", "hint: uid 65534 needs to pass {store}/models"]),
        (["models"], "chmod 0700 .", ["Permission denied", "hint: uid 65534 needs to pass {store}/models"]),
        (["models"], "chmod -R o-r models", ["Permission denied", "hint: uid 65534 needs to pass {store}/models and read below it"]),
    ],
)
def test_what_a_pod_cannot_read_is_told_before_its_engine_starts(pods: Pods, mounted: list[str], change: str, told: list[str]) -> None:
    done = warm_in_pod(pods, mounted, change)
    assert (done.returncode, done.stdout) == (12, "")
    assert f"nvcache: cannot read {pods.model}" in done.stderr
    for text in told:
        assert text.format(store=pods.place / "store") in done.stderr
    assert (pods.place / "pod" / "env").read_text() == ""


@pytest.mark.parametrize(("mounted", "view"), [(["models"], "model"), (["hub"], "snapshot"), (["models", "hub"], "model")])
def test_a_pod_is_given_the_view_that_it_mounts(pods: Pods, mounted: list[str], view: str) -> None:
    done = warm_in_pod(pods, mounted)
    seen = {"model": pods.model, "snapshot": pods.snapshot}[view]
    assert (done.returncode, done.stdout) == (0, f"{seen}\n"), done.stderr
    assert "into the page cache" in done.stderr
    lines = (pods.place / "pod" / "env").read_text().splitlines()
    assert lines == [f"NVCACHE_MODEL={seen}", *([f"HF_HUB_CACHE={pods.place}/store/hub", "HF_HUB_OFFLINE=1"] if "hub" in mounted else [])]


@pytest.mark.parametrize(("directory", "code"), [("", 0), ("pod", 9)])
def test_the_socket_is_where_pods_mount_it_also_before_the_daemon(pods: Pods, directory: str, code: int) -> None:
    mounted = f'mount -t tmpfs tmpfs /run; mkdir /run/nvcache; mount --bind "{pods.place / directory}" /run/nvcache'
    done = in_pod(pods.place, ["nvcache", "warm", MODEL], POD, node=mounted)
    assert done.returncode == code, done.stderr
    assert ("at unix:///run/nvcache/nvcache.sock: No such file" in done.stderr) == bool(code)


def warm_in_pod(pods: Pods, mounted: list[str], change: str = "") -> subprocess.CompletedProcess[str]:
    """An init container of another user that has only these directories of the store, `change`d by root before."""
    copies = "".join(f'cp -a "{pods.place}/store/{name}" .; ' for name in mounted)
    node = f'mkdir "$scratch/seen"; chmod 0755 "$scratch/seen"; cd "$scratch/seen"; {copies}{change}\nmount --bind . "{pods.place}/store"'
    return in_pod(pods.place, ["nvcache", "warm", MODEL, "--lease", "--page-cache", "--env-file", "env"], pods.env, node=node)
