"""Runs of external programs: bounded, isolated and explained, whatever the program does. Real processes throughout."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.errors import Code, DiskError
from nvcache.system.run import OUTPUT, Tools, printable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


@pytest.fixture
def tools(folder: Path) -> Tools:
    return Tools(f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin")


def script(folder: Path, text: str, name: str = "tool") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def failure(tools: Tools, *args: str, timeout: float = 30.0) -> DiskError:
    with pytest.raises(DiskError) as found:
        tools.run("tool", *args, timeout=timeout)
    return found.value


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, *, seconds: float = 5.0) -> bool:
    until, never = monotonic() + seconds, threading.Event()
    while alive(pid):
        if monotonic() > until:
            return False
        never.wait(0.02)
    return True


def test_output_and_status(folder: Path, tools: Tools) -> None:
    script(folder, 'echo "out $1"; echo "err $2" >&2; exit 3')
    done = tools.run("tool", "a b", "$(id)", accept=(0, 3))
    assert (done.status, done.out, done.err, done.argv) == (3, "out a b\n", "err $(id)\n", ("tool", "a b", "$(id)"))


def test_the_environment_is_only_what_is_given(folder: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LVM_SYSTEM_DIR", "/elsewhere")
    (folder / "tool").symlink_to("/usr/bin/env")
    found = dict(line.split("=", 1) for line in tools.run("tool", env={"MDADM_NO_UDEV": "1"}).out.splitlines())
    assert found == {"PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "LANG": "C", "MDADM_NO_UDEV": "1"}


def test_nothing_is_inherited_and_nothing_can_be_asked(folder: Path, tools: Tools, tmp_path: Path) -> None:
    script(folder, 'ls /proc/$$/fd; cat; cut -d" " -f6 /proc/$$/stat; echo $$')
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        *fds, session, pid = tools.run("tool", timeout=5).out.split()
    assert set(fds) <= {"0", "1", "2", "10"}  # 10: the shell's own hold on its script
    assert session == pid != str(os.getsid(0))


def test_a_missing_program_names_its_package(tools: Tools) -> None:
    with pytest.raises(DiskError, match=r"cannot run mkfs\.xfs: it is not installed \(Debian package xfsprogs\)") as found:
        Tools("/nowhere").run("mkfs.xfs")
    assert found.value.code is Code.TOOL_MISSING
    assert not tools.have("tool")


@pytest.mark.parametrize("content", [b"#!/nowhere/sh\n", b"\x7fELF garbage", b""])
def test_a_program_that_cannot_be_started(folder: Path, tools: Tools, content: bytes) -> None:
    (folder / "tool").write_bytes(content)
    (folder / "tool").chmod(0o755)
    error = failure(tools)
    assert error.code is Code.TOOL_FAILED
    assert str(error).startswith("cannot run `tool`: ")


def test_a_failure_after_partial_output(folder: Path, tools: Tools) -> None:
    script(folder, 'echo "half an ans"; printf "\\n  first\\n\\nsecond\\nthird\\nfourth\\n" >&2; exit 5')
    error = failure(tools, "-x", "a b")
    assert error.code is Code.TOOL_FAILED
    assert str(error) == "cannot finish `tool -x 'a b'`: exit status 5: first; second; third"
    assert error.facts["status"] == 5


def test_a_program_that_complains_on_standard_output_only(folder: Path, tools: Tools) -> None:
    script(folder, "echo nope; exit 1")
    assert str(failure(tools)).endswith("exit status 1: nope")


def test_a_crash(folder: Path, tools: Tools) -> None:
    script(folder, "kill -SEGV $$")
    assert str(failure(tools)) == "cannot finish `tool`: signal 11"


@pytest.mark.parametrize(
    "raw",
    [
        "Ger\u00e4t oder Ressource belegt".encode(),
        "Ger\u00e4t oder Ressource belegt".encode("latin-1"),
        "デバイスもしくはリソースがビジー状態です".encode("euc-jp"),
        bytes(range(256)) * 20,
        b"\x1b[2J\x1b]0;title\x07\r\n" * 50,
    ],
)
def test_localized_and_binary_output(folder: Path, tools: Tools, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "raw").write_bytes(raw)
    script(folder, f"cat {tmp_path}/raw >&2; cat {tmp_path}/raw; exit $1")
    assert tools.run("tool", "0").out == raw.decode("utf-8", "replace")
    message = str(failure(tools, "1"))
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("stream", ["1", "2"])
def test_megabytes_of_output_are_dropped_and_count_as_failure(folder: Path, tools: Tools, stream: str) -> None:
    script(folder, f"head -c {OUTPUT} /dev/zero >&{stream}")
    done = tools.run("tool")
    assert len(done.out) + len(done.err) == OUTPUT
    script(folder, f"head -c 50000000 /dev/zero >&{stream}; echo end >&{3 - int(stream)}")
    error = failure(tools)
    assert error.code is Code.TOOL_FAILED
    assert "more than 1 MiB" in str(error)


@pytest.mark.parametrize("body", ["sleep 100", "trap '' TERM INT HUP; while :; do sleep 1; done", "yes", "yes >&2", "exec >&- 2>&-; sleep 100"])
def test_a_hang_ends_in_time(folder: Path, tools: Tools, tmp_path: Path, body: str) -> None:
    script(folder, f"echo $$ > {tmp_path}/pid; {body}")
    begun = monotonic()
    error = failure(tools, timeout=0.4)
    assert 0.4 <= monotonic() - begun < 30
    assert error.code is Code.TOOL_STALLED
    assert str(error) == "cannot finish `tool`: it did not end within 0.4 s"
    assert not alive(int((tmp_path / "pid").read_text()))
    script(folder, "exit 0")
    tools.run("tool")  # it is dead, so the next may start


def test_children_end_with_it(folder: Path, tools: Tools, tmp_path: Path) -> None:
    script(folder, f"sleep 100 & echo $! > {tmp_path}/pid; wait")
    failure(tools, timeout=0.4)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_pipe_kept_open_by_a_grandchild_is_not_waited_for(folder: Path, tools: Tools, tmp_path: Path) -> None:
    script(folder, f"sleep 100 & echo $! > {tmp_path}/pid; echo done")
    begun = monotonic()
    assert tools.run("tool").out == "done\n"
    assert monotonic() - begun < 30
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_grandchild_that_left_the_session_cannot_keep_us(folder: Path, tools: Tools, tmp_path: Path) -> None:
    script(folder, f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec yes' & while [ ! -s {tmp_path}/pid ]; do sleep 0.05; done")
    begun = monotonic()
    try:
        tools.run("tool", accept=range(256))
    except DiskError as error:
        assert "more than 1 MiB" in str(error)  # noqa: PT017 - how much came is a matter of speed
    assert monotonic() - begun < 30
    assert gone(int((tmp_path / "pid").read_text()))  # nobody reads what it writes


def test_an_interrupted_run_leaves_no_process(folder: Path, tools: Tools, tmp_path: Path) -> None:
    script(folder, f"echo $$ > {tmp_path}/pid; sleep 0.3; kill -INT $PPID; sleep 100")
    with pytest.raises(KeyboardInterrupt):
        tools.run("tool")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_runs_side_by_side(folder: Path, tools: Tools) -> None:
    script(folder, "sleep 0.5; echo $1")
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda name=str(at): found.update({name: tools.run("tool", name).out})) for at in range(8)]
    begun = monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {str(at): f"{at}\n" for at in range(8)}
    assert monotonic() - begun < 3


def test_each_run_is_one_line_that_can_be_pasted(folder: Path, tools: Tools, caplog: pytest.LogCaptureFixture) -> None:
    script(folder, "exit 4")
    with caplog.at_level(logging.DEBUG, "nvcache.system.run"):
        tools.run("tool", "two words", env={"A": "b"}, accept=(4,))
        tools.run("tool", accept=(4,), quiet=True)
    loud, quiet = caplog.records
    assert (loud.levelno, quiet.levelno) == (logging.INFO, logging.DEBUG)
    text = loud.getMessage()
    assert ": status 4 after " in text
    command = text.split("`")[1]
    assert shlex.split(command) == ["A=b", "tool", "two words"]
    assert subprocess.run(command, shell=True, env={"PATH": f"{folder}:/usr/bin:/bin"}, check=False).returncode == 4


@given(st.text())
def test_printable_is_one_short_line(text: str) -> None:
    line = printable(text)
    assert line == "" or line.isprintable()
    assert len(line) <= 300


def test_signals_are_the_default_again(folder: Path, tools: Tools) -> None:
    """Python ignores SIGPIPE; a program that inherits that would see errors where it expects to die."""
    script(folder, "kill -PIPE $$; echo survived")
    with pytest.raises(DiskError, match=f"signal {signal.SIGPIPE.value}"):
        tools.run("tool")
