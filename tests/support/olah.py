"""Runs olah, a real Hub mirror of other people's making: as an offline Hub over git repositories, or as a caching proxy of another Hub.

It lives in a virtual environment of its own (`make` creates .venv-olah). What it does differently from the Hub, and clients must bear: alone it
ignores Range (200, the whole body, chunked), sends ETags without quotes, answers `tree` with a 307 and a missing file with 401; behind another it
honours Range, but not If-Range.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.models import GIT_ATTRIBUTES
from tests.support.processes import end

OLAH = Path(__file__).resolve().parents[2] / ".venv-olah" / "bin" / "olah-cli"
NOWHERE = "127.0.0.1:9"
START_S = 60


def mirror(repos: Mapping[str, Path], work: Path) -> Olah:
    """An offline Hub that serves `repos` (org/name → directory) from git-lfs repositories made below `work`."""
    return Olah(work, repos=repos)


def proxy(upstream: Olah, work: Path) -> Olah:
    """A caching proxy of `upstream`."""
    return Olah(work, upstream=upstream.url.removeprefix("http://"))


class Olah:
    """A context manager: `url` is the endpoint, `commits` the commit of each repository it mirrors. Everything it writes is below `work`."""

    def __init__(self, work: Path, *, repos: Mapping[str, Path] | None = None, upstream: str = NOWHERE) -> None:
        self._work = work
        self._upstream = upstream
        self._process: subprocess.Popen[bytes] | None = None
        (work / "repos").mkdir(parents=True, exist_ok=True)
        self.commits = {name: self._import(name, directory) for name, directory in (repos or {}).items()}
        self.url = ""

    def __enter__(self) -> Self:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = self._work / "olah.toml"
        config.write_text(self._config(port))
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._work), "HF_HUB_DISABLE_TELEMETRY": "1"}
        with (self._work / "output.log").open("wb") as log:
            self._process = subprocess.Popen(
                [OLAH, "-c", config, "--log-path", self._work / "logs"],
                cwd=self._work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._await_answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        end(self._process)
        self._process = None

    def _import(self, name: str, directory: Path) -> str:
        """Commit `directory` to a git-lfs repository, and note the commit where olah looks for it when it is offline."""
        place = self._work / "mirrors" / "models" / name
        shutil.copytree(directory, place)
        (place / ".gitattributes").write_text(GIT_ATTRIBUTES)
        _git(place, "init", "--quiet", "--initial-branch=main")
        _git(place, "lfs", "install", "--local")
        _git(place, "add", "--all")
        _git(place, "-c", "user.name=test", "-c", "user.email=test@example.invalid", "commit", "--quiet", "--message=as is")
        commit = _git(place, "rev-parse", "HEAD")
        head = self._work / "repos" / "api" / "models" / name / "revision" / commit / "meta_head.json"
        head.parent.mkdir(parents=True)
        head.write_text(json.dumps({"sha": commit, "lastModified": "2026-01-01T00:00:00.000000"}))
        return commit

    def _config(self, port: int) -> str:
        own = f"127.0.0.1:{port}"
        mirrors = f"mirrors-path = [{str(self._work / 'mirrors')!r}]" if self.commits else ""
        return f"""
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{self._work}/repos"
hf-scheme = "http"
hf-netloc = "{self._upstream}"
hf-lfs-netloc = "{self._upstream}"
mirror-scheme = "http"
mirror-netloc = "{own}"
mirror-lfs-netloc = "{own}"
{mirrors}
[accessibility]
offline = {str(bool(self.commits)).lower()}
[[accessibility.proxy]]
repo = "*/*"
allow = true
[[accessibility.cache]]
repo = "*/*"
allow = true
"""

    def _await_answer(self) -> None:
        """olah cannot be given a socket: try until it listens, or has died."""
        assert self._process is not None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        pause = threading.Event()
        for _ in range(START_S * 10):
            try:
                opener.open(f"{self.url}/", timeout=5).close()
            except urllib.error.HTTPError as answer:
                answer.close()
                return
            except OSError:
                if self._process.poll() is not None:
                    break
                pause.wait(0.1)
            else:
                return
        raise RuntimeError(f"cannot start olah: {(self._work / 'output.log').read_text()[-2000:]}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _git(place: Path, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as home:  # the user's own git configuration must not matter
        environment = {"PATH": os.environ["PATH"], "HOME": home, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(["git", *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot run git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()
