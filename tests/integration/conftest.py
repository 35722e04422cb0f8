"""What several files of integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.hub import HubServer


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    """The module's own `server`, without what earlier tests asked of it or made it do."""
    server.requests.clear()
    yield server
    server.faults.clear()
