"""From blobs to files: what counts, as of when, at which revision, with which digest."""

from __future__ import annotations

import base64
import hashlib
import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.published import MANIFEST, SUMS, Published
from nvcache.core.ref import is_moment, parse_ref
from nvcache.errors import Code, IntegrityError, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.listing import Blob, Listing, Token, as_of, commit_of, metadata_sha256, padded, remote_files, some, stamp
from nvcache.sources.azure.place import place_of

SHA = hashlib.sha256(b"weights").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
PLACE = place_of(parse_ref("az://weights/models/llama"), Access())
DOING = "list az://weights/models/llama"


def at(second: float) -> str:
    """A moment as Azure writes it."""
    return stamp(datetime(2026, 1, 31, 12, tzinfo=UTC) + timedelta(seconds=second))


def blob(path: str, etag: str = "0x1", *, size: int = 7, modified: float = 0, **more: object) -> Blob:
    """A blob below the prefix."""
    return replace(Blob(f"llama/{path}", size, etag, at(modified)), **more)  # type: ignore[arg-type]


def listing(*blobs: Blob) -> Listing:
    """What they are together."""
    return Listing.of(blobs, "llama/", DOING)


def published(**files: str) -> Published:
    """A manifest of files of seven bytes."""
    return Published("hf://acme/llama", "c" * 40, {path.replace("_", "."): (7, sha) for path, sha in files.items()})


def digest_of(one: Blob, manifest: Published | None = None, sums: dict[str, Digest] | None = None) -> str:
    """The digest that its file gets."""
    (file,) = remote_files(PLACE, listing(one), manifest, sums or {}, DOING)
    return str(file.digest)


def test_folders_and_what_describes_the_model_are_no_files() -> None:
    """Markers of folders are nothing at all; the manifest and SHA256SUMS count into the revision."""
    model = (blob("b.json"), blob("a/w.safetensors"))
    markers = (blob("", size=0), blob("a", size=0, metadata={"Hdi_IsFolder": "true"}), blob("a/", size=0), blob("gone", deleted=True))
    found = listing(*model, *markers)
    assert list(found.files) == ["a/w.safetensors", "b.json"]
    assert found.revision == listing(*model).revision
    beside = listing(*model, blob(MANIFEST), blob(SUMS))
    assert list(beside.files) == list(found.files)
    assert (beside.manifest, beside.sums) == (blob(MANIFEST), blob(SUMS))
    assert beside.revision != found.revision


