"""A worker process and its control socket. What it does with a task is tested with the engine."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nvcache.engine.messages import CheckTask, encode, task_to_dict

HELLO = {"direct": False, "transport": {}, "log": {"level": "info", "style": "json"}}


@pytest.mark.parametrize("unread", [True, False])
def test_it_ends_in_silence_with_a_daemon_that_was_killed(tmp_path: Path, unread: bool) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        worker = subprocess.Popen([sys.executable, "-m", "nvcache.engine.worker"], stdin=its, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            its.close()
            ours.sendall(encode({"root": str(tmp_path), **HELLO}))
            if unread:  # what the daemon had not read when it died makes the socket's end a reset
                ours.sendall(encode({"do": "task", "id": 1, "log": {}, **task_to_dict(CheckTask(str(tmp_path / "gone"), 1, "", 4096))}))
                assert select.select([ours], [], [], 30)[0]
            ours.close()
            assert worker.communicate(timeout=30)[1] == b""
            assert worker.returncode == 0
        finally:
            worker.kill()
            worker.wait()
