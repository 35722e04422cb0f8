"""The bridge as anybody on the machine, and any site in the browser, may try it: without a browser's good manners."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nvcache.api import page
from nvcache.cli import bridge as bridges
from nvcache.cli.bridge import PASSED_ON, Bridge
from nvcache.errors import ConfigError
from tests.api.harness import Answer, ask
from tests.support.stub_daemon import StubDaemon, problem


def get(bridge: Bridge, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request; `Host` and `Cookie` are headers like others."""
    return ask(http.client.HTTPConnection("127.0.0.1", bridge.server_port, timeout=20), method, path, None, headers)


def let_in(bridge: Bridge) -> str:
    """Use the link; returns the cookie."""
    answer = get(bridge, bridge.link.partition(str(bridge.server_port))[2])
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    found = re.fullmatch(r"(nvcache-\d+=[\w-]{40,}); Path=/; HttpOnly; SameSite=Strict", answer.headers["set-cookie"])
    assert found
    return found[1]


def test_the_link_lets_in_one_browser_once(bridge: Bridge) -> None:
    cookie = let_in(bridge)
    again = get(bridge, bridge.link.partition(str(bridge.server_port))[2])
    assert (again.status, again.code) == (403, "not-allowed")
    assert "set-cookie" not in again.headers
    assert "nvcache ui" in again.json["hint"]
    reload = get(bridge, bridge.link.partition(str(bridge.server_port))[2], Cookie=cookie)
    assert reload.status == 200, "the same browser may reload"
    assert get(bridge, "/", Cookie=f"other=1; {cookie}").status == 200


@pytest.mark.parametrize("path", ["/", "/page.js", "/?key=", "/?key=wrong", "/?key=%ff", "/v1/models", "/v1/events", "/nothing"])
@pytest.mark.parametrize("cookie", ["", "nvcache-1=x", "=", "a=\x01", "x" * 3000])
def test_without_the_cookie_there_is_nothing(bridge: Bridge, stub: StubDaemon, path: str, cookie: str) -> None:
    answer = get(bridge, path, Cookie=cookie)
    assert (answer.status, answer.code) == (403, "not-allowed")
    assert stub.asked == []
    wrong = get(bridge, path, Cookie=f"{bridge.cookie}=wrong")
    assert wrong.status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example:1", "", "[", "127.0.0.2", "x@localhost.a"]
)
def test_a_name_that_was_made_to_point_here_is_refused(bridge: Bridge, stub: StubDaemon, host: str) -> None:
    cookie = let_in(bridge)
    for path in ("/", "/v1/models"):
        answer = get(bridge, path, Host=host, Cookie=cookie)
        assert (answer.status, answer.code) == (421, "not-allowed")
    assert stub.asked == []
    for ours in ("localhost:1", "127.0.0.1", "[::1]:8080", "LOCALHOST"):  # a forwarded port has another number
        assert get(bridge, "/v1/models", Host=ours, Cookie=cookie).status == 200


def test_a_strange_host_does_not_spend_the_link(bridge: Bridge) -> None:
    assert get(bridge, bridge.link.partition(str(bridge.server_port))[2], Host="evil.example").status == 421
    let_in(bridge)


def test_it_reads_what_the_page_reads_and_nothing_else(bridge: Bridge, stub: StubDaemon) -> None:
    cookie = let_in(bridge)
    for path in PASSED_ON:
        stub.answer(f"GET {path}", {"from": path})
        answer = get(bridge, f"{path}?ref=ignored", Cookie=cookie)
        assert (answer.status, answer.json) == (200, {"from": path})
        assert answer.headers["content-type"] == "application/json"
    assert {(asked.method, asked.path) for asked in stub.asked} == {("GET", path) for path in PASSED_ON}
    stub.asked.clear()
    for path in ("/v1/blobs/" + "0" * 64, "/v1/models/x", "/metrics", "/openapi.json", "/v1/models/", "/v1/../v1/models", "/page.py"):
        assert get(bridge, path, Cookie=cookie).status == 404, path
    for method in ("POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT"):
        assert get(bridge, "/v1/models", method, Cookie=cookie).status == 501, method
    assert stub.asked == []


