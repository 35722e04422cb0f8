"""Manifests and plans: what is written is read back, and nothing torn, foreign or hostile is."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import CHUNK, DIGEST_BYTES, Check, File, LeftOut, Manifest, Selection, chunk_count
from nvcache.core.plan import FillPlan, Priority, RemoteFile
from nvcache.core.ref import EntryId, parse_ref
from nvcache.errors import Code, IntegrityError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
hexes = {n: st.text("0123456789abcdef", min_size=n, max_size=n) for n in (32, 40, 64)}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
digests = st.one_of(*(st.builds(Digest, st.just(algorithm), hexes[n]) for algorithm, n in zip(Algorithm, (64, 40, 32), strict=True)))
names = st.lists(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}\.json)?", fullmatch=True), unique=True, max_size=4).filter(
    lambda found: not {name.partition("/")[0] for name in found if "/" in name} & set(found)
)
selections = st.builds(Selection, st.lists(texts, max_size=2).map(tuple), st.lists(texts, max_size=2).map(tuple))
left_out = st.lists(st.builds(LeftOut, texts, st.integers(0, 2**50)), max_size=2).map(tuple)
refs = st.sampled_from([parse_ref(f"hf://org/name@{COMMIT}"), parse_ref("file:///srv/a%20b@" + "0" * 64)])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    chunk = draw(st.sampled_from([1, 1000, CHUNK]))
    files = []
    for path in draw(names):
        size = draw(st.integers(0, chunk * 3))
        count = chunk_count(size, chunk) * DIGEST_BYTES
        files.append(
            File(
                path, size, draw(hexes[64]), draw(st.sampled_from(Check)), draw(st.none() | digests), draw(st.binary(min_size=count, max_size=count))
            )
        )
    return Manifest(
        ref=draw(refs),
        asked=draw(texts),
        endpoint=draw(texts),
        files=tuple(files),
        verified_at="2026-01-01T00:00:00Z",
        version=draw(texts),
        selection=draw(selections),
        left_out=draw(left_out),
        warnings=tuple(draw(st.lists(texts, max_size=2))),
        parsed=draw(st.booleans()),
        chunk_size=chunk,
    )


@st.composite
def plans(draw: st.DrawFn) -> FillPlan:
    remote = [RemoteFile(path, draw(st.integers(0, 2**50)), draw(texts), draw(st.none() | digests), draw(st.none() | texts)) for path in draw(names)]
    return FillPlan(
        ref=draw(refs),
        asked=draw(texts),
        endpoint=draw(texts),
        files=tuple(remote),
        selection=draw(selections),
        left_out=draw(left_out),
        names=tuple(draw(st.lists(texts, max_size=2))),
        alias=draw(st.none() | texts),
        pin=draw(st.booleans()),
        priority=draw(st.sampled_from(Priority)),
    )


@given(manifests())
def test_a_manifest_is_read_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(plans())
def test_a_plan_is_read_back(plan: FillPlan) -> None:
    assert FillPlan.from_json(plan.to_json()) == plan
    assert FillPlan.from_json(plan.with_priority(Priority.REPAIR).to_json()).priority is Priority.REPAIR


MANIFEST = Manifest(
    ref=parse_ref(f"org/name@{COMMIT}"),
    asked="hf://org/name",
    endpoint="https://huggingface.co",
    files=(
        File("config.json", 3, "a" * 64, Check.GIT_SHA1, Digest(Algorithm.GIT_SHA1, "c" * 40), b"12345678"),
        File("model.safetensors", CHUNK + 1, "b" * 64, Check.LFS_SHA256, Digest(Algorithm.SHA256, "b" * 64), b"12345678abcdefgh"),
        File("copy.safetensors", CHUNK + 1, "b" * 64, Check.FIRST_USE, None, b"12345678abcdefgh"),
    ),
    verified_at="2026-01-01T00:00:00Z",
    version="0.1.0",
)
PLAN = FillPlan(
    ref=MANIFEST.ref,
    asked="hf://org/name",
    endpoint="https://huggingface.co",
    files=(RemoteFile("config.json", 3, "c" * 40, Digest(Algorithm.GIT_SHA1, "c" * 40)), RemoteFile("m", 9, "t", Digest(Algorithm.SHA256, "b" * 64))),
)


def refused(cls: type[Manifest | FillPlan], data: bytes) -> str:
    with pytest.raises(IntegrityError) as caught:
        cls.from_json(data)
    assert caught.value.code is Code.DEGRADED
    assert str(caught.value).startswith("cannot read ")
    return str(caught.value)


def read(cls: type[Manifest | FillPlan], data: bytes) -> Manifest | FillPlan | None:
    """None where it is refused with the error that is promised; anything else that is raised fails the test."""
    try:
        return cls.from_json(data)
    except IntegrityError as error:
        return None if error.code is Code.DEGRADED else pytest.fail(str(error))


@pytest.mark.parametrize("kept", [MANIFEST, PLAN])
def test_every_torn_record_is_refused(kept: Manifest | FillPlan) -> None:
    data = kept.to_json()
    for length in range(len(data)):
        refused(type(kept), data[:length])
    refused(type(kept), bytes(len(data)))
    refused(type(kept), data + b"{}")


def every_place(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside parsed JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inner for place in every_place(item, (*here, key)))]


@pytest.mark.parametrize("kept", [MANIFEST, PLAN])
@pytest.mark.parametrize("junk", [None, True, -1, 1.5, "../../x", [], {}, [[]], "\ud800"])
def test_junk_in_any_place_never_raises_anything_else(kept: Manifest | FillPlan, junk: object) -> None:
    raw = json.loads(kept.to_json())
    for place in every_place(raw):
        changed: Any = json.loads(kept.to_json())
        if not place:
            refused(type(kept), json.dumps(junk).encode())
            continue
        *way, last = place
        target = changed
        for key in way:
            target = target[key]
        target[last] = junk
        read(type(kept), json.dumps(changed).encode())
        if isinstance(target, dict):
            del target[last]
            read(type(kept), json.dumps(changed).encode())


@given(st.recursive(st.none() | st.integers() | texts, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3)))
def test_any_json_is_refused(value: object) -> None:
    refused(Manifest, json.dumps(value).encode())
    refused(FillPlan, json.dumps(value).encode())


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(MANIFEST.to_json()), **fields}).encode()


def file(**fields: object) -> list[dict[str, object]]:
    return [{**json.loads(MANIFEST.to_json())["files"][0], **fields}]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (changed(format=2), "its format is 2, this version knows 1"),
        (changed(ref="hf://org/name"), "no full revision"),
        (changed(ref="nonsense://"), "unknown scheme"),
        (changed(chunk_size=0), "0 is no chunk size"),
        (changed(files=file(path="../../etc/passwd")), "'..' segment"),
        (changed(files=file() * 2), "listed twice"),
        (changed(files=file(sha256="../" + "a" * 61)), "not a SHA-256"),
        (changed(files=file(sha256="A" * 64)), "not a SHA-256"),
        (changed(files=file(size=-1)), "where a size is due"),
        (changed(files=file(size=True)), "where a size is due"),
        (changed(files=file(size=CHUNK + 1)), "not one digest for each chunk"),
        (changed(files=file(chunks="!")), "cannot read manifest"),
        (changed(files=file(check="a-hunch")), "a-hunch"),
        (changed(files=file(source="md5:xyz")), "not 32 hex digits"),
        (b"[" * 100_000, "cannot read manifest"),
        (b"{}", "it has no 'format'"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, why: str) -> None:
    assert why in refused(Manifest, data)


def test_what_a_manifest_knows() -> None:
    assert MANIFEST.id == EntryId("hf--org--name", COMMIT) == PLAN.id
    assert MANIFEST.size == 3 + 2 * (CHUNK + 1)
    assert MANIFEST.blobs == {"a" * 64: 3, "b" * 64: CHUNK + 1}
    assert MANIFEST.by_path["model.safetensors"].chunk_digest(1) == int.from_bytes(b"abcdefgh", "little")
    assert json.loads(MANIFEST.to_json())["files"][1]["chunks"] == base64.b64encode(b"12345678abcdefgh").decode()
    assert PLAN.size == 12
    assert [file.sha256 for file in PLAN.files] == [None, "b" * 64]


@given(st.integers(0, 2**50), st.integers(1, 2**30))
def test_chunks_cover_the_file(size: int, chunk: int) -> None:
    count = chunk_count(size, chunk)
    assert (count - 1) * chunk < size <= count * chunk or size == count == 0
