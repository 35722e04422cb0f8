"""The daemon as a process: its one line, its sockets, its end. `python -m nvcache serve` with real signals."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from nvcache import __version__
from nvcache.engine.handover import StripeState, StripeStatus
from nvcache.engine.stripefile import StripeFiles
from tests.api.harness import UnixConnection, ask
from tests.support.faults import Kind
from tests.support.hub import HubServer
from tests.support.repo import Repo

START = 20.0


@contextmanager
def served(place: Path, *flags: str, store: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A daemon of `place`, killed at the end if it still runs; with `store` its store is there."""
    own = ["--store", str(place / "store")] if store else []
    command = [sys.executable, "-m", "nvcache", "serve", *own, "--socket", str(place / "x.sock"), "--workers", "1", *flags]
    environment = {"PATH": os.environ["PATH"], "HOME": str(place)}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def first_line(stream: IO[str] | None) -> str:
    """The next line, or the empty string when none comes in time."""
    assert stream is not None
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(START)
    return found[0] if found else ""


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, float, str, str]:
    """Signal it and wait: exit code, seconds, the rest of stdout, stderr."""
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=15)
    return process.returncode, time.monotonic() - began, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_line_when_ready_and_a_clean_end(place: Path, number: int) -> None:
    with served(place) as process:
        assert first_line(process.stdout) == f"nvcache {__version__} ready on unix://{place}/x.sock; store {place}/store (0 models)\n"
        assert ask(UnixConnection(place / "x.sock"), "GET", "/readyz").status == 200
        code, seconds, out, err = end(process, number)
    assert (code, out) == (0, ""), err
    assert "Traceback" not in err
    assert seconds < 5
    assert not (place / "x.sock").exists()


def test_the_line_names_every_address_that_pods_may_use(place: Path) -> None:
    (place / "token").write_text("correct-horse")
    tcp = ("--listen", "127.0.0.1:0", "--listen-token-file", str(place / "token"), "--log-format", "console")
    with served(place, "--admin-socket", str(place / "admin.sock"), *tcp) as process:
        line = first_line(process.stdout)
        _, _, _, err = end(process)
    found = re.fullmatch(rf"nvcache \S+ ready on unix://{place}/x\.sock, (http://127\.0\.0\.1:[1-9]\d+); store {place}/store \(0 models\)\n", line)
    assert found, line
    for address in (f"unix://{place}/x.sock", f"unix://{place}/admin.sock", found[1]):
        assert f"listening on {address}" in err


def test_an_open_event_stream_a_stalled_fill_and_a_stuck_request_do_not_hold_it_up(place: Path) -> None:
    """A fill whose source went silent, somebody who follows it, and somebody who never finishes a request."""
    with HubServer({"org/name": Repo({"model.bin": b"x" * 2**21})}) as hub, served(place, "--hf-endpoint", hub.url) as process:
        hub.faults.add("*model.bin", Kind.STALL, times=None, after=1000)
        assert first_line(process.stdout)
        job = ask(UnixConnection(place / "x.sock"), "POST", "/v1/models", {"ref": "org/name"}).json["job"]["id"]
        entry = _fetching(place, job)
        follower, stuck = UnixConnection(place / "x.sock"), UnixConnection(place / "x.sock")
        follower.request("GET", f"/v1/models/{entry}/events")
        stream = follower.getresponse()
        assert stream.readline() == b"retry: 1000\n"
        stuck.putrequest("POST", "/v1/models")
        stuck.putheader("Content-Length", "10")
        stuck.endheaders()
        code, seconds, _, err = end(process)
        assert b'"state":"fetching"' in stream.read()
        follower.close()
        stuck.close()
    assert code == 0, err
    assert seconds < 10
    assert "Traceback" not in err


def test_a_second_signal_ends_it_at_once(place: Path) -> None:
    with served(place) as process:
        assert first_line(process.stdout)
        holder = UnixConnection(place / "x.sock")
        holder.putrequest("POST", "/v1/models")  # a request under way: the end takes a moment
        holder.putheader("Content-Length", "10")
        holder.endheaders()
        assert ask(UnixConnection(place / "x.sock"), "GET", "/healthz").status == 200
        process.send_signal(signal.SIGTERM)
        code, seconds, _, _ = end(process, signal.SIGINT)
        holder.close()
    assert code in (128 + signal.SIGINT, 128 + signal.SIGTERM)  # whichever the kernel delivered last
    assert seconds < 1


