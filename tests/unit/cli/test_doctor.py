"""doctor's checks on real directories and sockets, and what it makes of the daemon's answers."""

from __future__ import annotations

import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nvcache import __version__
from nvcache.cli import checks
from nvcache.cli.checks import Verdict
from nvcache.core.disk_codes import DISK_CODES, DiskCode
from nvcache.core.kaito import LACKS
from nvcache.settings import proxy_hosts
from tests.unit.cli.conftest import model


@pytest.fixture
def open_dir(tmp_path):
    """A directory whose parents other users can pass."""
    for step in (tmp_path, *tmp_path.parents):
        if step.stat().st_uid == os.geteuid() and step != Path("/"):
            step.chmod(step.stat().st_mode | 0o111)
    return tmp_path


@pytest.fixture
def hub_answer():
    """A Hub that answers one status, with its Date `skew` seconds off."""
    servers = []

    def start(status=200, date=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response_only(status)
                self.send_header("Date", date or self.date_time_string())
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join(10)


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_a_good_store(open_dir):
    found = by_check(checks.store(open_dir))
    assert found["store"].verdict is Verdict.OK
    assert found["hard links"].verdict is Verdict.OK
    assert found["readable by pods"].verdict is Verdict.OK
    assert found["file system"].detail
    assert list(open_dir.iterdir()) == []


def test_a_store_that_is_not_there_yet_is_fine_where_it_can_be_made(open_dir):
    found = by_check(checks.store(open_dir / "a" / "b"))
    assert found["store"].verdict is Verdict.OK
    assert "does not exist yet" in found["store"].detail
    assert list(open_dir.iterdir()) == []


def test_a_store_that_is_a_file_fails(tmp_path):
    (tmp_path / "file").write_text("")
    (only,) = checks.store(tmp_path / "file")
    assert only.verdict is Verdict.FAIL


def test_a_closed_parent_is_named_with_its_remedy(open_dir):
    closed = open_dir / "closed"
    (closed / "store").mkdir(parents=True)
    closed.chmod(0o700)
    found = by_check(checks.store(closed / "store"))["readable by pods"]
    assert found.verdict is Verdict.WARN
    assert str(closed) in found.detail
    assert f"chmod o+x {closed}" in found.remedy


def test_proc_is_no_local_disk():
    assert checks.file_system_of(Path("/proc")) == "proc"


def test_sockets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # socket paths are short
    assert checks.socket(Path("none.sock")).verdict is Verdict.WARN
    Path("file.sock").write_text("")
    assert checks.socket(Path("file.sock")).verdict is Verdict.FAIL
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s.sock")
        Path("s.sock").chmod(0o660)
        assert checks.socket(Path("s.sock")).verdict is Verdict.OK
        Path("s.sock").chmod(0o666)
        assert "everybody" in checks.socket(Path("s.sock")).detail


@pytest.mark.parametrize("status", [200, 401, 404])
def test_any_answer_means_that_the_hub_is_there(hub_answer, status):
    found = by_check(checks.hub(hub_answer(status), None, {}))
    assert found["hub"].verdict is Verdict.OK
    assert found["clock"].verdict is Verdict.OK


def test_a_clock_that_is_off_is_told(hub_answer):
    found = by_check(checks.hub(hub_answer(200, "Wed, 01 Jan 2020 00:00:00 GMT"), None, {}))["clock"]
    assert found.verdict is Verdict.WARN
    assert "ahead of" in found.detail


def test_a_hub_that_is_not_there_or_silent_is_a_warning_in_bounded_time(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert by_check(checks.hub(endpoint, None, {}))["hub"].verdict is Verdict.WARN
        monkeypatch.setattr(checks, "HUB_WAIT", 0.1)
        free.listen()
        assert by_check(checks.hub(endpoint, None, {}))["hub"].verdict is Verdict.WARN


def test_proxies_are_named_without_their_passwords():
    hosts = proxy_hosts(
        {"https": "http://user:se@cret@proxy.example:3128/x?y", "http": "plain.example:80", "all": "socks5://[::1", "no": "localhost"}
    )
    assert hosts == {"https": "proxy.example:3128", "http": "plain.example:80", "all": "[::1"}
    assert checks.proxy(hosts, True).detail.endswith("http via plain.example:80, all via [::1 with exceptions (NO_PROXY)")
    assert checks.proxy({}, False).detail == "none"


@pytest.fixture
def quiet_machine(monkeypatch, tmp_path, hub_answer):
    """An environment in which nothing but the daemon decides."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub_answer())
    monkeypatch.setenv("NVCACHE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_doctor_is_content_with_a_daemon_of_its_own_version(stub, run, quiet_machine, tmp_path):
    stub.answer("GET /version", {"version": __version__, "api": "v1"})
    stub.answer("GET /readyz", {"ready": True, "problems": []})
    stub.answer("GET /v1/stripe", {"path": str(tmp_path)})
    ran = run("doctor", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["ok"]) == (0, True)
    assert {"daemon", "store", "file system", "hub", "clock", "open files", "socket"} <= {finding["check"] for finding in found["findings"]}
    found = {finding["check"]: finding["detail"] for finding in found["findings"]}
    assert found["proxies"] == "none (this shell)"  # a daemon that has no /v1/sources
    assert found["hub"].endswith("answers (this shell)")
    text = run("doctor").out
    assert text.count("FAIL") == 0
    assert "WHAT TO DO" in text


def test_doctor_names_models_that_are_withdrawn(stub, run, quiet_machine, tmp_path):
    stub.answer("GET /version", {"version": __version__, "api": "v1"})
    stub.answer("GET /readyz", {"ready": True, "problems": [], "degraded": 2})
    stub.answer("GET /v1/stripe", {"path": str(tmp_path)})
    found = {finding["check"]: finding for finding in json.loads(run("doctor", "--json").out)["findings"]}
    assert found["models"]["verdict"] == "warn"
    assert found["models"]["detail"] == "2 models withdrawn: bytes went bad or are gone"


def test_where_models_come_from_is_told_as_the_daemon_has_it(stub, run, quiet_machine, tmp_path, monkeypatch, hub_answer):
    endpoint = hub_answer()
    hub = {"scheme": "hf", "endpoint": endpoint, "token": True, "proxies": {"https": "proxy.example:3128"}, "no_proxy": True, "xet": False}
    stub.answer("GET /v1/sources", {"sources": [hub, {"scheme": "file"}]})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = {finding["check"]: finding for finding in json.loads(run("doctor", "--json").out)["findings"]}
    assert found["hub token"]["detail"] == "set"
    assert found["proxies"]["detail"] == "https via proxy.example:3128 with exceptions (NO_PROXY)"
    assert found["hf_xet"]["verdict"] == "warn"
    assert found["hub"]["detail"] == f"{endpoint} answers (this shell)"


def test_doctor_tells_another_version_and_an_unready_daemon(stub, run, quiet_machine):
    stub.answer("GET /version", {"version": "0.0.1", "api": "v1"})
    stub.answer("GET /readyz", (503, {"ready": False, "problems": ["the store is read-only"]}))
    ran = run("doctor", "--json")
    found = {finding["check"]: finding for finding in json.loads(ran.out)["findings"]}
    assert ran.code == 1
    assert found["daemon"]["verdict"] == "warn"
    assert found["ready"]["verdict"] == "fail"
    assert "read-only" in found["ready"]["detail"]


def test_doctor_without_a_daemon_or_usable_settings_still_looks_on(stub, run, quiet_machine, monkeypatch):
    monkeypatch.setenv("NVCACHE_SOCKET", "/nowhere/s.sock")
    monkeypatch.setenv("NVCACHE_WORKERS", "many")
    ran = run("doctor", "--json")
    found = {finding["check"]: finding["verdict"] for finding in json.loads(ran.out)["findings"]}
    assert ran.code == 1
    assert (found["settings"], found["daemon"]) == ("fail", "fail")
    assert "open files" in found


def stripe_findings(ran):
    return [(finding["verdict"], finding["detail"], finding["remedy"]) for finding in json.loads(ran.out)["findings"] if finding["check"] == "stripe"]


def test_the_nodes_disks_are_told_with_the_remedy_of_each_code(stub, run, quiet_machine, tmp_path):
    stub.answer("GET /version", {"version": __version__, "api": "v1"})
    stub.answer("GET /readyz", {"ready": True, "problems": []})
    mounted = {"backend": "md", "state": "mounted", "members": ["a", "b"], "array": "/dev/md127", "filesystem": "xfs", "mount": "/m"}
    warned = {**mounted, "warnings": ["W01: 1 usable disk is not in the stripe"]}
    absent = {"backend": None, "state": "absent", "code": "N03", "reason": "/dev/nvme1n1: D09 contains ext4", "path": None}
    directory = {"backend": "directory", "state": "mounted"}
    stub.answer("GET /v1/stripe", *({**found, "path": str(tmp_path)} for found in (mounted, warned)), absent, {**directory, "path": str(tmp_path)})
    line = "md of 2 disks, /dev/md127, xfs, mounted at /m"
    assert stripe_findings(run("doctor", "--json")) == [("ok", line, "")]
    assert stripe_findings(run("doctor", "--json")) == [
        ("ok", line, ""),
        ("warn", "W01: 1 usable disk is not in the stripe", DISK_CODES[DiskCode.W01].remedy),
    ]
    ran = run("doctor", "--json")
    assert stripe_findings(ran) == [("fail", "absent: N03 /dev/nvme1n1: D09 contains ext4", DISK_CODES[DiskCode.N03].remedy)]
    assert ran.code == 1
    assert stripe_findings(run("doctor", "--json")) == []


def kaito_findings(ran):
    return [(finding["verdict"], finding["detail"]) for finding in json.loads(ran.out)["findings"] if finding["check"] == "kaito"]


def test_what_kaito_does_not_find_is_told(stub, run, quiet_machine, monkeypatch, tmp_path):
    place, warning = tmp_path / "opt", f"{LACKS}: something is in the way"
    lacking = model(warnings=["the index is wrong", warning])
    stub.answer("GET /version", {"version": __version__, "api": "v1"})
    stub.answer("GET /readyz", {"ready": True, "problems": []})
    stub.answer("GET /v1/stripe", {"backend": "directory", "state": "mounted", "path": str(tmp_path)})
    stub.answer("GET /v1/models", {"models": [lacking, model(warnings=["the index is wrong"])]}, {"models": []})
    assert kaito_findings(run("doctor", "--json")) == []
    monkeypatch.setenv("NVCACHE_KAITO_MODELS", str(place))
    ran = run("doctor", "--json")
    assert (ran.code, kaito_findings(ran)) == (1, [("fail", f"{place} is not a directory")])
    place.mkdir()
    stub.answer("GET /v1/models", {"models": [lacking, model(warnings=["the index is wrong"])]}, {"models": []})
    assert kaito_findings(run("doctor", "--json")) == [("warn", f"{lacking['entry']}: {warning}")]
    assert kaito_findings(run("doctor", "--json")) == [("ok", f"links are made in {place}")]


@pytest.mark.parametrize("setting", [("NVCACHE_BACKEND", "md"), ("NVCACHE_BACKEND", "lvm"), ("NVCACHE_FOLLOW", "true")])
def test_a_stripe_that_nobody_tells_about_is_unknown_and_its_store_not_judged(stub, run, quiet_machine, monkeypatch, setting):
    monkeypatch.setenv("NVCACHE_SOCKET", "/nowhere/s.sock")
    monkeypatch.delenv("NVCACHE_STORE")
    monkeypatch.setenv(*setting)
    ran = run("doctor", "--json")
    assert [(verdict, remedy) for verdict, _, remedy in stripe_findings(ran)] == [("warn", checks.SEE_DISKS)]
    assert "file system" not in {finding["check"] for finding in json.loads(ran.out)["findings"]}
