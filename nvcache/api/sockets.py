"""The listening sockets: bound, chmod'ed and removed by us. It accepts nothing and knows no HTTP.

A Unix socket's path is taken over only from a socket that provably nobody answers on, under a lock on its directory that is held until the new socket
listens; and it is removed at the end only while it is still the one that was made here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvcache.errors import Code, ConfigError

PRIVATE_BASES = (Path("/tmp"), Path("/var/tmp"), Path("/run/user"))  # noqa: S108 - directories below are made 0700 and must be our own
BACKLOG = 1024
ANSWER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket, and for a Unix socket where it is and which inode it made."""

    sock: socket.socket
    path: Path | None = None
    inode: tuple[int, int] = (0, 0)

    @property
    def url(self) -> str:
        """Where it listens, as clients write it; with the port that was really bound."""
        if self.path is not None:
            return f"unix://{self.path}"
        host, port = self.sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def remove(self) -> None:
        """Close it, and unlink its path if that is still ours."""
        self.sock.close()
        if self.path is None:
            return
        try:
            if _inode(self.path) == self.inode:
                self.path.unlink()
        except FileNotFoundError:
            pass  # somebody was faster


def listen_unix(path: Path, mode: int) -> Listener:
    """Listen on `path` with exactly `mode`, making its directory if need be.

    Raises `ConfigError`: socket-in-use when somebody answers there or it is no socket; bad-config when the path cannot be used at all.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_directory(path.parent)
        with _locked(path.parent):
            _clear(path)
            # Linux gives the new inode the socket's own mode less the umask, so it is never more open than `mode`; chmod then undoes the umask.
            os.fchmod(sock.fileno(), mode)
            sock.bind(str(path))
            path.chmod(mode)
            sock.listen(BACKLOG)
            return Listener(sock, path, _inode(path))
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise ConfigError(Code.BAD_CONFIG, f"cannot listen on socket {path}: {why}") from error
    except ConfigError:
        sock.close()
        raise


def listen_tcp(address: str) -> Listener:
    """Listen on `host:port` or `[v6]:port`; `[::]` is every address, of IPv4 alone where the kernel has no IPv6.

    Raises `ConfigError`: socket-in-use, bad-config.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(Code.BAD_CONFIG, f"cannot listen on {address!r}: it is not host:port")
    host = host.removeprefix("[").removesuffix("]")
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 - what was asked for
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # whatever the node's bindv6only is
        sock.bind((host, int(port)))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        code = Code.SOCKET_IN_USE if error.errno == errno.EADDRINUSE else Code.BAD_CONFIG
        raise ConfigError(code, f"cannot listen on {address}: {error.strerror or error}") from error
    return Listener(sock)


def _make_directory(directory: Path) -> None:
    base = next((base for base in PRIVATE_BASES if directory.is_relative_to(base)), None)
    for step in reversed([directory, *directory.parents]):
        try:
            step.mkdir(mode=0o700)
        except FileExistsError:
            pass
        else:
            step.chmod(0o755 if base is None else 0o700)  # whatever the umask is
        if base is not None and step.is_relative_to(base) and step != base:
            _check_ours(step)


def _check_ours(step: Path) -> None:
    """Below a directory that anybody may write, a step that is a link or another user's could be swapped under us."""
    found = step.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(Code.BAD_CONFIG, f"cannot listen below {step}: it is not a directory")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(Code.BAD_CONFIG, f"cannot listen below {step}: it belongs to user {found.st_uid}")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise ConfigError(Code.BAD_CONFIG, f"cannot listen below {step}: others may write it")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(Code.SOCKET_IN_USE, f"cannot listen below {directory}: another daemon is starting there") from error
    finally:
        os.close(handle)


def _clear(path: Path) -> None:
    """Remove a socket that nobody answers on; anything else in the way stays."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            Code.SOCKET_IN_USE, f"cannot listen on socket {path}: something else than a socket is there", hint="remove it or choose another --socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass  # its backlog is full: somebody is there
    raise ConfigError(Code.SOCKET_IN_USE, f"cannot listen on socket {path}: a daemon answers there")


def _inode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
