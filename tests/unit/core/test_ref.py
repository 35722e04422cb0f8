"""References: what is printed is read back, slugs are safe and distinct, and everything else is refused with the place."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nvcache.core.ref import (
    SLUG_LIMIT,
    EntryId,
    Ref,
    Scheme,
    SlugName,
    blobs_of,
    is_commit,
    parse_alias,
    parse_entry,
    parse_name,
    parse_pinned,
    parse_ref,
    shortened,
)
from nvcache.errors import Code, RequestError

commits = st.text("0123456789abcdef", min_size=40, max_size=40)
listings = st.text("0123456789abcdef", min_size=64, max_size=64)
branches = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,10}(/[A-Za-z0-9]{1,5})?", fullmatch=True)
hub_parts = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda part: "--" not in part and ".." not in part and not part.endswith(".git")
)
segments = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=12)
    | st.text("-=@ab.%?#: ", min_size=1, max_size=6)
    | commits
).filter(lambda part: part not in (".", ".."))
paths = st.lists(segments, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
hub_refs = st.builds(
    Ref, st.just(Scheme.HF), st.lists(hub_parts, min_size=1, max_size=2).map("/".join), st.none() | branches | commits | st.just("refs/pr/7")
)
file_refs = st.builds(Ref, st.just(Scheme.FILE), paths, st.none() | listings)
moments = st.datetimes().map(lambda moment: moment.isoformat(timespec="seconds") + "Z")
accounts = st.from_regex(r"[a-z0-9]{3,24}", fullmatch=True)
containers = st.from_regex(r"[a-z0-9](-?[a-z0-9]){2,20}", fullmatch=True) | st.sampled_from(["$root", "$web"])
prefixes = st.lists(segments, max_size=3).map(lambda parts: "".join(f"/{part}" for part in parts))
sites = st.sampled_from(["http://127.0.0.1:10000/acc", "http://[::1]/acc", "https://x.blob.core.chinacloudapi.cn", "http://x.blob.core.windows.net"])
blob_refs = st.builds(
    lambda where, container, prefix, revision: Ref(Scheme.AZ, f"{where}/{container}{prefix}", revision),
    accounts | sites,
    containers,
    prefixes,
    st.none() | listings | moments | st.from_regex(r"[0-9a-f]{7,39}", fullmatch=True),
)
refs = hub_refs | file_refs | blob_refs


def refused(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        parse_ref(text)
    assert caught.value.code is Code.BAD_REFERENCE
    assert str(caught.value).startswith("cannot read model reference ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "read", "parts"),
    [
        ("az://acct/cont/pre/fix", "az://acct/cont/pre/fix", (None, "acct", "cont", "pre/fix")),
        ("az://acct/cont/", "az://acct/cont", (None, "acct", "cont", "")),
        ("https://acct.blob.core.windows.net/cont/a%20b", "az://acct/cont/a%20b", (None, "acct", "cont", "a b")),
        ("https://ACCT.blob.core.windows.net:443/cont/p/", "az://acct/cont/p", (None, "acct", "cont", "p")),
        (
            "https://acct.blob.core.usgovcloudapi.net/cont/p",
            "https://acct.blob.core.usgovcloudapi.net/cont/p",
            ("https://acct.blob.core.usgovcloudapi.net", "acct", "cont", "p"),
        ),
        ("http://127.0.0.1:10000/dev/cont/p", "http://127.0.0.1:10000/dev/cont/p", ("http://127.0.0.1:10000/dev", "dev", "cont", "p")),
        ("http://azurite:10000/dev/cont", "http://azurite:10000/dev/cont", ("http://azurite:10000/dev", "dev", "cont", "")),
    ],
)
def test_where_blobs_are(text: str, read: str, parts: tuple[str | None, str, str, str]) -> None:
    ref = parse_ref(text)
    assert (str(ref), blobs_of(ref)) == (read, parts)
    assert parse_ref(f"{text}@2026-01-31T12:00:00.1234567Z").revision == "2026-01-31T12:00:00.1234567Z"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("az://acct", "az://account/container"),
        ("az://Acct/cont", "no storage account"),
        ("az://acct/c", "no container"),
        ("az://acct/a--b", "no container"),
        ("az://acct/cont/a//b", "empty"),
        ("az://acct/cont/../b", "'..'"),
        ("az://acct/cont@main", "no revision of blobs"),
        ("az://acct/cont/a%00b", "control"),
        ("https://huggingface.co/org/name", "org/name"),
        ("https://acct.blob.core.windows.net/", "container[/prefix]"),
        ("http://127.0.0.1:10000/dev", "account/container[/prefix]"),
        ("http://x:y/dev/cont", "no URL"),
        ("http:///cont", "no host"),
        ("ftp://acct/cont", "unknown scheme"),
    ],
)
def test_blobs_that_cannot_be_named(text: str, why: str) -> None:
    assert why in refused(text)


@pytest.mark.parametrize(
    "text",
    ["https://acct.blob.core.windows.net/cont?sv=1&sig=SECRET", "az://acct/cont/p?sig=SECRET", "https://user:SECRET@acct.blob.core.windows.net/cont"],
)
def test_a_secret_in_a_reference_is_not_repeated(text: str) -> None:
    assert "SECRET" not in refused(text)


@given(refs)
@example(Ref(Scheme.FILE, "/data/x@" + "a" * 64))
@example(Ref(Scheme.FILE, "/data/x@" + "a" * 64, "b" * 64))
@example(Ref(Scheme.FILE, "/%2F"))
def test_what_is_printed_is_read_back(ref: Ref) -> None:
    assert parse_ref(str(ref)) == ref
    assert parse_name(str(ref)) == ref


@given(hub_refs.filter(lambda ref: ref.scheme is Scheme.HF))
def test_the_scheme_of_the_hub_may_be_left_out(ref: Ref) -> None:
    assert parse_ref(str(ref).removeprefix("hf://")) == ref


@given(refs)
def test_slugs_are_safe_as_file_name_and_url_segment(ref: Ref) -> None:
    assert re.fullmatch(r"(hf|file|az)--[A-Za-z0-9_.=-]+", ref.slug)
    assert len(ref.slug.encode()) <= SLUG_LIMIT
    assert ref.slug == ref.at(None).slug == ref.at("a" * 40).slug


@given(refs, refs)
@example(Ref(Scheme.FILE, "/a/b"), Ref(Scheme.FILE, "/a--b"))
@example(Ref(Scheme.FILE, "/a-/b"), Ref(Scheme.FILE, "/a/-b"))
@example(Ref(Scheme.FILE, "/a=2Db"), Ref(Scheme.FILE, "/a-b"))
@example(Ref(Scheme.FILE, "/" + "x" * 300), Ref(Scheme.FILE, "/" + "x" * 301))
def test_two_models_never_share_a_slug(one: Ref, other: Ref) -> None:
    assert (one.slug == other.slug) == (one.base == other.base)


@given(st.lists(st.text("a-=/", min_size=1, max_size=5).map(lambda tail: f"/a{tail}"), unique=True, min_size=2))
def test_slugs_of_like_directories_differ(locations: list[str]) -> None:
    models = sorted({parse_ref(f"file://{location}") for location in locations}, key=lambda ref: ref.slug)
    assert all(one.slug != other.slug for one, other in pairwise(models))


@given(refs, commits | listings)
def test_entries_are_read_back(ref: Ref, revision: str) -> None:
    entry = EntryId(ref.slug, revision)
    assert parse_entry(str(entry)) == entry
    assert parse_name(ref.slug) == SlugName(ref.slug)
    assert is_commit(revision)


@given(st.text(max_size=40) | st.text("hf:/file@-.=a0%?#[]", max_size=30))
@example("file:///\ud800")
@example("file://[x/")
@example("file:///%00")
@example("hf://@")
@example("")
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_ref, parse_name, parse_entry, parse_pinned):
        found = read(parse, text)
        if found is not None and not isinstance(found, SlugName):
            assert read(parse, str(found)) == found


def read(parse: Callable[[str], object], text: str) -> object | None:
    """What `parse` makes of `text`, None where it refuses; anything but our error is a failure."""
    try:
        return parse(text)
    except RequestError:
        return None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("x" * 5000, "longer than 4096"),
        ("org/na\nme", "control character at position 6"),
        ("s3://bucket/x", "unknown scheme 's3' at position 0"),
        ("org/name/more", "too many '/'"),
        ("org//name", "too many '/'"),
        ("/name", "'' at position 0 is not a Hub name"),
        ("org/", "'' at position 4 is not a Hub name"),
        ("hf://org/na me", "'na me' at position 9 is not a Hub name"),
        ("hf://-/-", "'-' at position 5 is not a Hub name"),
        ("org/a--b", "'a--b' at position 4 is not a Hub name"),
        ("org/a..b", "is not a Hub name"),
        ("org/" + "a" * 97, "is not a Hub name"),
        ("org/name.git", "does not end in '.git'"),
        ("org/name@", "the revision at position 9 is empty"),
        ("org/name@a b", "the revision at position 9 is not a branch, tag or commit"),
        ("org/name@../x", "is not a branch, tag or commit"),
        ("org/name@-x", "is not a branch, tag or commit"),
        ("org/name@x.lock", "is not a branch, tag or commit"),
        ("org/name@a@b", "is not a branch, tag or commit"),
        ("file://dir", "three slashes"),
        ("file://localhost/dir", "three slashes"),
        ("file:///", "root directory"),
        ("file:///a/../b", "'..'"),
        ("file:///a/%2e%2e/b", "'..'"),
        ("file:///a%0Ab", "control character"),
        ("file:///a?b", "%3F"),
        ("file:///a#b", "%23"),
        ("file:///\ud800", "not valid Unicode"),
    ],
)
def test_a_refusal_says_where_it_went_wrong(text: str, why: str) -> None:
    assert why in refused(text)


def test_directories_are_read_as_people_write_them() -> None:
    assert parse_ref("file:///srv//models/./x/") == Ref(Scheme.FILE, "/srv/models/x")
    assert parse_ref("file:///srv/my%20model") == parse_ref("file:///srv/my model") == Ref(Scheme.FILE, "/srv/my model")
    assert parse_ref("file:///srv/v@1") == Ref(Scheme.FILE, "/srv/v@1")


def test_only_full_revisions_are_pinned() -> None:
    assert parse_ref("o/n@" + "a" * 40).pinned
    assert not parse_ref("o/n@" + "a" * 39).pinned
    assert not parse_ref("o/n").pinned
    assert parse_pinned("o/n@" + "a" * 40) == parse_ref("o/n@" + "a" * 40)
    with pytest.raises(RequestError, match="no full revision"):
        parse_pinned("o/n@main")
    with pytest.raises(TypeError):
        parse_pinned(None)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("o/n@cef110c", ("hf--o--n", "cef110c")),
        ("hf://o/n@" + "a" * 39, ("hf--o--n", "a" * 39)),
        ("hf--o--n@cef110c9f631", ("hf--o--n", "cef110c9f631")),
        ("file--srv--x@cef110c9f631", ("file--srv--x", "cef110c9f631")),
        ("file:///srv/x@cef110c9f631", ("file--srv--x", "cef110c9f631")),
        ("o/n@cef110", None),
        ("o/n@CEF110C", None),
        ("o/n@" + "a" * 40, None),
        ("o/n@main", None),
        ("o/n", None),
        ("hf--o--n", None),
        ("file:///@cef110c", None),
        ("file:///srv/@cef110c", None),
        ("file:///srv/x@" + "a" * 64, None),
    ],
)
def test_a_revision_may_be_cut_to_its_first_digits(text: str, read: tuple[str, str] | None) -> None:
    assert shortened(parse_name(text)) == read


def test_an_entry_s_revision_is_read_short_or_refused() -> None:
    assert parse_name("hf--o--n@cef110c") == SlugName("hf--o--n", "cef110c")
    for text in ("hf--o--n@main", "hf--o--n@cef110"):
        with pytest.raises(RequestError, match="position 8 is no revision, nor the first 7 digits or more of one"):
            parse_name(text)


@given(st.text("hf-abc@0", min_size=1, max_size=20))
def test_a_hub_name_is_never_taken_for_a_slug(text: str) -> None:
    assume("--" not in text)
    assert not isinstance(read(parse_name, text), SlugName)


@pytest.mark.parametrize("text", ["hf--o--n", "hf--o--n@main", "hf--o--n@" + "a" * 39, "o/n@" + "a" * 40, "hf--o--n@"])
def test_an_entry_has_a_full_revision(text: str) -> None:
    with pytest.raises(RequestError):
        parse_entry(text)


def test_an_alias_is_a_bare_hub_name() -> None:
    assert parse_alias("org/name") == "org/name"
    for text in ("hf://org/name", "org/name@main", "file:///x", "../x", "a/b/c", ""):
        with pytest.raises(RequestError):
            parse_alias(text)
