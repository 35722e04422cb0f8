"""The plan of a copy: what is taken for there, what is refused before a byte is sent, and blocks that any file fits into."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.digest import Algorithm, Digest, git_blob_header
from nvcache.core.manifest import Selection
from nvcache.core.mirror import (
    BLOCK,
    METADATA,
    MOST_BLOCKS,
    Beside,
    MirrorPlan,
    Standing,
    block_id,
    block_size,
    content_type,
    metadata_of,
    plan_mirror,
)
from nvcache.core.plan import RemoteFile
from nvcache.core.published import MANIFEST, SUMS, Published
from nvcache.core.ref import parse_ref
from nvcache.errors import Code, NvcacheError

REF = parse_ref("acme/m@" + "c" * 40)
CONTENT = {"config.json": b"{}", "model.safetensors": b"weights", "sub/tokenizer.json": b"[]"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listed(path: str, content: bytes) -> RemoteFile:
    """As the Hub lists it: large files by SHA-256, others by git's id."""
    git = hashlib.sha1(git_blob_header(len(content)) + content).hexdigest()
    digest = Digest(Algorithm.SHA256, sha256(content)) if path.endswith(".safetensors") else Digest(Algorithm.GIT_SHA1, git)
    return RemoteFile(path, len(content), digest.hex, digest)


def stands(path: str, content: bytes) -> Standing:
    """The blob that a copy makes of it."""
    digest = listed(path, content).digest
    named = {name: algorithm for algorithm, name in METADATA.items()}
    digests = {named[name]: value for name, value in metadata_of(sha256(content), digest).items()}
    return Standing(len(content), f"0x{sha256(content)[:8]}", digests)


LISTING = [listed(path, content) for path, content in CONTENT.items()]
STANDING = {path: stands(path, content) for path, content in CONTENT.items()}
FINISHED = Published("hf://acme/m", "c" * 40, {path: (len(content), sha256(content)) for path, content in CONTENT.items()})
DONE = Beside("0xm", FINISHED, FINISHED.model)


def plan(standing: dict[str, Standing], beside: Beside = DONE, listing: list[RemoteFile] = LISTING, selection: Selection | None = None) -> MirrorPlan:
    return plan_mirror(REF, listing, selection or Selection(), standing, beside)


def test_what_stands_whole_is_not_sent() -> None:
    """And an empty destination gets everything; what is then written is what a finished copy says."""
    whole, nothing = plan(STANDING), plan({}, Beside())
    assert (whole.whole, whole.to_send, whole.bytes_to_send) == (True, (), 0)
    assert not nothing.whole
    assert [copy.state for copy in nothing.to_send] == ["send"] * 3
    assert nothing.bytes_to_send == nothing.size == sum(map(len, CONTENT.values()))
    assert whole.published({path: sha256(content) for path, content in CONTENT.items()}) == FINISHED


@pytest.mark.parametrize(
    "other",
    [
        Standing(7, "0x1"),  # overwritten by something that puts no metadata
        Standing(7, "0x1", {Algorithm.SHA256: sha256(b"strange")}),
        Standing(8, "0x1", {Algorithm.SHA256: sha256(b"weights")}),
    ],
)
def test_a_blob_is_known_by_its_size_and_metadata(other: Standing) -> None:
    """Whatever the manifest still says of it."""
    changed = plan({**STANDING, "model.safetensors": other})
    assert [(copy.file.path, copy.state) for copy in changed.to_send] == [("model.safetensors", "replace")]
    assert not changed.whole


def test_a_git_id_counts_where_the_hub_publishes_that() -> None:
    """The SHA-256 alone cannot be compared with it; and the other way round, there is nothing for the manifest."""
    sha = {**STANDING, "config.json": replace(STANDING["config.json"], digests={Algorithm.SHA256: sha256(b"{}")})}
    git = {**STANDING, "config.json": replace(STANDING["config.json"], digests={Algorithm.GIT_SHA1: LISTING[0].token})}
    for standing in (sha, git):
        assert [copy.file.path for copy in plan(standing).to_send] == ["config.json"]


def test_only_a_finished_copy_vouches() -> None:
    """Files that are there are proven by the manifest that names these bytes; by none that is unfinished or of others."""
    assert all(copy.proven for copy in plan(STANDING).files)
    for beside in (Beside(), Beside("0xm", model="hf://acme/m"), Beside("0xm", replace(FINISHED, files={}), "hf://acme/m")):
        assert not any(copy.proven for copy in plan(STANDING, beside).files)
        assert not plan(STANDING, beside).whole


