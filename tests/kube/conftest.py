"""The image and a podman to run it, once a session, and a node of a cluster of ours. What cannot be had fails with what to install; nothing skips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kube.signalled import NODE, Bed
from tests.support.kubeapi import KubeApi
from tests.support.podman import CannotBuild, Podman, session
from tests.support.tls import Tls, make_tls


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """podman with the image of this checkout in its storage."""
    try:
        with session() as podman:
            podman.build()
            yield podman
    except CannotBuild as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """One certificate for all."""
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def api(tls: Tls) -> Iterator[KubeApi]:
    """A cluster with one node."""
    with KubeApi(tls) as api:
        api.add_node(NODE)
        yield api


@pytest.fixture
def bed(tmp_path: Path, api: KubeApi) -> Bed:
    """A node and its cluster."""
    return Bed(tmp_path, api)
