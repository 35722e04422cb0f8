"""What every test may use. Being here puts the checkout on the path, so that `tests.support` can be imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def as_the_daemon_logs() -> Iterator[None]:
    """For a test that calls `logs.setup`: the root logger is put back as it was."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
