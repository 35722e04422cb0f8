"""nginx as Blob Storage answers Azure's own clients as the service does, as far as downloads need. It tests nothing of nvcache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError, ResourceModifiedError, ResourceNotFoundError
from azure.storage.blob import ContainerClient

from tests.support import azcopy
from tests.support.azure_nginx import CONTAINER, MIRRORED, PLAIN, PREFIXES, UPLOADED, NginxBlobs

SIZE = 9_000_000
RANGE = 4 * 2**20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files; one is more than azcopy and the SDK ask for at once."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "w.safetensors").write_bytes(os.urandom(SIZE))
    (directory / "sub/config.json").write_text("{}")
    return directory


@pytest.fixture(params=[False, True], ids=["http", "tls"])
def server(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NginxBlobs]:
    """Serving it."""
    with NginxBlobs(model, tmp_path / "nginx", tls=request.param) as server:
        yield server


@pytest.fixture
def container(server: NginxBlobs) -> Iterator[ContainerClient]:
    """The SDK, anonymously and without patience."""
    trust = str(server.ca_file) if server.ca_file else True
    with ContainerClient.from_container_url(f"{server.url}/{CONTAINER}", connection_verify=trust, retry_total=0) as container:
        yield container


def test_the_prefixes_differ_in_their_digests(container: ContainerClient, model: Path) -> None:
    """What the listing says of a file is what its properties say; the prefixes have the digests they are named for."""
    content = (model / "w.safetensors").read_bytes()
    found = {}
    for prefix in PREFIXES:
        listed = {blob.name: blob for blob in container.list_blobs(name_starts_with=f"{prefix}/", include=["metadata"])}
        assert set(listed) == {f"{prefix}/sub/config.json", f"{prefix}/w.safetensors"}
        blob = listed[f"{prefix}/w.safetensors"]
        told = container.get_blob_client(blob.name).get_blob_properties()
        assert (blob.size, blob.etag, blob.last_modified) == (told.size, told.etag.strip('"'), told.last_modified)
        assert (blob.metadata or {}, blob.content_settings.content_md5) == (told.metadata, told.content_settings.content_md5)
        found[prefix] = (told.metadata.get("sha256"), told.content_settings.content_md5)
    md5, sha256 = bytearray(hashlib.md5(content).digest()), hashlib.sha256(content).hexdigest()
    assert found == {MIRRORED: (sha256, md5), UPLOADED: (None, md5), PLAIN: (None, None)}
    assert len(list(container.list_blobs())) == 6


def test_ranges_and_their_md5(server: NginxBlobs, container: ContainerClient, model: Path) -> None:
    """Pieces arrive as the SDK asks for them; with `validate_content` it compares the MD5 of each, which goes wrong if one byte does."""
    file = model / "w.safetensors"
    content = file.read_bytes()
    for validate in (False, True):
        assert (
            container.download_blob(f"{PLAIN}/w.safetensors", offset=1, length=5_000_000, validate_content=validate).readall() == content[1:5_000_001]
        )
    assert (206, f"GET /account/models/{PLAIN}/w.safetensors", "bytes=1-5000000") in server.requests()
    assert sum(asked.startswith("bytes=") for _, _, asked in server.requests()) == 1 + 2  # the validated ones: 4 MiB and the rest
    with pytest.raises(HttpResponseError) as refused:
        container.get_blob_client(f"{PLAIN}/w.safetensors")._client.blob.download(range=f"bytes=0-{RANGE}", range_get_content_md5=True)
    assert refused.value.status_code == 400


def test_a_changed_blob_and_missing_ones_are_refused(container: ContainerClient) -> None:
    """412 for another ETag, 404 with the code that tells what is missing, 416 beyond the end."""
    blob = container.get_blob_client(f"{MIRRORED}/w.safetensors")
    etag = blob.get_blob_properties().etag
    assert len(blob.download_blob(0, 10, etag=etag, match_condition=MatchConditions.IfNotModified).readall()) == 10
    with pytest.raises(ResourceModifiedError) as changed:
        blob.download_blob(0, 10, etag='"another"', match_condition=MatchConditions.IfNotModified)
    with pytest.raises(ResourceNotFoundError) as missing:
        container.download_blob(f"{MIRRORED}/none")
    with pytest.raises(HttpResponseError) as beyond:
        blob.download_blob(SIZE, 10)
    assert [_code(refused.value) for refused in (changed, missing, beyond)] == ["ConditionNotMet", "BlobNotFound", "InvalidRange"]


def _code(error: HttpResponseError) -> str:
    """Azure's name for it."""
    code: str = error.error_code  # type: ignore[attr-defined]  # the SDK adds it
    return code


@pytest.mark.parametrize("server", [False], indirect=True, ids=["http"])
def test_azcopy_downloads_and_checks(server: NginxBlobs, model: Path, tmp_path: Path) -> None:
    """It takes every file, and with its check refuses one whose bytes are not those of its Content-MD5."""
    url = f"{server.url}/{CONTAINER}/{UPLOADED}?"
    azcopy.download(url, tmp_path / "got", tmp_path / "azcopy", check_md5=True)
    assert (tmp_path / "got/w.safetensors").read_bytes() == (model / "w.safetensors").read_bytes()
    assert (tmp_path / "got/sub/config.json").read_text() == "{}"
    file = model / "w.safetensors"
    stat = file.stat()
    with file.open("r+b") as spoilt:
        spoilt.write(bytes([file.read_bytes()[0] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the ETag stays
    azcopy.download(url, tmp_path / "unchecked", tmp_path / "azcopy")
    with pytest.raises(RuntimeError, match="cannot copy with azcopy"):
        azcopy.download(url, tmp_path / "checked", tmp_path / "azcopy", check_md5=True)
