"""The documents people read first: every link inside the repository leads somewhere, and nothing speaks of one machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    inside = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in inside if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_speaks_of_one_machine(page: Path) -> None:
    assert re.findall(r"/(?:home|root)/\S*|nvcache-docs-\w+", page.read_text()) == []


def test_the_pages_are_there() -> None:
    names = {page.name for page in PAGES}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "api.md",
        "cli.md",
        "design.md",
        "errors.md",
        "metrics.md",
        "security.md",
        "settings.md",
    } <= names
