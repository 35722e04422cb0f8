"""What goes over the wire is what the OpenAPI document declares: the snapshots' fields and the schemas' are the same."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import BaseModel

from nvcache.api import schemas, wire
from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import Check, File, LeftOut, Manifest
from nvcache.core.ref import parse_ref
from nvcache.core.states import JobState, ModelState
from nvcache.engine import status
from nvcache.errors import Code, RequestError

PAIRS = [
    (status.ModelStatus, schemas.Model),
    (status.JobStatus, schemas.Job),
    (status.Progress, schemas.Progress),
    (status.LeaseStatus, schemas.Lease),
    (status.DryRun, schemas.DryRunView),
    (status.SpaceStatus, schemas.Space),
]
ERROR = status.ErrorInfo.of(RequestError(Code.LEASED, "cannot remove it: leased", facts={"holders": ["vllm-0"]}))
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone(timedelta(hours=2)))


@pytest.mark.parametrize(("snapshot", "schema"), PAIRS)
def test_schema_and_snapshot_have_the_same_fields(snapshot: type, schema: type[BaseModel]) -> None:
    assert {field.name for field in fields(snapshot)} == set(schema.model_fields)


def test_a_model_with_everything_in_it_fits_its_schema() -> None:
    model = status.ModelStatus(
        "hf--a--b@" + "1" * 40,
        "hf://a/b",
        "1" * 40,
        ModelState.FAILED,
        2,
        10,
        last_used=MOMENT,
        warnings=("odd",),
        progress=status.Progress(10, 5, 5, 2, 1, 2.5, 2.0),
        job="7",
        error=ERROR,
    )
    raw = json.loads(wire.to_json(model))
    assert raw["last_used"] == "2026-01-02T01:04:05.678Z"
    assert raw["error"]["holders"] == ["vllm-0"]
    assert raw["error"]["status"] == 409
    assert raw["warnings"] == ["odd"]
    schemas.Model.model_validate(raw)


def test_a_job_fits_its_schema() -> None:
    job = status.JobStatus("1", "fill", "hf://a/b", None, JobState.QUEUED, datetime.now(UTC), error=ERROR, bad_files=("x",))
    schemas.Job.model_validate(json.loads(wire.to_json(job)))


def test_a_manifest_is_told_without_its_chunk_digests() -> None:
    files = (
        File("config.json", 3, "a" * 64, Check.FIRST_USE, None, bytes(8)),
        File("w.safetensors", 9, "b" * 64, Check.LFS_SHA256, Digest(Algorithm.SHA256, "b" * 64), bytes(8)),
    )
    manifest = Manifest(
        parse_ref("hf://a/b@" + "1" * 40), "hf://a/b", "https://hub", files, "2026-01-01T00:00:00Z", "0", left_out=(LeftOut("x.bin", 4),)
    )
    raw = json.loads(wire.to_json(wire.manifest_view(manifest)))
    schemas.ManifestView.model_validate(raw)
    assert raw["checks"][0]["source"] is None
    assert raw["checks"][1]["source"] == f"sha256:{'b' * 64}"
    assert raw["left_out"] == [{"path": "x.bin", "size": 4}]
    assert wire.manifest_view(None) is None


def test_what_has_no_json_form_is_a_defect_not_a_guess() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        wire.to_json(object())


@pytest.mark.parametrize(
    ("wish", "ref"),
    [
        ({"ref": "a/b"}, "hf://a/b"),
        ({"ref": "a/b", "revision": "v1"}, "hf://a/b@v1"),
        ({"ref": "hf://a/b@v1", "revision": "v1"}, "hf://a/b@v1"),
        ({"ref": "file:///w/a%20b"}, "file:///w/a%20b"),
        ({"ref": "file:///w/a", "revision": "0" * 64}, "file:///w/a@" + "0" * 64),
    ],
)
def test_a_wish_names_one_revision(wish: dict[str, str], ref: str) -> None:
    assert str(schemas.Wish(**wish).to_request().ref) == ref


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"ref": "a/b@v1", "revision": "v2"}, Code.BAD_REQUEST),
        ({"ref": "a/b", "revision": "../x"}, Code.BAD_REFERENCE),
        ({"ref": "file:///w/a", "revision": "main"}, Code.BAD_REFERENCE),
        ({"ref": "a/b/c"}, Code.BAD_REFERENCE),
        ({"ref": "a/b", "alias": "hf://a/c"}, Code.BAD_REFERENCE),
        ({"ref": "a/b", "alias": "a/c@v1"}, Code.BAD_REFERENCE),
        ({"ref": "a/b", "alias": "../c"}, Code.BAD_REFERENCE),
    ],
)
def test_a_wish_that_cannot_be_read_is_refused(wish: dict[str, str], code: Code) -> None:
    with pytest.raises(RequestError) as caught:
        schemas.Wish(**wish).to_request()
    assert caught.value.code is code