def test_a_stuck_loop_does_not_hold_up_the_end() -> None:
    """Whatever blocks, the timer that the first signal sets ends the process."""
    script = """
import asyncio, os, signal, threading
from nvcache.api import serve
serve.EXIT_SECONDS = 0.2
async def main():
    serve._Signals(asyncio.get_running_loop())
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
asyncio.run(main())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=START, check=False, cwd=Path(__file__).parents[2])
    assert (found.returncode, found.stdout) == (0, "")
    assert "did not stop in time" in found.stderr


def test_a_second_daemon_on_the_socket_is_refused(place: Path) -> None:
    with served(place) as first:
        assert first_line(first.stdout)
        with served(place, "--store", str(place / "other")) as second:
            out, err = second.communicate(timeout=START)
        assert second.returncode == 2
        assert out == ""
        assert "cannot listen on socket" in err
        assert "a daemon answers there" in err
        assert ask(UnixConnection(place / "x.sock"), "GET", "/healthz").status == 200


def test_a_second_daemon_on_the_store_is_refused_and_leaves_no_socket(place: Path) -> None:
    with served(place) as first:
        assert first_line(first.stdout)
        with served(place, "--socket", str(place / "y.sock")) as second:
            out, err = second.communicate(timeout=START)
        assert second.returncode == 2, err
        assert out == ""
        assert not (place / "y.sock").exists()


def test_a_socket_left_by_a_killed_daemon_is_taken_over(place: Path) -> None:
    with served(place) as first:
        assert first_line(first.stdout)
        first.kill()
        first.wait()
    assert (place / "x.sock").is_socket()
    with served(place) as second:
        assert first_line(second.stdout)
        assert end(second)[0] == 0


def test_tcp_without_a_usable_token_is_refused(place: Path) -> None:
    (place / "token").write_text("\n")
    with served(place, "--listen", "127.0.0.1:0", "--listen-token-file", str(place / "token")) as process:
        out, err = process.communicate(timeout=START)
    assert process.returncode == 2
    assert out == ""
    assert "listen_token_file" in err
    assert "holds no token" in err
    assert not (place / "x.sock").exists()


def _fetching(place: Path, job: str) -> str:
    """The entry that a job fetches, once it does."""
    end_of_patience = time.monotonic() + START
    pause = threading.Event()
    while (found := ask(UnixConnection(place / "x.sock"), "GET", f"/v1/jobs/{job}").json)["state"] != "fetching":
        assert found["error"] is None, found
        assert time.monotonic() < end_of_patience
        pause.wait(0.05)
    return str(found["entry"])


def test_a_daemon_that_follows_is_up_before_there_is_a_stripe_and_serves_when_it_comes(place: Path) -> None:
    files = StripeFiles(place / "run" / "disks")
    with served(place, "--follow", "--run-directory", str(place / "run" / "disks")) as process:
        assert first_line(process.stdout).startswith(f"nvcache {__version__} ready on unix://{place}/x.sock; no store yet: ")
        answer = ask(UnixConnection(place / "x.sock"), "GET", "/readyz")
        assert (answer.status, answer.json["ready"]) == (503, False)
        (place / "mnt" / "store").mkdir(parents=True)
        files.publish(StripeState(7, StripeStatus.MOUNTED, fs_uuid="uuid-a", store=str(place / "mnt" / "store")))
        _wait_for(place, 200)
        files.publish(StripeState(8, StripeStatus.WITHDRAWING, "N04", "it failed"))
        assert files.wait_acknowledged(8, 5)
        assert "N04" in _wait_for(place, 503)
        code, seconds, _, err = end(process)
    assert (code, "Traceback" in err) == (0, False), err
    assert seconds < 5
    assert '"code": "N04"' in err or "N04" in err, "one line in the log for each state"


def test_a_daemon_that_keeps_its_own_stripe_is_up_without_one(place: Path) -> None:
    """On a machine without eligible disks; a real stripe needs real disks."""
    own = ("--backend", "md", "--mount", str(place / "mnt"), "--run-directory", str(place / "run"), "--min-disk", "1000TB", "--settle-seconds", "0")
    with served(place, *own, store=False) as process:
        assert first_line(process.stdout).startswith(f"nvcache {__version__} ready on")
        assert "the stripe is absent" in _wait_for(place, 503)
        code, seconds, _, err = end(process)
    assert (code, "Traceback" in err) == (0, False), err
    assert seconds < 10


def test_probes_and_scrapers_need_no_token_file(place: Path) -> None:
    with served(place, "--listen", "127.0.0.1:0", "--listen-scope", "metrics") as process:
        line = first_line(process.stdout)
        address = next(word for word in line.replace(",", " ").replace(";", " ").split() if word.startswith("http://"))
        with urllib.request.urlopen(f"{address}/healthz", timeout=10) as found:
            assert found.status == 200
        with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(f"{address}/v1/models", timeout=10):
            pass
        with refused.value as problem:
            assert (problem.code, json.loads(problem.read())["code"]) == (403, "not-allowed")
        code, _, _, err = end(process)
    assert (code, "Traceback" in err) == (0, False), err


def test_a_directory_on_the_os_disk_ends_the_start(place: Path) -> None:
    with served(place, "--backend", "directory", "--store", "/etc/nvcache", store=False) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode != 0, out) == (True, "")
    assert "P01" in err
    assert not Path("/etc/nvcache").exists()
    assert not (place / "x.sock").exists()


def _wait_for(place: Path, status: int) -> str:
    """The answer of /readyz once it has that status."""
    until = time.monotonic() + START
    never = threading.Event()
    while (answer := ask(UnixConnection(place / "x.sock"), "GET", "/readyz")).status != status:
        assert time.monotonic() < until, answer
        never.wait(0.1)
    return answer.data.decode()


def test_the_daemon_allows_itself_the_descriptors_that_it_may_have(place: Path) -> None:
    """Shells and container runtimes begin with 1024 and allow more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with served(place) as process:
            first_line(process.stdout)
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)
            end(process)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
