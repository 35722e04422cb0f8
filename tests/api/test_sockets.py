"""Binding sockets: modes, directories, stale and live predecessors, removal."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvcache.api import sockets
from nvcache.errors import Code, ConfigError


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(place: Path, mask: int) -> None:
    with umask(mask):
        pods = sockets.listen_unix(place / "a" / "b" / "pods.sock", 0o660)
        admin = sockets.listen_unix(place / "a" / "b" / "admin.sock", 0o600)
    assert mode(place / "a" / "b" / "pods.sock") == 0o660
    assert mode(place / "a" / "b" / "admin.sock") == 0o600
    assert mode(place / "a") == mode(place / "a" / "b") == 0o700
    for listener in (pods, admin):
        listener.remove()
    assert list((place / "a" / "b").iterdir()) == []


def test_directories_elsewhere_can_be_entered_by_pods(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PRIVATE_BASES", ())
    with umask(0o077):
        sockets.listen_unix(place / "run" / "nvcache" / "x.sock", 0o660).remove()
    assert mode(place / "run" / "nvcache") == 0o755


def test_a_directory_that_exists_keeps_its_mode(place: Path) -> None:
    (place / "s").mkdir(mode=0o750)
    (place / "s").chmod(0o750)
    sockets.listen_unix(place / "s" / "x.sock", 0o660).remove()
    assert mode(place / "s") == 0o750


def test_a_stale_socket_is_taken_over(place: Path) -> None:
    path = place / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = sockets.listen_unix(path, 0o660)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    listener.remove()


def test_a_socket_somebody_answers_on_is_left_alone(place: Path) -> None:
    path = place / "x.sock"
    first = sockets.listen_unix(path, 0o660)
    with pytest.raises(ConfigError, match="a daemon answers there") as caught:
        sockets.listen_unix(path, 0o660)
    assert caught.value.code is Code.SOCKET_IN_USE
    assert path.is_socket()
    first.remove()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(place: Path, kind: str) -> None:
    path = place / "x.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(place / "elsewhere.sock")
    with pytest.raises(ConfigError, match="something else than a socket") as caught:
        sockets.listen_unix(path, 0o660)
    assert caught.value.code is Code.SOCKET_IN_USE
    assert os.path.lexists(path)


def test_a_successor_s_socket_is_not_removed(place: Path) -> None:
    path = place / "x.sock"
    first = sockets.listen_unix(path, 0o660)
    path.unlink()
    second = sockets.listen_unix(path, 0o660)
    first.remove()
    assert path.is_socket()
    second.remove()
    second.remove()  # twice does no harm
    assert not path.exists()


def test_of_many_starting_at_once_one_gets_the_socket(place: Path) -> None:
    path = place / "x.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    won: list[sockets.Listener] = []
    lost: list[Code] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            won.append(sockets.listen_unix(path, 0o660))
        except ConfigError as error:
            lost.append(error.code)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert lost == [Code.SOCKET_IN_USE] * 7
    won[0].remove()


def test_a_directory_that_others_may_write_is_refused(place: Path) -> None:
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="others may write it"):
        sockets.listen_unix(place / "open" / "x.sock", 0o660)


def test_a_link_on_the_way_is_refused(place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    with pytest.raises(ConfigError, match="not a directory"):
        sockets.listen_unix(place / "link" / "x.sock", 0o660)


def test_a_path_too_long_for_a_socket_says_so(place: Path) -> None:
    with pytest.raises(ConfigError, match="too long") as caught:
        sockets.listen_unix(place / ("x" * 120), 0o660)
    assert caught.value.code is Code.BAD_CONFIG


@pytest.mark.parametrize("address", ["", "8080", ":8080", "localhost", "localhost:x", "localhost:99999", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="not host:port"):
        sockets.listen_tcp(address)


def test_a_port_in_use_is_refused() -> None:
    first = sockets.listen_tcp("127.0.0.1:0")
    with pytest.raises(ConfigError) as caught:
        sockets.listen_tcp(f"127.0.0.1:{first.sock.getsockname()[1]}")
    assert caught.value.code is Code.SOCKET_IN_USE
    first.remove()


def test_every_address_is_of_both_families() -> None:
    listener = sockets.listen_tcp("[::]:0")
    try:
        for host in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() and _has_address("::1") else [])):
            with socket.create_connection((host, listener.sock.getsockname()[1]), timeout=5) as caller:
                assert caller.getpeername()[0] == host
    finally:
        listener.remove()


def _has_address(host: str) -> bool:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def test_every_address_is_of_ipv4_where_the_kernel_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_ipv6", False)
    listener = sockets.listen_tcp("[::]:0")
    try:
        assert listener.sock.family is socket.AF_INET
        assert listener.url.startswith("http://0.0.0.0:")
    finally:
        listener.remove()
