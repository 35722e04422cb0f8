"""The documents people read first: every link inside the repository leads somewhere, nothing speaks of one machine, tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nvcache.core.disk_codes import DISK_CODES
from nvcache.core.disks import ALLOWED_MODELS, DENIED_MODELS
from nvcache.core.stripe import CASES
from nvcache.settings import TABLES, DiskSettings, QueueSettings, Settings
from scripts import gen_docs

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
        "disks.md",
        "errors.md",
        "metrics.md",
        "security.md",
        "settings.md",
        "troubleshooting.md",
    } <= names


def test_anchors_are_headings() -> None:
    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            target, _, anchor = link.partition("#")
            if anchor and "://" not in link:
                headings = re.findall(r"^#+ (.+)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, f"{page.name}: {link}"


def test_every_code_of_the_disks_has_its_remedy_in_troubleshooting() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    for code, facts in DISK_CODES.items():
        assert f"| `{code}` | {facts.meaning} | {facts.remedy} |" in page


def test_the_page_of_the_disks_has_every_case_and_model() -> None:
    page = (ROOT / "docs/disks.md").read_text()
    for case, texts in CASES.items():
        assert f"| `{case}` | {' | '.join(texts)} |" in page
    assert [model for model in ALLOWED_MODELS | DENIED_MODELS if f"`{model}`" not in page] == []


def test_codes_are_grouped_by_what_their_letter_stands_for() -> None:
    groups = gen_docs.disk_codes().split("\n\n**")
    assert [set(re.findall(r"^\| `([A-Z])\d\d`", group, re.MULTILINE)) for group in groups] == [{"D"}, {"N"}, {"P"}, {"W"}, {"R"}]
    assert len(re.findall(r"^\| `[A-Z]\d\d`", gen_docs.disk_codes(), re.MULTILINE)) == len(DISK_CODES)


def test_every_setting_is_in_one_table_with_its_kind_and_default() -> None:
    page = gen_docs.settings()
    general, _, tables = page.partition("\n## Queue settings\n")
    for name in set(Settings.model_fields) - set(TABLES):
        assert general.count(f"\n| `{name}` |") == 1
    disks = general.partition("## The node's disks")[2]
    assert re.findall(r"^\| `(\w+)` \|", disks, re.MULTILINE) == [name for name in DiskSettings.model_fields if name not in TABLES]
    queues = tables.partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", queues, re.MULTILINE) == list(QueueSettings.model_fields)
    assert re.findall(r"`\[tuning\.(\w+)\]`", queues) == ["md", "lvm", "disk"]
    assert "| `scheduler` | text | `none` |" in queues
    assert "| `rq_affinity` | `0`, `1`, `2` |  |" in queues
    assert "| `min_disk` | size | `100GiB` |" in disks
    assert "| `backend` | `directory`, `md`, `lvm` |  |" in disks
    assert "| `read_ahead` | size |  |" in disks


def test_only_what_stands_between_the_markers_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen_docs, "DOCS", tmp_path)
    begin, end = gen_docs.BEGIN.format("x"), gen_docs.END.format("x")
    (tmp_path / "page.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert gen_docs.filled("page.md", {"x": "new"}) == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    with pytest.raises(SystemExit, match=r"docs/page\.md: it lacks the markers <!-- generated: y -->"):
        gen_docs.filled("page.md", {"y": "new"})


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/*.svg")), ids=lambda picture: picture.name)
def test_pictures_say_what_they_show(picture: Path) -> None:
    drawn = ElementTree.parse(picture).getroot()
    named = {child.tag.rpartition("}")[2]: child.text for child in drawn}
    assert named["title"]
    assert named["desc"]
