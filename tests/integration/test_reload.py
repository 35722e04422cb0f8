"""A real daemon follows its file: by SIGHUP, and by itself when a mounted ConfigMap swaps its link; one that is broken changes nothing."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvcache.cli.exits import Exit
from tests.api.harness import UnixConnection, ask
from tests.support.daemon import DaemonProcess
from tests.support.hub import HubServer
from tests.support.repo import Repo

BOUND = 30.0  # seconds
ONE, TWO = '[[models]]\nref = "acme/one"\npin = true\n', '[[models]]\nref = "acme/two"\n'


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({f"acme/{name}": Repo({"model.bin": name.encode() * 1000}) for name in ("one", "two", "three")}) as server:
        yield server


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nvc-") as directory:
        yield Path(directory)


class ConfigMap:
    """A directory as the kubelet keeps one: `nvcache.toml` leads to `..data/nvcache.toml`, and `..data` is put in place anew with each change."""

    def __init__(self, place: Path, text: str) -> None:
        self.place, self.file = place, place / "nvcache.toml"
        place.mkdir()
        self.put(text)
        self.file.symlink_to("..data/nvcache.toml")

    def put(self, text: str | None) -> None:
        """The next version; None: one without the file."""
        version = Path(tempfile.mkdtemp(prefix="..2026_", dir=self.place))
        if text is not None:
            (version / "nvcache.toml").write_text(text)
        link = self.place / "..data_tmp"
        link.symlink_to(version.name)
        link.replace(self.place / "..data")


def daemon(place: Path, config: Path, hub: HubServer) -> DaemonProcess:
    """One whose `socket` is the pods'."""
    return DaemonProcess(place, hub.url, "--config", str(config), "--log-format", "json", workers=1, admin_socket=place / "admin.sock")


def until(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + BOUND
    while not look():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def ready(process: DaemonProcess) -> dict[str, bool]:
    """The models that are ready, and whether each is pinned."""
    done = process.cli("ls", "--json")
    models = json.loads(done.stdout)["models"]
    return {model["hub_id"]: model["pinned"] for model in models if model["state"] == "ready"}


def reload_failed(process: DaemonProcess) -> float:
    text = ask(UnixConnection(process.socket), "GET", "/metrics").data.decode()
    (line,) = [line for line in text.splitlines() if line.startswith("nvcache_config_reload_failed ")]
    assert ask(UnixConnection(process.socket), "GET", "/readyz").status == 200
    return float(line.split()[1])


def test_a_mounted_config_map_is_followed(hub: HubServer, place: Path) -> None:
    mounted = ConfigMap(place / "etc", f'allow = ["hf://acme/one"]\n{ONE}')
    with daemon(place, mounted.file, hub) as process:
        until(lambda: ready(process) == {"acme/one": True}, "the first is not ready")
        assert process.cli("warm", "acme/three").returncode == Exit.REFUSED
        mounted.put(f'allow = ["hf://acme/*"]\nlanes = 7\n{TWO}')
        until(lambda: ready(process) == {"acme/one": False, "acme/two": False}, "the second is not ready, or the first is held still")
        assert process.cli("warm", "acme/three").returncode == Exit.OK
        log = process.last_words(None)
        assert f"config file {mounted.file} was read again: declared now: hf://acme/two; declared no more: hf://acme/one; allow is hf://acme/*" in log
        assert log.count("what changed of lanes counts after a restart") == 1

        broken = {"cannot read model reference 'a/b/c'": "[[models]]\nref = 'a/b/c'\n", "No such file or directory": None}
        for why, text in broken.items():
            mounted.put(text)
            process.wait_for_log(why)
            assert reload_failed(process) == 1
            mounted.put(text)  # another file with the same in it is nothing new
        assert ready(process).keys() == {"acme/one", "acme/two", "acme/three"}
        assert process.cli("warm", "acme/three").returncode == Exit.OK

        mounted.put(f'allow = ["hf://acme/*"]\n{ONE}{TWO}')
        until(lambda: reload_failed(process) == 0, "it is not told that the file is whole again")
        until(lambda: ready(process)["acme/one"], "the first is not pinned again")
        assert [process.last_words(None).count(why) for why in broken] == [1, 1]


def test_sighup_has_the_file_read_at_once(hub: HubServer, place: Path) -> None:
    config = place / "nvcache.toml"
    config.write_text(ONE)
    with daemon(place, config, hub) as process:
        assert process.process is not None
        until(lambda: bool(ready(process)), "the first is not ready")

        def hang_up() -> None:
            assert process.process is not None
            process.process.send_signal(signal.SIGHUP)

        hang_up()
        process.wait_for_log("was read again: nothing changed")
        config.write_text(ONE + TWO + "[tuning.md]\nrq_affinity = 2\n")
        hang_up()
        process.wait_for_log("was read again: declared now: hf://acme/two")
        process.wait_for_log("what changed of tuning counts after a restart")
        until(lambda: ready(process) == {"acme/one": True, "acme/two": False}, "the second is not ready")
        config.write_text("lanes = 0\n")
        for count in (1, 2):  # somebody asked, so he is told, also the second time
            hang_up()
            until(lambda count=count: process.last_words(None).count("cannot use setting lanes") >= count, "nobody is told")  # type: ignore[misc]
        assert reload_failed(process) == 1
    assert "Traceback" not in process.last_words(None)


def test_a_pipe_is_read_once(hub: HubServer, place: Path) -> None:
    """What a shell makes of <(…) has nothing more to say; that must not count as an empty file. A SIGHUP ends the process as it ends any."""
    pipe = place / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_text, args=(ONE,))  # waits for its reader
    writing.start()
    process = daemon(place, pipe, hub)
    try:
        process.start()
        writing.join(BOUND)
        until(lambda: ready(process) == {"acme/one": True}, "what the pipe said does not count")
        assert process.process is not None
        process.process.send_signal(signal.SIGHUP)
        assert process.process.wait(BOUND) == -signal.SIGHUP
    finally:
        process.stop()