@pytest.mark.parametrize(
    "change", [{"etag": "0x2"}, {"size": 8}, {"version": at(0)}, {"snapshot": at(0)}, {"name": "llama/c.json"}], ids=lambda change: next(iter(change))
)
def test_any_change_is_another_revision(change: dict[str, object]) -> None:
    """Order and tier are none."""
    one, other = blob("a"), blob("b")
    before = listing(one, other)
    assert listing(other, replace(one, archived="archive")).revision == before.revision
    assert listing(replace(one, **change), other).revision != before.revision  # type: ignore[arg-type]


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(st.integers(0, 9), st.sampled_from("xyz")), max_size=5), st.randoms())
def test_a_revision_depends_on_the_content_only(content: dict[str, tuple[int, str]], random: object) -> None:
    """Not on the order of the pages."""
    blobs = [blob(path, etag, size=size) for path, (size, etag) in content.items()]
    shuffled = list(blobs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert listing(*shuffled) == listing(*blobs)
    assert len(listing(*blobs).revision) == 64


def test_a_name_that_is_listed_twice_and_a_blob_without_an_etag() -> None:
    """The first only if they disagree."""
    assert list(listing(blob("a"), blob("a")).files) == ["a"]
    with pytest.raises(IntegrityError) as conflict:
        listing(blob("a"), blob("a", "0x2"))
    assert conflict.value.code is Code.LISTING_CONFLICT
    with pytest.raises(SourceError, match="without an ETag"):
        listing(blob("a", ""))


def test_too_many_files_are_refused() -> None:
    """The engine's limit."""
    with pytest.raises(SourceError, match="more than 100,000 files"):
        listing(*(blob(f"{number}") for number in range(100_001)))


def test_a_token_says_where_which_and_under_which_etag() -> None:
    """It is read back without asking, and differs between places that hold alike blobs."""
    one, snapshot = blob("w", "0x8D|x"), blob("v", snapshot=at(5))
    files = {file.path: file for file in remote_files(PLACE, listing(one, snapshot), None, {}, DOING)}
    where = hashlib.sha256(b"https://weights.blob.core.windows.net/models/llama/w").hexdigest()[:32]
    assert files["w"].token == f"az|{where}||0x8D|x"
    assert Token.of(files["w"]) == Token("az", "", "0x8D|x")
    assert Token.of(files["v"]) == Token("az", f"snapshot={at(5)}", "0x1")
    elsewhere = remote_files(place_of(parse_ref("az://other1/models/llama"), Access()), listing(one), None, {}, DOING)
    assert elsewhere[0].token != files["w"].token


@pytest.mark.parametrize(
    ("status", "archived", "returning"), [("", False, False), ("archive", True, False), ("rehydrate-pending-to-hot", True, True)]
)
def test_a_token_tells_what_lies_in_the_archive(status: str, archived: bool, returning: bool) -> None:
    """Without asking again."""
    (file,) = remote_files(PLACE, listing(blob("w", archived=status)), None, {}, DOING)
    assert (Token.of(file).archived, Token.of(file).returning) == (archived, returning)


def test_the_order_of_digests() -> None:
    """Manifest, SHA256SUMS, metadata, Content-MD5, nothing."""
    md5 = hashlib.md5(b"weights", usedforsecurity=False)
    one = blob("w.bin", metadata={"SHA256": OTHER}, md5=md5.digest())
    sums = {"w.bin": Digest(Algorithm.SHA256, "5" * 64)}
    assert digest_of(one, published(w_bin=SHA), sums) == f"sha256:{SHA}"
    assert digest_of(one, None, sums) == f"sha256:{'5' * 64}"
    assert digest_of(one) == f"sha256:{OTHER}"
    assert digest_of(replace(one, metadata={"sha256": "junk"})) == f"md5:{md5.hexdigest()}"
    assert digest_of(replace(one, metadata={}, md5=b"")) == "None"


@pytest.mark.parametrize(
    ("metadata", "digest"),
    [
        ({"sha256": SHA}, SHA),
        ({"Sha256": SHA.upper()}, SHA),
        ({"sha256": base64.b64encode(bytes.fromhex(SHA)).decode()}, SHA),
        ({"sha256": SHA, "SHA256": f" {SHA.upper()} "}, SHA),
        ({"sha256": SHA, "SHA256": OTHER}, None),
        ({"sha256": SHA, "SHA256": "junk"}, None),
        ({"sha256": SHA[:-1]}, None),
        ({"sha256": ""}, None),
        ({"sha-256": SHA}, None),
    ],
)
def test_sha256_in_metadata(metadata: dict[str, str], digest: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Hex or base64, in whatever case its name is written; what is no SHA-256 is passed over, and that is logged."""
    with caplog.at_level(logging.WARNING):
        found = metadata_sha256(blob("w", metadata=metadata))
    assert (found.hex if found else None) == digest
    assert bool(caplog.records) == (digest is None and "sha-256" not in metadata)


@given(st.text(max_size=100))
def test_any_metadata_is_a_digest_or_none(value: str) -> None:
    """It is free text of somebody else."""
    found = metadata_sha256(blob("w", metadata={"sha256": value}))
    assert found is None or len(found.hex) == 64


def test_a_file_that_is_named_and_missing() -> None:
    """A model that lacks a shard must not pass for a whole one; what describes it may name itself."""
    one = listing(blob("w"))
    for manifest, sums in ((published(w=SHA, x=SHA), {}), (None, {"x": Digest(Algorithm.SHA256, SHA)})):
        with pytest.raises(SourceError, match="names 'x', which is not there") as caught:
            remote_files(PLACE, one, manifest, sums, DOING)
        assert caught.value.code is Code.FILE_NOT_FOUND
    itself = {SUMS: Digest(Algorithm.SHA256, OTHER), MANIFEST: Digest(Algorithm.SHA256, OTHER)}
    assert len(remote_files(PLACE, one, None, itself, DOING)) == 1


def test_a_manifest_of_another_size() -> None:
    """One of the two is of another model."""
    with pytest.raises(IntegrityError, match="has 8 bytes, and 7 by") as caught:
        remote_files(PLACE, listing(blob("w", size=8)), published(w=SHA), {}, DOING)
    assert caught.value.code is Code.LISTING_CONFLICT


def test_a_commit_is_believed_of_an_exact_copy_only() -> None:
    """Every file in the manifest, and every file of the manifest there."""
    one, two = blob("w"), blob("x")
    assert commit_of(listing(one, two), published(w=SHA, x=SHA)) == "c" * 40
    assert commit_of(listing(one, two), published(w=SHA)) is None
    assert commit_of(listing(one), published(w=SHA, x=SHA)) is None
    assert commit_of(listing(one), None) is None


def names(blobs: list[Blob]) -> dict[str, str]:
    """ETags by path."""
    return {blob.name.removeprefix("llama/"): blob.etag for blob in blobs}


def test_versions_as_of_a_time() -> None:
    """The newest that is not newer; what came later is left out."""
    blobs = [
        blob("w", "1", version=at(0), modified=0),
        blob("w", "2", version=at(10), modified=10),
        blob("w", "3", version=at(20), modified=20),
        blob("late", "4", version=at(15), modified=15),
    ]
    assert names(as_of(blobs, at(12)[:-3] + "Z", DOING)) == {"w": "2"}
    assert names(as_of(blobs, "2026-01-31T12:00:16Z", DOING)) == {"w": "2", "late": "4"}
    assert names(as_of(blobs, "2026-01-31T12:00:20Z", DOING)) == {"w": "3", "late": "4"}
    assert names(as_of(blobs, at(10), DOING)) == {"w": "2"}


def test_snapshots_as_of_a_time() -> None:
    """The blob itself where it is old enough, even if it was overwritten in the second of its snapshot; a snapshot like it is the firmer ground."""
    now, kept = blob("w", "2", modified=10), blob("w", "1", snapshot=at(10.5), modified=3)
    assert names(as_of([kept, now], at(10.5), DOING)) == {"w": "1"}
    assert names(as_of([now, kept], "2026-01-31T12:00:11Z", DOING)) == {"w": "2"}
    alike = blob("w", "2", snapshot=at(30), modified=10)
    assert as_of([alike, now], "2026-01-31T12:00:40Z", DOING) == [alike]
    assert as_of([alike, now], "2026-01-31T12:00:20Z", DOING) == [now]


def test_an_id_that_nothing_has() -> None:
    """Seven decimals are an id; the newest blob before it is named. A blob's own time is no id."""
    blobs = [blob("w", "1", snapshot=at(10)), blob("w", "2", modified=20)]
    for text in (at(10.000001), at(20)):
        with pytest.raises(SourceError, match="the newest blob before it is of") as caught:
            as_of(blobs, text, DOING)
        assert caught.value.code is Code.REVISION_NOT_FOUND
        assert not caught.value.retryable


def test_a_time_before_everything() -> None:
    """The oldest is named."""
    with pytest.raises(SourceError, match=f"the oldest blob there is of {at(5)}") as caught:
        as_of([blob("w", modified=5), blob("x", modified=6)], "2026-01-31T12:00:00Z", DOING)
    assert caught.value.code is Code.REVISION_NOT_FOUND
    with pytest.raises(SourceError, match="there are no blobs"):
        as_of([], "2026-01-31T12:00:00Z", DOING)


MOMENTS = st.datetimes(timezones=st.just(UTC)).filter(lambda moment: 1000 <= moment.year < 9999)


@given(MOMENTS, MOMENTS)
def test_moments_sort_as_text(one: datetime, two: datetime) -> None:
    """Also from another time zone, and as a reference writes them."""
    assert (stamp(one) <= stamp(two)) == (one <= two)
    assert is_moment(stamp(one))
    assert stamp(one.astimezone(timezone(timedelta(hours=-7)))) == stamp(one)
    assert padded(f"{stamp(one)[:-1].rstrip('0').rstrip('.')}Z") == padded(stamp(one)) == stamp(one)


def test_some_names_for_a_message() -> None:
    """A few, quoted."""
    assert some(["a", "b\n"], 2) == "'a', 'b\\n'"
    assert some(["a", "b", "c"], 2) == "'a', 'b' and more"
