"""The links for KAITO: ours are made and removed, nobody else's is touched, whatever stands there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.store.kaito import KaitoLinks


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where KAITO looks, with what an operator has there."""
    place = tmp_path / "models"
    (place / "baked").mkdir(parents=True)
    (place / "baked" / "config.json").write_text("{}")
    (place / "notes").write_text("mine")
    (place / "elsewhere").symlink_to("/srv/weights")
    (place / "older").symlink_to(tmp_path / "store" / "models" / "hf--org--older" / "1")
    return place


@pytest.fixture
def links(place: Path, tmp_path: Path) -> Iterator[KaitoLinks]:
    """The links, and afterwards the proof that what is not ours is as it was."""
    yield KaitoLinks(place, tmp_path / "store")
    assert (place / "baked" / "config.json").read_text() == "{}"
    assert (place / "notes").read_text() == "mine"
    assert os.readlink(place / "elsewhere") == "/srv/weights"
    assert os.readlink(place / "older") == str(tmp_path / "store/models/hf--org--older/1")


FOREIGN = ["baked", "elsewhere", "notes", "older"]


def test_links_lead_to_the_views_and_need_not_lead_anywhere_yet(links: KaitoLinks, place: Path, tmp_path: Path) -> None:
    assert links.make(["org-a", "org-b"]) == {}
    for name in ("org-a", "org-b"):
        assert os.readlink(place / name) == str(tmp_path / "store" / "kaito" / name)
    before = (place / "org-a").lstat()
    assert links.make(["org-a"]) == {}
    after = (place / "org-a").lstat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns), "a link that is right is left alone"
    links.remove(["org-a", "org-never"])
    assert sorted(child.name for child in place.iterdir()) == [*FOREIGN, "org-b"]
    links.make(["org-a"])
    links.keep(["org-b"])
    assert sorted(child.name for child in place.iterdir()) == [*FOREIGN, "org-b"]
    links.keep([])
    assert sorted(child.name for child in place.iterdir()) == FOREIGN


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_is_taken_is_refused_and_the_others_are_made(links: KaitoLinks, place: Path, name: str) -> None:
    lacking = links.make([name, "org-a"])
    assert list(lacking) == [name]
    assert str(place / name) in lacking[name]
    assert "did not make" in lacking[name]
    assert (place / "org-a").is_symlink()
    links.remove([name])
    links.keep([])


def test_one_of_ours_that_leads_to_another_of_our_views_is_put_right(links: KaitoLinks, place: Path, tmp_path: Path) -> None:
    (place / "org-a").symlink_to(tmp_path / "store" / "kaito" / "org-b")
    assert links.make(["org-a"]) == {}
    assert os.readlink(place / "org-a") == str(tmp_path / "store" / "kaito" / "org-a")


def test_the_store_s_name_on_the_node_is_what_counts(place: Path) -> None:
    (place / "org-a").symlink_to("/host/store/kaito/org-a")
    KaitoLinks(place, Path("/other")).keep([])
    assert (place / "org-a").is_symlink()
    KaitoLinks(place, Path("/host/store")).keep([])
    assert not (place / "org-a").is_symlink()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("a file")])
def test_without_the_directory_every_name_says_so_and_nothing_is_made(tmp_path: Path, make: object) -> None:
    place = tmp_path / "missing"
    make(place)  # type: ignore[operator]
    links = KaitoLinks(place, tmp_path / "store")
    assert links.make(["a", "b"]).keys() == {"a", "b"}
    assert str(place) in links.make(["a"])["a"]
    links.remove(["a"])
    links.keep([])
    assert not place.is_dir()


def test_what_may_not_be_written_is_said_for_each(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A test that runs as root is refused nothing by modes, so that the kernel's answer has to be given here."""
    links = KaitoLinks(place, tmp_path / "store")
    links.make(["org-b"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    assert links.make(["org-a", "org-b"]) == {"org-a": f"cannot make the link {place / 'org-a'}: Permission denied"}
    links.keep([])
    assert f"cannot remove the link {place / 'org-b'}: Permission denied" in caplog.text
