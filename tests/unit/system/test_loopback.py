"""Whose a connection within this machine is, by the kernel's own tables."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nvcache.system.loopback import owner


@pytest.mark.parametrize("mapped", [False, True])
def test_the_other_end_is_ours_until_it_is_closed(mapped: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = server.getsockname()
        address = ("::ffff:127.0.0.1", ours[1]) if mapped else ours
        with socket.socket(socket.AF_INET6 if mapped else socket.AF_INET) as client:
            client.connect(address)
            connection, theirs = server.accept()
            assert owner(theirs, ours) == os.geteuid()
            assert owner((theirs[0], theirs[1] ^ 1), ours) is None
        with connection:
            assert owner(theirs, ours) is None, "nobody has it any more, which the kernel writes as root"


def test_where_there_are_no_tables_nothing_is_known(tmp_path: Path) -> None:
    assert owner(("127.0.0.1", 1), ("127.0.0.1", 2), tmp_path) is None
