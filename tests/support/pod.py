"""What a pod may do, without a container: another user, the store mounted read-only, no network unless asked for. It needs root and Linux; no cgroup.

Mounts are in a mount namespace of the process's own and end with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534  # user and group
CHECKOUT = Path(__file__).parents[2]
# "$1" is a fresh directory; each other argument is one that is covered by a layer of our own, whose mode and content we may change.
LAYERS = """set -eu
scratch=$1; shift
mount -t tmpfs tmpfs "$scratch"
for place; do
    mkdir -p "$scratch/$place/upper" "$scratch/$place/work"
    mount -t overlay -o "lowerdir=$place,upperdir=$scratch/$place/upper,workdir=$scratch/$place/work" overlay "$place"
    chmod o+x "$place"
done
"""


@contextmanager
def pods_place(parent: Path | None = None) -> Iterator[Path]:
    """A directory for `pod_command`, which any user may enter and whose group a socket in it inherits (docs/security.md); removed at the end."""
    place = Path(tempfile.mkdtemp(prefix="nvcache-", dir=parent))
    try:
        os.chown(place, 0, NOBODY)
        place.chmod(0o2755)
        for name, mode in {"pod": 0o777, "scratch": 0o755}.items():
            (place / name).mkdir()
            (place / name).chmod(mode)
        yield place
    finally:
        shutil.rmtree(place)


def pod_command(
    place: Path, command: list[str], *, node: str = "", change: tuple[str, ...] = (), needed: tuple[Path, ...] = (), network: bool = False
) -> list[str]:
    """What runs `command` as nobody in `place/pod`, which it may write; `place/store` is read-only. To be run by root.

    `node` is a shell script that root runs before, in the same mounts; in the directories of `change` it may write without a trace outside. `needed`
    is what must be reachable besides this checkout and its interpreter.
    """
    layers = (*_closed(Path(sys.base_prefix), Path(sys.prefix), CHECKOUT, place, *needed), *change)
    store, pod = shlex.quote(str(place / "store")), shlex.quote(str(place / "pod"))
    script = f"{LAYERS}{node}\nmount --bind -o ro {store} {store}\nmount -o remount,bind,ro {store}\ncd {pod}\n"
    script += f"exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups {shlex.join(command)}"
    return ["unshare", "--mount", *([] if network else ["--net"]), "sh", "-c", script, "sh", str(place / "scratch"), *layers]


def pod_environment(env: Mapping[str, str], *first: Path) -> dict[str, str]:
    """`env`, a home that does not exist, and a PATH that begins with `first` and this virtual environment."""
    return {"PATH": ":".join([*map(str, first), str(Path(sys.executable).parent), os.environ["PATH"]]), "HOME": "/nonexistent", **env}


def in_pod(
    place: Path,
    command: list[str],
    env: Mapping[str, str],
    *first: Path,
    node: str = "",
    change: tuple[str, ...] = (),
    network: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a `pod_command` in a `pod_environment` to its end."""
    return subprocess.run(
        pod_command(place, command, node=node, change=change, network=network),
        env=pod_environment(env, *first),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _closed(*needed: Path) -> list[str]:
    """The directories above what is needed that not everybody may pass, such as /root with an interpreter in it; outermost first."""
    above = {parent for path in needed for parent in path.resolve().parents}
    return [str(path) for path in sorted(above, key=lambda path: len(path.parts)) if not path.stat().st_mode & 0o001]