@pytest.mark.parametrize("target", [b"http://[/", b"*", b"/\xff", b"?key=x", b"/%00"])
def test_strange_targets_are_refused_in_order(bridge: Bridge, target: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    cookie = let_in(bridge).encode()
    with socket.create_connection(("127.0.0.1", bridge.server_port), 20) as raw:
        raw.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nCookie: " + cookie + b"\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 404"
    assert capsys.readouterr().err == ""


def test_every_answer_keeps_other_origins_out(bridge: Bridge) -> None:
    cookie = let_in(bridge)
    for path in ("/", "/page.js", "/v1/models", "/nothing"):
        headers = get(bridge, path, Cookie=cookie).headers
        for name, value in page.HEADERS.items():
            assert headers[name.lower()] == value, path
        assert not [name for name in headers if name.startswith("access-control-")]


def test_what_the_daemon_refuses_is_passed_on(bridge: Bridge, stub: StubDaemon) -> None:
    cookie = let_in(bridge)
    stub.answer("GET /v1/leases", (403, problem("not-allowed", "cannot list the leases: no")))
    answer = get(bridge, "/v1/leases", Cookie=cookie)
    assert (answer.status, answer.json["detail"]) == (403, "cannot list the leases: no")
    stub.answer("GET /v1/leases", (401, problem("unauthorized")))
    assert get(bridge, "/v1/leases", Cookie=cookie).status == 502, "401 would have the page ask for a token that goes nowhere"


def test_a_daemon_that_is_away_is_said_to_be(place: Path) -> None:
    with Bridge(f"unix://{place}/nobody.sock") as bridge:
        cookie = let_in(bridge)
        answer = get(bridge, "/v1/models", Cookie=cookie)
        assert (answer.status, answer.code) == (503, "daemon-unreachable")
        assert get(bridge, "/page.js", Cookie=cookie).status == 200, "the page is there all the same"


def test_a_daemon_that_hangs_up_is_said_to_be_away(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "s.sock"))
        listener.listen()

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with Bridge(f"unix://{place}/s.sock") as bridge:
            answer = get(bridge, "/v1/models", Cookie=let_in(bridge))
        thread.join(20)
    assert (answer.status, answer.code) == (503, "daemon-unreachable")


def test_many_that_say_nothing_are_hung_up_on(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridges._Handler, "timeout", 0.5)
    silent = [socket.create_connection(("127.0.0.1", bridge.server_port), 20) for _ in range(bridges.CONNECTIONS)]
    for connection in silent:
        assert connection.recv(1) == b""
        connection.close()
    let_in(bridge)


def test_one_more_than_there_is_room_for_is_hung_up_on(bridge: Bridge) -> None:
    begun = []
    for _ in range(bridges.CONNECTIONS):
        begun.append(socket.create_connection(("127.0.0.1", bridge.server_port), 20))
        begun[-1].sendall(b"GET / HTTP/1.1\r\n")  # and no more of it
    with socket.create_connection(("127.0.0.1", bridge.server_port), 20) as late:
        assert late.recv(1) == b""
    for connection in begun:
        connection.sendall(b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 421"  # it named no host
        connection.close()


STEAL = """
import encodings.idna, os, socket, sys  # what is imported later may be out of reach
os.setuid(int(sys.argv[1]))
with socket.create_connection(("127.0.0.1", int(sys.argv[2])), 20) as thief:
    thief.sendall(f"GET {sys.argv[3]} HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
    try:
        sys.stdout.write(thief.recv(12).decode())
    except ConnectionError:
        pass
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize(("private", "told"), [(True, ""), (False, "HTTP/1.1 200")])
def test_a_link_that_others_can_read_is_of_no_use_to_them(stub: StubDaemon, private: bool, told: str) -> None:
    """A browser's command line is everybody's to read; what is only printed is whoever's it was given to."""
    with Bridge(f"unix://{stub.socket}", private=private) as bridge:
        path = bridge.link.partition(str(bridge.server_port))[2]
        command = [sys.executable, "-c", STEAL, "65534", str(bridge.server_port), path]
        stolen = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (stolen.stdout, stolen.stderr) == (told, "")
        if private:
            let_in(bridge)  # the link is not spent


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: ") as raised:
            Bridge("unix:///nobody.sock", port)
    assert raised.value.code == "socket-in-use"
    assert "--port" in raised.value.hint


def test_the_command_prints_the_link_and_ends_by_ctrl_c(stub: StubDaemon) -> None:
    command = [sys.executable, "-m", "nvcache", "ui", "--no-open", "--socket", str(stub.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            link = process.stdout.readline().strip()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/\?key=[\w-]{32})", link)
            assert found, link
            assert ask(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20), "GET", found[2]).status == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert "Ctrl-C ends it" in err
    assert "Traceback" not in err


def test_the_command_opens_the_browser(stub: StubDaemon, place: Path) -> None:
    """By the browser named in BROWSER, as other programs do; one that does not come back until it is closed is served meanwhile."""
    script = place / "browser"
    script.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\nopen({str(place / 'seen')!r}, 'wb').write(urllib.request.urlopen(sys.argv[1]).read())\n"
    )
    script.chmod(0o755)
    command = [sys.executable, "-m", "nvcache", "ui", "--socket", str(stub.socket)]
    environment = {"PATH": "/usr/bin:/bin", "BROWSER": str(script), "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr
        try:
            assert "opened in your browser" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "<h1>nvcache</h1>" in (place / "seen").read_text()


def test_the_command_does_not_begin_without_a_daemon(place: Path) -> None:
    command = [sys.executable, "-m", "nvcache", "ui", "--no-open", "--socket", f"{place}/nobody.sock"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stdout) == (9, ""), ran.stderr
    assert "cannot reach the nvcache daemon" in ran.stderr


def test_problems_of_the_bridge_are_whole_documents(bridge: Bridge) -> None:
    document = json.loads(get(bridge, "/").data)
    assert document["status"] == 403
    assert document["detail"].startswith("cannot GET /: this browser was not let in")
