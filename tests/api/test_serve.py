"""The daemon as a process: its one line, its sockets, its end. `python -m nvcache serve` with real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from nvcache import __version__
from tests.api.harness import UnixConnection, ask
from tests.support.faults import Kind
from tests.support.hub import HubServer
from tests.support.repo import Repo

START = 20.0


@contextmanager
def served(place: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon of `place`, killed at the end if it still runs."""
    command = [sys.executable, "-m", "nvcache", "serve", "--store", str(place / "store"), "--socket", str(place / "x.sock"), "--workers", "1", *flags]
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
