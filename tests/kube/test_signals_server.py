"""The Node's signals while the API server conflicts, refuses, throttles, hangs, lies and goes away: serving goes on, and it is told again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.api.harness import UnixConnection, ask
from tests.kube.signalled import NODE, Bed, warm
from tests.support.kubeapi import RIGHTS, Fault
from tests.support.tls import make_tls


def test_it_serves_and_stops_in_time_while_the_api_server_hangs(bed: Bed) -> None:
    bed.api.faults.append(Fault(None, times=100))
    one = bed.origin("one")
    with bed.daemon() as daemon:
        warm(daemon, one)
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 5
    assert not bed.labels


def test_an_api_server_that_is_away_is_told_once_and_found_again(bed: Bed) -> None:
    bed.api.stop()
    one = bed.origin("one")
    with bed.daemon() as daemon:
        warm(daemon, one)
        daemon.wait_for_log("cannot tell the cluster (node)")
        bed.api.start()
        bed.api.wait(bed.shows(one), 60)
        daemon.wait_for_log("can be told again")
        assert daemon.last_words(None).count("cannot tell the cluster") == 1
        metrics = ask(UnixConnection(daemon.socket), "GET", "/metrics").data.decode()
        assert "\nnvcache_signal_failures_total 0.0" not in metrics
        assert "\nnvcache_signal_failures_total " in metrics


@pytest.mark.parametrize(("status", "times", "asked"), [(429, 1, 2), (503, 3, 0)])
def test_it_comes_back_after_a_throttle_or_failures_and_not_before_it_was_asked_to(bed: Bed, status: int, times: int, asked: int) -> None:
    headers = (("Retry-After", str(asked)),) if asked else ()
    bed.api.faults.append(Fault(status, "patch", "nodes", times, headers))
    one = bed.origin("one")
    with bed.daemon() as daemon:
        bed.api.wait(lambda: bed.api.count("patch", "nodes") == 1)
        began = time.monotonic()
        warm(daemon, one)
        bed.api.wait(bed.shows(one), 60)
        assert time.monotonic() - began > asked - 1
        refused = [request.status for request in bed.api.requests if (request.verb, request.resource) == ("patch", "nodes")]
        assert refused[:times] == [status] * times
        assert daemon.last_words(None).count("cannot tell the cluster") == 1


@pytest.mark.parametrize("missing", [("create", "events"), ("patch", "nodes/status"), ("patch", "nodes")])
def test_what_it_has_no_right_to_holds_up_nothing_else(bed: Bed, missing: tuple[str, str]) -> None:
    bed.api.rights = set(RIGHTS) - {missing}
    one = bed.origin("one")
    with bed.daemon(bed.declare("file:///nowhere/at-all")) as daemon:
        warm(daemon, one)
        daemon.wait_for_log("forbidden")
        if missing != ("patch", "nodes"):
            bed.api.wait(bed.shows(one))
        if missing != ("patch", "nodes/status"):
            bed.api.wait(lambda: bed.condition)
        if missing != ("create", "events"):
            bed.api.wait(lambda: "ModelFailed" in bed.reasons())
        warm(daemon, bed.origin("two", 2))
        refused = [request for request in bed.api.requests if (request.verb, request.resource) == missing]
        assert len(refused) == 1, "a refusal for want of rights is not asked for again at each change"
        assert daemon.last_words(None).count("cannot tell the cluster") == 1


def test_a_node_that_is_not_there_disturbs_nothing(bed: Bed) -> None:
    one = bed.origin("one")
    with bed.daemon(node_name="somebody-elses") as daemon:
        warm(daemon, one)
        daemon.wait_for_log("not found")
        assert daemon.last_words(None).count("cannot tell the cluster") == 1


def test_a_rotated_token_is_read_and_a_wrong_one_is_told_once(bed: Bed) -> None:
    one, two = bed.origin("one"), bed.origin("two", 1)
    with bed.daemon() as daemon:
        warm(daemon, one)
        bed.api.wait(bed.shows(one))
        bed.token.write_text("second")
        bed.api.tokens = {"second"}
        warm(daemon, two)
        bed.api.wait(bed.shows(one, two))
        assert "cannot tell the cluster" not in daemon.last_words(None), "a rotated token is nothing to complain of"
        bed.api.tokens = {"third"}
        assert daemon.cli("rm", two).returncode == 0
        daemon.wait_for_log("401")
        bed.token.unlink()
        bed.token.write_text("third")
        bed.api.wait(lambda: not bed.shows(two)(), 60)
        log = daemon.last_words(None)
        assert not any(token in log for token in ("first", "second", "third"))


def test_a_ca_that_did_not_sign_the_server_is_told_and_a_new_one_is_read(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ca = tmp_path / "ca.crt"
    ca.write_bytes(make_tls(tmp_path / "other").cert.read_bytes())
    bed.api.kubeconfig(bed.config, bed.token, ca)
    one = bed.origin("one")
    with bed.daemon() as daemon:
        warm(daemon, one)
        daemon.wait_for_log("CERTIFICATE_VERIFY_FAILED")
        assert bed.api.count() == 0
        ca.write_bytes(bed.api.tls.cert.read_bytes())
        bed.api.wait(bed.shows(one), 60)


@pytest.mark.parametrize(
    "body", [b"<html>a captive portal</html>", b"[1]", b"", b'{"a":' + b"[" * 100_000], ids=["html", "list", "nothing", "brackets"]
)
def test_an_answer_that_is_no_kubernetes_object_is_survived(bed: Bed, body: bytes) -> None:
    bed.api.faults.append(Fault(200, "get", "nodes", 1, (), body))
    bed.api.faults.append(Fault(500, "get", "nodes", 1, (), body))
    one = bed.origin("one")
    with bed.daemon() as daemon:
        warm(daemon, one)
        bed.api.wait(bed.shows(one), 60)
        assert "unexpectedly" not in daemon.last_words(None)


def test_proxies_of_the_sources_are_not_asked_for_the_api_server(bed: Bed) -> None:
    daemon = bed.daemon()
    daemon.environment["HTTPS_PROXY"] = "http://127.0.0.1:9"
    with daemon:
        bed.api.wait(lambda: bed.condition)


def test_in_a_pod_it_uses_the_service_account(bed: Bed) -> None:
    """Where the kubelet puts it, in a mount namespace with a /run of its own; a KUBECONFIG does not count then."""
    account = "/run/secrets/kubernetes.io/serviceaccount"
    steps = f"""
        mount -t tmpfs none /run; mkdir -p {account}
        cp {bed.token} {account}/token; cp {bed.api.tls.cert} {account}/ca.crt; echo nvcache > {account}/namespace
        exec {sys.executable} -c 'import asyncio; from nvcache.kubernetes.server import ApiServer; print(asyncio.run(ApiServer("{NODE}").node()).uid)'
    """
    variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(bed.api.port), "KUBECONFIG": "/nowhere"}
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(["unshare", "--mount", "sh", "-euc", steps], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == f"uid-of-{NODE}", done.stderr


def test_without_a_cluster_it_serves(bed: Bed) -> None:
    one = bed.origin("one")
    daemon = bed.daemon()
    daemon.environment["KUBECONFIG"] = str(bed.place / "nowhere")
    with daemon:
        warm(daemon, one)
        daemon.wait_for_log("cannot tell the cluster (node)")


def test_without_the_client_library_the_extra_is_named(bed: Bed) -> None:
    daemon = bed.daemon()
    (bed.place / "lightkube.py").write_text("raise ModuleNotFoundError(\"No module named 'lightkube'\", name='lightkube')")
    daemon.environment["PYTHONPATH"] = str(bed.place)
    with pytest.raises(AssertionError, match=r"nvcache\[kubernetes\]"):
        daemon.start()


def test_a_quiet_node_is_left_alone(bed: Bed) -> None:
    one = bed.origin("one")
    with bed.daemon() as daemon:
        warm(daemon, one)
        bed.api.wait(bed.shows(one))
        bed.api.wait(lambda: bed.condition)
        for _ in range(3):
            assert daemon.cli("path", one).returncode == 0
            assert daemon.cli("verify", one).returncode == 0
    patches = [request.body for request in bed.api.requests if request.verb == "patch"]
    assert len(patches) <= 4, patches
