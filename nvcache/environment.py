"""The process environment and what it alone decides: where the daemon's sockets are. The only reader of os.environ; it reads no file and no setting.

It is the light half of `settings`: commands that only talk to the daemon import this and start without the settings' machinery.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

SYSTEM_DIRECTORY = Path("/run/nvcache")


def current() -> Mapping[str, str]:
    """The environment as it is now."""
    return os.environ


def default_socket(env: Mapping[str, str], uid: int) -> Path:
    """Where a daemon run by `uid` listens unless told otherwise: the system's directory for root, the user's runtime directory for others."""
    if uid == 0:
        return SYSTEM_DIRECTORY / "nvcache.sock"
    runtime = env.get("XDG_RUNTIME_DIR")
    return Path(runtime or f"/tmp/nvcache-{uid}") / "nvcache" / "nvcache.sock"  # noqa: S108 - made 0700 and owner-checked by api.serve


def client_url(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """Where commands look for the daemon: `NVCACHE_URL`, else the socket in `NVCACHE_SOCKET`, else the default socket (admin first).

    A container that mounts the directory of the system's socket means that one, also before it is there: it may be up before the daemon.
    """
    env = os.environ if environ is None else environ
    if env.get("NVCACHE_URL"):
        return env["NVCACHE_URL"]
    if env.get("NVCACHE_SOCKET"):
        return unix_url(Path(env["NVCACHE_SOCKET"]))
    socket = default_socket(env, os.geteuid() if uid is None else uid)
    admin = socket.with_name("admin.sock")
    if os.access(admin, os.W_OK):
        return unix_url(admin)
    system = SYSTEM_DIRECTORY / "nvcache.sock"
    usable = os.access(system, os.W_OK) or (not os.access(system, os.F_OK) and SYSTEM_DIRECTORY.is_mount())
    return unix_url(system if usable and not os.access(socket, os.F_OK) else socket)


def unix_url(socket: Path) -> str:
    """The `unix://` URL of a socket."""
    return f"unix://{quote(str(socket.absolute()))}"
