"""Makes stores, ingests and manifests for the tests of nvcache.store. It checks nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from nvcache.core.digest import Algorithm, Digest, git_blob_header
from nvcache.core.manifest import Check, File, Manifest
from nvcache.core.plan import FillPlan, RemoteFile
from nvcache.core.ref import parse_ref
from nvcache.store.blobs import Blobs
from nvcache.store.catalog import Catalog
from nvcache.store.files import aligned_buffer, round_up
from nvcache.store.ingest import Ingest, ingest_key
from nvcache.store.layout import Layout
from nvcache.store.root import Root
from nvcache.store.views import Views

CHUNK = 64 * 1024
COMMIT = "c" * 40


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def new_store(path: Path) -> Layout:
    """A store made and let go."""
    root = Root.open(path)
    root.close()
    return root.layout


def write_chunk(ingest: Ingest, data: bytes, index: int) -> None:
    piece = data[index * ingest.chunk_size : index * ingest.chunk_size + ingest.length_of(index)]
    buffer = aligned_buffer(round_up(ingest.chunk_size))
    buffer[: len(piece)] = piece
    ingest.write(index, memoryview(buffer), len(piece), xxhash.xxh3_64_intdigest(piece))


def fill(ingest: Ingest, data: bytes, chunks: Iterable[int] | None = None) -> None:
    for index in range(ingest.count) if chunks is None else chunks:
        write_chunk(ingest, data, index)


def add_blob(layout: Layout, data: bytes) -> str:
    """Commit `data` as a blob, the way a worker does."""
    digest = sha256(data)
    ingest = Ingest.open(layout, ingest_key(digest, len(data)), len(data), chunk_size=CHUNK)
    try:
        fill(ingest, data)
        ingest.commit(digest)
    finally:
        ingest.close()
    return digest


def chunk_digests(data: bytes, chunk_size: int = CHUNK) -> bytes:
    return b"".join(xxhash.xxh3_64_intdigest(data[at : at + chunk_size]).to_bytes(8, "little") for at in range(0, len(data), chunk_size))


def file_of(path: str, data: bytes) -> File:
    """A file of a manifest: safetensors count as LFS, the rest as plain git files."""
    if path.endswith(".safetensors"):
        return File(path, len(data), sha256(data), Check.LFS_SHA256, Digest(Algorithm.SHA256, sha256(data)), chunk_digests(data))
    blob_id = hashlib.sha1(git_blob_header(len(data)) + data).hexdigest()
    return File(path, len(data), sha256(data), Check.GIT_SHA1, Digest(Algorithm.GIT_SHA1, blob_id), chunk_digests(data))


def manifest_of(files: Mapping[str, bytes], *, repo: str = "org/model", commit: str = COMMIT) -> Manifest:
    return Manifest(
        ref=parse_ref(f"hf://{repo}@{commit}"),
        asked=f"hf://{repo}",
        endpoint="http://hub.test",
        files=tuple(file_of(path, data) for path, data in files.items()),
        verified_at="2025-01-01T00:00:00Z",
        version="0",
        chunk_size=CHUNK,
    )


def plan_of(files: Mapping[str, bytes], *, repo: str = "org/model", commit: str = COMMIT) -> FillPlan:
    return FillPlan(
        ref=parse_ref(f"hf://{repo}@{commit}"),
        asked=f"hf://{repo}",
        endpoint="http://hub.test",
        files=tuple(RemoteFile(path, len(data), sha256(data), Digest(Algorithm.SHA256, sha256(data))) for path, data in files.items()),
        names=("main",),
    )


def make_ready(layout: Layout, files: Mapping[str, bytes], *, hub_id: str | None = "org/model", commit: str = COMMIT) -> Manifest:
    """Blobs, views and manifest of one entry."""
    manifest = manifest_of(files, repo=hub_id or "org/model", commit=commit)
    for data in files.values():
        add_blob(layout, data)
    Views(layout, Blobs(layout)).publish(manifest, hub_id=hub_id, names=["main"])
    Catalog(layout).write_manifest(manifest)
    return manifest


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path → content of every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
