"""podman with a storage and a configuration of its own, and the image of deploy/Containerfile. It pulls nothing and leaves the user's podman alone.

All lies in $NVCACHE_IMAGE_CACHE (default ~/.cache/nvcache-image), which one test session uses at a time. The base of the image is a Debian made by
mmdebstrap, since no registry can be counted on; layers that did not change are not built again.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nvcache

CHECKOUT = Path(__file__).parents[2]
IMAGE = f"localhost/nvcache:{nvcache.__version__}"
PROGRAMS = {"podman": "podman", "runc": "runc", "catatonit": "catatonit", "mmdebstrap": "mmdebstrap"}
BUILD_SECONDS = 900
COMMAND_SECONDS = 60
# What a base has that is called slim: essential packages, apt, and without usr-is-merged 45 MB of Perl that the installation alone uses.
BASE = (
    "--variant=minbase",
    "--dpkgopt=force-unsafe-io",
    "--include=ca-certificates,usr-is-merged",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "bookworm",
)
HOST_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
# runc, and no limits to raise: this also works where root lacks CAP_SYS_RESOURCE, and with control groups of either version.
CONFIGURATION = """\
[containers]
default_ulimits = []
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""
# Mount points that a build makes stay in the image, except in its /dev, which is no part of it.
BUILD_MOUNTS = "/dev/host"


class CannotBuild(Exception):  # noqa: N818 - reads as what it says
    """There is no podman or no image, and why."""


class Podman:
    """Commands over the storage in `place`. Containers share the host's network: bridges need what few machines let root do."""

    def __init__(self, place: Path) -> None:
        missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
        if missing:
            raise CannotBuild(f"the tests of the image need podman: apt-get install --no-install-recommends {' '.join(missing)} (or make apt)")
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        (place / "containers.conf").write_text(CONFIGURATION)

    def command(self, *arguments: str) -> list[str]:
        """The words that run `podman ARGUMENTS…` here."""
        return ["podman", f"--root={self.place / 'var/lib'}", f"--runroot={self.place / 'var/run'}", *arguments]

    def environment(self) -> dict[str, str]:
        """What its processes need to be run with."""
        return os.environ | {"CONTAINERS_CONF": str(self.place / "containers.conf")}

    def __call__(self, *arguments: str, check: bool = True, timeout: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run it to its end. With `check`, raises AssertionError with what it said when it fails."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0 or not check, f"podman {shlex.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def run(self, *command: str, options: tuple[str, ...] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `command` in a fresh container of the image, removed afterwards; without a network unless `options` say otherwise."""
        return self("run", "--rm", "--network=none", *options, "--entrypoint=", IMAGE, *command, check=check)

    def sweep(self) -> None:
        """Remove all pods, containers and volumes: those of this session, or what a session that was killed left."""
        self("pod", "rm", "--all", "--force", "--time=2")
        self("rm", "--all", "--force", "--time=2")
        self("volume", "rm", "--all", "--force")

    def build(self) -> None:
        """Have the image, as IMAGE, of the checkout as it is: a minute and a half the first time. Raises CannotBuild."""
        base = f"localhost/nvcache-test-base:{hashlib.sha256(repr(BASE).encode()).hexdigest()[:12]}"
        if self("image", "exists", base, check=False).returncode:
            self._base(base)
        settings, mounts = pip_configuration()
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as pip:
            pip.write(settings)
            pip.flush()
            self._build(base, f"--secret=id=pip.conf,src={pip.name}", *(f"--volume={path}:{BUILD_MOUNTS}{path}:ro" for path in mounts))

    def _base(self, name: str) -> None:
        sources = [str(HOST_SOURCES)] if HOST_SOURCES.exists() else []
        with tempfile.TemporaryDirectory(dir=self.place) as folder:
            archive = f"{folder}/base.tar"
            making = subprocess.run(
                ["mmdebstrap", "--quiet", *BASE, archive, *sources], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if making.returncode:
                raise CannotBuild(f"cannot make a base image: mmdebstrap ends with (was apt-get update run?)\n{making.stderr[-2000:]}")
            self("import", "--quiet", archive, name)

    def _build(self, base: str, *options: str) -> None:
        done = self(
            *("build", "--network=host", f"--build-arg=BASE={base}", f"--tag={IMAGE}", "--file=deploy/Containerfile", *options, "."),
            check=False,
            timeout=BUILD_SECONDS,
        )
        if done.returncode:
            raise CannotBuild(f"cannot build deploy/Containerfile: podman build ends with {(done.stdout + done.stderr)[-4000:]}")


@contextmanager
def session() -> Iterator[Podman]:
    """The cache's podman, for this process alone; others wait. Nothing of it runs afterwards."""
    place = Path(os.environ.get("NVCACHE_IMAGE_CACHE") or Path.home() / ".cache" / "nvcache-image")
    podman = Podman(place)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        podman.sweep()
        try:
            yield podman
        finally:
            podman.sweep()


def pip_configuration() -> tuple[str, list[Path]]:
    """This host's configuration of pip as a pip.conf for inside of a build, and the paths of this host that it names, which are to be mounted there.

    `pip config list` prints `ORIGIN.KEY='VALUE'`; variables (`:env:`) win over files. Constraints stay outside: the lock file has the versions.
    """
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=COMMAND_SECONDS
    ).stdout
    found = sorted((line.split("=", 1) for line in listing.splitlines()), key=lambda item: item[0].startswith(":env:"))
    wanted = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert")
    values = {key: ast.literal_eval(value) for origin, value in found if (key := origin.rpartition(".")[2]) in wanted}
    lines, mounts = ["[global]"], set()
    for key, value in values.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute():
                mounts.add(path.parent if key.endswith("index-url") else path)  # an index's pages link to what lies beside it
                word = word.replace(str(path), f"{BUILD_MOUNTS}{path}")  # noqa: PLW2901 - as it is called inside
            words.append(word)
        lines.append(f"{key} = {' '.join(words)}")
    return "\n".join([*lines, ""]), sorted(path for path in mounts if path.exists())