def test_another_commit_is_another_manifest() -> None:
    """Also where no file differs."""
    other = replace(FINISHED, commit="d" * 40)
    assert not plan(STANDING, Beside("0xm", other, other.model)).whole
    assert plan(STANDING, Beside("0xm", other, other.model)).to_send == ()


def test_what_else_lies_there_is_named() -> None:
    """And the digests that a repository has of its own are left out, as they would be read as the copy's."""
    listing = [*LISTING, listed(SUMS, b"x"), listed(MANIFEST, b"{}"), listed("model.bin", b"old")]
    found = plan({**STANDING, "model-old.safetensors": Standing(1, "0x1")}, listing=listing)
    assert found.foreign == ("model-old.safetensors",)
    assert [left.path for left in found.left_out] == sorted([SUMS, MANIFEST, "model.bin"])


UNFINISHED = Beside("0xm", model="hf://acme/m")
THEIRS = {"config.json": Standing(7, "0x1"), "notes.md": Standing(1, "0x1")}
NEWER = {**STANDING, "config.json": stands("config.json", b"older"), "notes.md": Standing(1, "0x1")}


@pytest.mark.parametrize(
    ("standing", "beside", "strangers"),
    [
        ({}, Beside(), ()),
        (STANDING, Beside(), ()),  # the same files, whoever put them there
        (THEIRS, Beside(), ("config.json", "notes.md")),
        (THEIRS, Beside("0xm"), ("config.json", "notes.md")),  # beside a manifest that cannot be read
        ({"config.json": stands("config.json", b"tuned")}, Beside(), ("config.json",)),  # others put digests in metadata too
        (THEIRS, UNFINISHED, ()),
        (NEWER, DONE, ()),
        ({**STANDING, **THEIRS}, DONE, ("config.json",)),
    ],
)
def test_what_no_copy_of_the_model_put_there_is_a_stranger(standing: dict[str, Standing], beside: Beside, strangers: tuple[str, ...]) -> None:
    """Files beside a copy that was begun are not: the one that made it has told of them."""
    assert plan(standing, beside).strangers == strangers


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"selection": Selection(include=("*.gguf",))}, Code.BAD_REQUEST),
        ({"beside": Beside("0xm", model="hf://acme/other")}, Code.BAD_REQUEST),
        ({"standing": {"Config.json": Standing(1, "0x1")}}, Code.LISTING_CONFLICT),
        ({"standing": {"sub": Standing(1, "0x1")}}, Code.LISTING_CONFLICT),
        ({"listing": [*LISTING, listed("../x.safetensors", b"x")]}, Code.HOSTILE_NAME),
        ({"standing": {**STANDING, "model.safetensors": replace(STANDING["model.safetensors"], archived=True)}}, Code.ARCHIVED),
    ],
)
def test_what_readers_would_refuse_is_refused_first(change: dict[str, object], code: Code) -> None:
    with pytest.raises(NvcacheError) as caught:
        plan(**{"standing": STANDING, **change})  # type: ignore[arg-type]
    assert caught.value.code is code
    assert "acme/m" in str(caught.value) or code is Code.HOSTILE_NAME


def test_what_nobody_reads_by_default_is_in_nobodys_way() -> None:
    """Foreign files of other formats may have any name."""
    assert plan({**STANDING, "Config.json/x.bin": Standing(1, "0x1")}).foreign == ("Config.json/x.bin",)


@given(st.integers(0, 2**58))
def test_blocks_are_few_enough_and_no_larger_than_needed(size: int) -> None:
    block = block_size(size)
    assert block % BLOCK == 0
    assert -(-size // block) <= MOST_BLOCKS
    assert block == BLOCK or -(-size // (block - BLOCK)) > MOST_BLOCKS


@given(st.integers(0, MOST_BLOCKS - 1), st.integers(0, MOST_BLOCKS - 1), st.binary(), st.binary())
def test_a_block_is_named_by_its_place_and_bytes(one: int, two: int, a: bytes, b: bytes) -> None:
    """In the form that the service takes: equal lengths, 64 bytes at most."""
    first, second = block_id(one, sha256(a)), block_id(two, sha256(b))
    assert (first == second) == ((one, a) == (two, b))
    assert len(first) == len(second) <= 64
    assert len(base64.b64encode(first.encode())) == 64


def test_types() -> None:
    assert [content_type(name) for name in ("a/config.json", "model.safetensors", "README.md")] == [
        "application/json",
        "application/octet-stream",
        "application/octet-stream",
    ]
