"""How the page for people is served: to whom, with which headers, and that nothing in it comes from elsewhere. A browser tests what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources

import pytest

from nvcache.api import page
from nvcache.settings import Settings
from tests.api.harness import Daemon

SHEETS = page.sheets()
ADDRESS = re.compile(r"""(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w""")


class _Elements(HTMLParser):
    """Every element of the page with its attributes, and what stands between script and style tags."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.mark.parametrize("path", SHEETS)
def test_every_file_is_there_on_the_socket(daemon: Daemon, path: str) -> None:
    answer = daemon.ask("GET", path)
    assert (answer.status, answer.data) == (200, SHEETS[path].content)
    assert answer.headers["content-type"] == SHEETS[path].media_type
    for name, value in page.HEADERS.items():
        assert answer.headers[name.lower()] == value


def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inline(daemon: Daemon) -> None:
    policy = daemon.ask("GET", "/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    assert not [part for part in policy.split("; ")[1:] if "'none'" not in part and part != "require-trusted-types-for 'script'"]


def test_over_tcp_anybody_may_have_it_and_nobody_what_it_shows(guarded: Daemon) -> None:
    for path in SHEETS:
        assert guarded.tcp("GET", path).status == 200
    assert guarded.tcp("GET", "/v1/models").status == 401


def test_where_tcp_has_metrics_alone_there_is_no_page(settings_of: Callable[..., Settings]) -> None:
    with Daemon(settings_of(listen="127.0.0.1:0", listen_scope="metrics")) as daemon:
        for path in SHEETS:
            assert (daemon.tcp("GET", path).status, daemon.tcp("GET", path).code) == (403, "not-allowed")
            assert daemon.ask("GET", path).status == 200


def test_it_only_looks(daemon: Daemon) -> None:
    for method in ("POST", "PUT", "DELETE"):
        answer = daemon.ask(method, "/")
        assert (answer.status, answer.headers["allow"]) == (405, "GET")
    asked = {word for sheet in SHEETS.values() for word in re.findall(r"method:", sheet.content.decode())}
    assert asked == set(), "fetch without a method is GET"


def test_all_of_it_is_ours() -> None:
    """No file of the directory is left out, none names another host, and all that the page names is among them."""
    files = {f"/{file.name}" for file in resources.files(page).iterdir() if file.name.rpartition(".")[2] not in ("py", "html", "__pycache__")}
    assert files == set(SHEETS) - {"/"}
    for path, sheet in SHEETS.items():
        assert ADDRESS.findall(sheet.content.decode()) == [], path
    elements = _Elements()
    elements.feed(SHEETS["/"].content.decode())
    named = {str(attributes[name]) for tag, attributes in elements.found for name in ("src", "href") if name in attributes}
    assert {f"/{name}" for name in named if not name.startswith("#")} <= set(SHEETS)
    assert elements.inline == ""
    assert [name for _, attributes in elements.found for name in attributes if name.startswith("on") or name == "style"] == []
    imported = {f"/{name}" for sheet in SHEETS.values() for name in re.findall(r'from "\./([\w.]+)"', sheet.content.decode())}
    assert imported <= set(SHEETS)


def test_the_api_s_document_does_not_speak_of_it(daemon: Daemon) -> None:
    assert not set(daemon.ask("GET", "/openapi.json").json["paths"]) & set(SHEETS)
