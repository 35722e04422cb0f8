"""File names: none that is accepted can leave its directory or collide, and the listings of real repositories pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nvcache.core.names import check_name, check_names, unsafe
from nvcache.errors import Code, IntegrityError

NASTY = st.text(st.sampled_from("a./\\\0\n\u0085\ud800é-"), max_size=12)


@given(st.text(max_size=30) | NASTY)
@example("../x")
@example("a/../../x")
@example("/etc/passwd")
@example(".")
def test_an_accepted_name_stays_inside_and_can_be_created(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    if unsafe(path):
        with pytest.raises(IntegrityError) as caught:
            check_name(path)
        assert caught.value.code is Code.HOSTILE_NAME
        return
    root = tmp_path_factory.mktemp("names")
    target = root / path
    assert os.path.normpath(target) == str(target)
    assert Path(os.path.commonpath([root, target])) == root
    assert target != root
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    (found,) = (p for p in root.rglob("*") if p.is_file())
    assert str(found.relative_to(root)) == path


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "empty"),
        ("/a", "absolute"),
        ("a\\b", "backslash"),
        ("C:\\a", "backslash"),
        ("a\0", "control character"),
        ("a\nb", "control character"),
        ("a\x7f", "control character"),
        ("a\x9b", "control character"),
        ("a\u2028", "control character"),
        ("a\u202egnp.exe", "turns the direction of writing"),
        ("a\u2066", "turns the direction of writing"),
        ("..", "'..' segment"),
        ("a/../b", "'..' segment"),
        ("a/./b", "'..' segment"),
        ("a//b", "segment"),
        ("a/", "segment"),
        ("é" * 128, "longer than 255 bytes"),
        ("/".join(["a" * 200] * 6), "longer than 1024 bytes"),
        ("a\ud800", "not valid Unicode"),
    ],
)
def test_a_refusal_says_why(path: str, why: str) -> None:
    with pytest.raises(IntegrityError, match=why) as caught:
        check_name(path)
    assert str(caught.value).startswith("cannot store file ")


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["a.json", "a.json"], "listed twice"),
        (["Config.json", "config.json"], "differs from 'Config.json' only in case"),
        (["STRASSE", "straße"], "only in case"),
        (["a", "a/b"], "'a' is also a folder"),
        (["a/b/c", "A/b/d"], "folder 'A' differs from 'a' only in case"),
        (["a/b", "A"], "'a' is also a folder"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_names_that_collide_are_refused(paths: list[str], why: str, order: int) -> None:
    with pytest.raises(IntegrityError, match=why if order == 1 else "cannot store file") as caught:
        check_names(paths[::order])
    assert caught.value.code is Code.LISTING_CONFLICT


def test_real_listings_are_accepted() -> None:
    check_names(
        [
            ".gitattributes",
            "LICENSE",
            "README.md",
            "config.json",
            "generation_config.json",
            "model-00001-of-00004.safetensors",
            "model.safetensors.index.json",
            "original/consolidated.00.pth",
            "original/params.json",
            "text_encoder/model.fp16.safetensors",
            "1_Pooling/config.json",
            "assets/图 片 (1).png",
            "modeling_x.py",
            "a=b&c,d;e'f~g$h!i@j#k%l+m.txt",
        ]
    )


@given(st.lists(st.text("abAB/", min_size=1, max_size=5), max_size=6))
def test_an_accepted_listing_can_be_created_on_any_file_system(paths: list[str]) -> None:
    try:
        check_names(paths)
    except IntegrityError:
        return
    files = {path.casefold() for path in paths}
    folders = {str(folder).casefold() for path in paths for folder in Path(path).parents if str(folder) != "."}
    assert len(files) == len(paths)
    assert not files & folders
