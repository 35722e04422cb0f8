"""Digests: printed and read back, refused when they are not of their algorithm's form."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.digest import HEX_LENGTH, Algorithm, Digest, git_blob_header
from nvcache.errors import Code, RequestError


@given(st.sampled_from(Algorithm), st.data())
def test_digests_are_read_back(algorithm: Algorithm, data: st.DataObject) -> None:
    value = data.draw(st.text("0123456789abcdef", min_size=HEX_LENGTH[algorithm], max_size=HEX_LENGTH[algorithm]))
    digest = Digest(algorithm, value)
    assert Digest.parse(str(digest)) == digest
    assert Digest.parse(f"{algorithm}:{value.upper()}") == digest
    assert digest.short == value[:12]


@given(st.text(max_size=80) | st.text("sha256:0aG", max_size=80))
def test_any_text_is_refused_with_our_error(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except RequestError as error:
        assert str(error).startswith("cannot read ")  # noqa: PT017 - most texts are refused, some are not
    else:
        assert str(digest) == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        "sha1:" + "a" * 40,
        "SHA256:" + "a" * 64,
        "sha256:" + "a" * 63,
        "sha256:" + "g" * 64,
        "md5:" + "a" * 64,
        "md5:" + "a" * 31 + "\n",
    ],
)
def test_what_is_not_a_digest(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        Digest.parse(text)
    assert caught.value.code is Code.BAD_REQUEST


@pytest.mark.parametrize(
    ("content", "blob_id"),
    [(b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"), (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")],  # by git hash-object
)
def test_the_git_header_gives_the_id_that_git_gives(content: bytes, blob_id: str) -> None:
    assert hashlib.sha1(git_blob_header(len(content)) + content).hexdigest() == blob_id
