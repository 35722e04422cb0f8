"""Times the pure pieces that every look-up, start and chunk goes through. No limit is set: pytest-benchmark compares runs (``--benchmark-compare``).

``pytest bench --benchmark-enable``; without the option each runs once, which shows that it still works.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import random
from datetime import UTC, datetime

import pytest
import xxhash
from pytest_benchmark.fixture import BenchmarkFixture

from nvcache.api import wire
from nvcache.core import shards
from nvcache.core.digest import Algorithm, Digest
from nvcache.core.manifest import CHUNK, DIGEST_BYTES, Check, File, Manifest, chunk_count
from nvcache.core.ref import parse_ref
from nvcache.core.states import ModelState
from nvcache.engine.status import ModelStatus
from nvcache.store import journal

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARD = 5 * 10**9
SHARDS = 29  # a model of 70 billion parameters in bf16


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """A manifest as large models have: 29 shards of 5 GB."""
    source = random.Random(1)
    files = []
    for i in range(SHARDS):
        sha256 = source.randbytes(32).hex()
        chunks = source.randbytes(chunk_count(SHARD) * DIGEST_BYTES)
        files.append(File(f"model-{i + 1:05}-of-{SHARDS:05}.safetensors", SHARD, sha256, Check.LFS_SHA256, Digest(Algorithm.SHA256, sha256), chunks))
    ref = parse_ref(f"hf://bench/llama@{REVISION}")
    return Manifest(ref, "hf://bench/llama", "https://huggingface.co", tuple(files), "2026-01-01T00:00:00Z", "0.1.0")


@pytest.fixture(scope="module")
def chunk() -> mmap.mmap:
    """A chunk as a worker holds it: 16 MiB, page-aligned."""
    buffer = mmap.mmap(-1, CHUNK)
    buffer.write(random.Random(2).randbytes(CHUNK))
    return buffer


def test_parse_ref(benchmark: BenchmarkFixture) -> None:
    ref = benchmark(parse_ref, f"hf://meta-llama/Llama-3.3-70B-Instruct@{REVISION}")
    assert ref.pinned


def test_slug(benchmark: BenchmarkFixture) -> None:
    ref = parse_ref("hf://meta-llama/Llama-3.3-70B-Instruct")
    assert benchmark(lambda: ref.slug) == "hf--meta-llama--Llama-3.3-70B-Instruct"


def test_manifest_write(benchmark: BenchmarkFixture, manifest: Manifest) -> None:
    assert benchmark(manifest.to_json).startswith(b"{")


def test_manifest_read(benchmark: BenchmarkFixture, manifest: Manifest) -> None:
    assert benchmark(Manifest.from_json, manifest.to_json()) == manifest


def test_safetensors_header(benchmark: BenchmarkFixture) -> None:
    count, size = 1000, 2 * 1024 * 1024
    header = {f"model.layers.{i}.weight": {"dtype": "BF16", "shape": [1024, 1024], "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}
    text = json.dumps(header).encode()
    assert len(benchmark(shards.parse_header, text, 8 + len(text) + count * size, "model.safetensors")) == count


def test_journal_write(benchmark: BenchmarkFixture) -> None:
    assert len(benchmark(journal.good, "a-key", 7, 2**63)) == journal.RECORD_BYTES


def test_journal_read(benchmark: BenchmarkFixture) -> None:
    count = chunk_count(SHARD)
    data = journal.header("a-key", SHARD, CHUNK) + b"".join(journal.good("a-key", i, i) for i in range(count))
    found = benchmark(journal.decode, "a-key", data)
    assert found is not None
    assert len(found.chunks) == count


def test_xxh3_of_a_chunk(benchmark: BenchmarkFixture, chunk: mmap.mmap) -> None:
    benchmark.extra_info["bytes"] = CHUNK
    assert benchmark(xxhash.xxh3_64_intdigest, chunk) > 0


def test_sha256_of_a_chunk(benchmark: BenchmarkFixture, chunk: mmap.mmap) -> None:
    benchmark.extra_info["bytes"] = CHUNK
    assert len(benchmark(lambda: hashlib.sha256(chunk).digest())) == 32


def test_ready_answer(benchmark: BenchmarkFixture) -> None:
    status = ModelStatus(
        entry=f"hf--bench--llama@{REVISION}",
        ref=f"hf://bench/llama@{REVISION}",
        revision=REVISION,
        state=ModelState.READY,
        files=SHARDS,
        bytes=SHARDS * SHARD,
        path=f"/mnt/nvcache/store/models/hf--bench--llama/{REVISION}",
        hub_cache="/mnt/nvcache/store/hub",
        hub_id="bench/llama",
        verified_at="2026-01-01T00:00:00Z",
        last_used=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert json.loads(benchmark(wire.to_json, status))["state"] == "ready"
