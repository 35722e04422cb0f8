"""Digests beside the weights: what is written is read back, and what is not of their form is refused with the place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.published import Published, UnfinishedError, parse_sums

sha256s = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
copies = st.builds(
    Published,
    names.filter(str.isprintable),
    st.none() | st.text("0123456789abcdef", min_size=40, max_size=40),
    st.dictionaries(names, st.tuples(st.integers(0, 2**50), sha256s), max_size=5),
)
GOOD = {"nvcache_manifest": 1, "model": "hf://a/b", "commit": "c" * 40, "files": [{"path": "x", "size": 1, "sha256": "a" * 64}]}


@given(copies)
def test_a_manifest_is_read_back(copy: Published) -> None:
    assert Published.from_json(copy.to_json()) == copy
    assert Published(copy.model, copy.commit, dict(reversed(copy.files.items()))).to_json() == copy.to_json()


@given(
    st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_anything_else_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Published.from_json(data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"nvcache_manifest": 2}, "format 2"),
        ({"commit": "main"}, "no commit"),
        ({"files": [{"path": "x", "size": -1, "sha256": "a" * 64}]}, "-1"),
        ({"files": [{"path": "x", "size": 1, "sha256": "A" * 64}]}, "AAA"),
        ({"files": [*GOOD["files"], {"path": "x", "size": 2, "sha256": "a" * 64}]}, "twice"),  # type: ignore[misc]
        ({"files": None}, "form"),
        ({"model": 5}, "form"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Published.from_json(json.dumps({**GOOD, **change}).encode())


def test_an_unfinished_copy_is_no_copy() -> None:
    """It says what is being copied, and an older version refuses its format."""
    with pytest.raises(UnfinishedError) as caught:
        Published.from_json(Published("hf://a/b", "c" * 40, {}).unfinished_json())
    assert caught.value.model == "hf://a/b"


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9 ./*-]{0,15}", fullmatch=True), sha256s, max_size=5))
def test_sums_are_read_as_sha256sum_writes_them(sums: dict[str, str]) -> None:
    lines = [f"{digest}  {path}" if number % 2 else f"{digest.upper()} *./{path}" for number, (path, digest) in enumerate(sums.items())]
    found = parse_sums("\n".join(["# comment", *lines, ""]).encode())
    assert {path: digest.hex for path, digest in found.items()} == sums


@pytest.mark.parametrize("line", ["abc  file", f"{'a' * 64} file", f"\\{'a' * 64}  a\\nb", f"{'a' * 63}g  x"])
def test_a_line_that_is_none_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 of SHA256SUMS"):
        parse_sums(f"{'b' * 64}  good\n{line}\n".encode())
