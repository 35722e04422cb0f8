"""The OpenAPI document is whole, and the daemon answers as it says (schemathesis, a fixed seed, a bounded number of examples)."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from nvcache.api import schemas
from nvcache.settings import Settings
from tests.api.conftest import TOKEN
from tests.api.harness import Daemon
from tests.support.hub import HubServer

SCHEMATHESIS = str(Path(sysconfig.get_path("scripts")) / "schemathesis")
TCP = {"listen": "127.0.0.1:0", "listen_scope": "admin"}
CONFIG = """
[checks.negative_data_rejection]
expected-statuses = [400, 403, 404, 405, 413, 422]
"""
OPTIONS = [
    *("--phases", "examples,coverage,fuzzing"),
    *("--max-examples", "20"),
    *("--seed", "1"),
    *("--request-timeout", "20"),
    *("--checks", "all"),
    # a reference has more rules than a JSON schema can say, so a text of the right type may be refused
    *("--exclude-checks", "positive_data_acceptance"),
    "--continue-on-failure",
    # it goes on for as long as the daemon lives; test_timeline reads it
    *("--exclude-path", "/v1/events"),
    "--no-color",
]


def test_every_operation_is_described(daemon: Daemon) -> None:
    document = daemon.ask("GET", "/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) >= {
        "/v1/models",
        "/v1/models/{entry}",
        "/v1/models/{entry}/events",
        "/v1/models/{entry}/timeline",
        "/v1/models/{entry}/pin",
        "/v1/models/{entry}/verify",
        "/v1/models/{entry}/leases",
        "/v1/models/{entry}/leases/{lease}",
        "/v1/leases",
        "/v1/jobs",
        "/v1/jobs/{job}",
        "/v1/events",
        "/v1/space",
        "/v1/stripe",
        "/v1/sources",
        "/healthz",
        "/readyz",
        "/version",
        "/metrics",
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            assert any(status.startswith("2") for status in operation["responses"]), (method, path)
            assert "422" not in operation["responses"], "FastAPI's own error shape is never sent"
            for status in ("4XX", "5XX"):
                assert operation["responses"][status] == schemas.PROBLEM, (method, path)


@pytest.mark.parametrize("page", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_no_page_that_would_load_scripts_from_elsewhere(daemon: Daemon, page: str) -> None:
    assert daemon.ask("GET", page).status == 404


@pytest.mark.slow
def test_answers_conform_to_the_document(settings_of: Callable[..., Settings], model: str, place: Path) -> None:
    (place / "token").write_text(TOKEN)
    (place / "schemathesis.toml").write_text(CONFIG)
    with HubServer({}) as hub, Daemon(settings_of(hf_endpoint=hub.url, **TCP, listen_token_file=place / "token")) as daemon:
        daemon.ready(model)
        operations = sum(len(methods) for methods in daemon.ask("GET", "/openapi.json").json["paths"].values())
        port = daemon.listeners[-1].sock.getsockname()[1]
        command = [SCHEMATHESIS, "run", f"http://127.0.0.1:{port}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}", *OPTIONS]
        environment = {"PATH": os.environ["PATH"], "HOME": str(place)}
        found = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=place)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr
    assert f"Tested: {operations - 1}" in found.stdout
