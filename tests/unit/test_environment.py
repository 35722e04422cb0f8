"""Where sockets are by default, and their URLs; test_settings has the precedence."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvcache.environment import default_socket, unix_url


@pytest.mark.parametrize(
    ("env", "uid", "expected"),
    [
        ({}, 0, "/run/nvcache/nvcache.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/nvcache/nvcache.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/nvcache/nvcache.sock"),
        ({}, 7, "/tmp/nvcache-7/nvcache/nvcache.sock"),
    ],
)
def test_default_sockets(env, uid, expected):
    assert default_socket(env, uid) == Path(expected)


def test_relative_and_odd_paths_become_urls(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert unix_url(Path("s.sock")) == f"unix://{tmp_path}/s.sock"
    assert unix_url(Path("/a%b c")) == "unix:///a%25b%20c"
