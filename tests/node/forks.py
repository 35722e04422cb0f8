"""Runs `nvcache` commands in forks of itself, inside the guest: importing takes seconds there, a fork that has everything already does not.

`python -m tests.node.forks PIPE` imports once, then reads the names of jobs from the pipe. /host/JOB/call is a JSON object of `argv`, `env` and
`inside`: null, or whose mount namespace and which user it is (`guest.Inside`). Output, process id and the word of its end are given as the guest's
init does it. The command runs as it would in a process of its own: a session, standard input empty, standard output and error in files.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import nvcache.cli.keep
import nvcache.engine.keeper
import nvcache.engine.stripe
import nvcache.settings  # noqa: F401 - these are what the commands would import
from nvcache.__main__ import main as nvcache_main

JOBS = Path("/host")
TO_HOST = Path("/run/to-host")
CLONE_NEWNS = 0x20000  # linux/sched.h


def serve(pipe: Path) -> None:
    """Run what comes until the guest ends; returns only in a fork, by SystemExit with the command's status."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever waits for the command is nobody's to wait for
    os.mkfifo(pipe)
    with pipe.open("r+b", buffering=0) as jobs:
        TO_HOST.write_text("forks\n")
        while name := jobs.readline().decode().strip():
            if os.fork() == 0:
                attend(JOBS / name)


def attend(job: Path) -> None:
    """In a fork: run the job in another, wait for it, tell the host."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        raise SystemExit(call(job))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    TO_HOST.write_text(f"done {job.name} {status if status >= 0 else 128 - status}\n")
    os._exit(0)


def call(job: Path) -> int:
    """Become the command."""
    os.setsid()
    for number, (path, flags) in enumerate(
        ((Path(os.devnull), os.O_RDONLY), (job / "out", os.O_WRONLY | os.O_CREAT), (job / "err", os.O_WRONLY | os.O_CREAT))
    ):
        os.dup2(os.open(path, flags), number)
    (job / "pid").write_text(f"{os.getpid()}\n")
    wanted = json.loads((job / "call").read_text())
    os.environ.update(wanted["env"])
    if wanted["inside"]:
        enter(**wanted["inside"])
    sys.argv[1:] = wanted["argv"]
    return nvcache_main()


def enter(pid: int, uid: int, gid: int, groups: list[int]) -> None:
    """Become that user in the mount namespace of that process, as `nsenter --mount` and `setpriv` would."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(namespace, CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the mounts of process {pid}")
    os.close(namespace)
    os.chdir("/")
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
