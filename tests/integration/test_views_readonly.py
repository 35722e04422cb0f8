"""The views as a pod sees them: another user, a read-only bind mount, the unmodified libraries, no network."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcache.core.manifest import Manifest
from nvcache.store.layout import Layout
from tests.unit.store.helpers import COMMIT, make_ready, new_store, noise, sha256

TENSOR = noise(4 * 64 * 32, seed=3)
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, len(TENSOR)]}}).encode()
FILES = {
    "config.json": b'{"model_type": "test"}',
    "model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER + TENSOR,
    "sub/tokenizer.json": b"{}",
}

READER = """
import errno, hashlib, json, os, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HOME"] = "/nonexistent"
warnings.simplefilter("error")
import numpy
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
from safetensors import safe_open
from safetensors.numpy import load_file
store, commit = sys.argv[1:]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
assert os.geteuid() == 65534
hub = os.path.join(store, "hub")
found = {"files": {}, "denied": {}}
snapshot = snapshot_download("org/model", cache_dir=hub, local_files_only=True)
assert snapshot == snapshot_download("org/model", revision=commit, cache_dir=hub, local_files_only=True)
assert hf_hub_download("org/model", "sub/tokenizer.json", cache_dir=hub, local_files_only=True) == snapshot + "/sub/tokenizer.json"
scan = scan_cache_dir(hub)
found["warnings"] = [str(warning) for warning in scan.warnings]
found["repos"] = [repo.repo_id for repo in scan.repos]
flat = os.path.join(store, "models", "hf--org--model", commit)
for view in (snapshot, flat):
    tensor = load_file(view + "/model.safetensors")["w"]
    found.setdefault("tensors", []).append(hashlib.sha256(tensor.tobytes()).hexdigest())
    with safe_open(view + "/model.safetensors", framework="numpy") as file:
        assert file.get_tensor("w").shape == (64, 32)
    for folder, _, names in os.walk(view):
        for name in names:
            path = os.path.join(folder, name)
            assert not os.path.islink(path)
            found["files"][os.path.relpath(path, view)] = hashlib.sha256(open(path, "rb").read()).hexdigest()
for what, attempt in {
    "write": lambda: open(flat + "/config.json", "ab"),
    "create": lambda: open(flat + "/new", "wb"),
    "remove": lambda: os.unlink(snapshot + "/config.json"),
    "state": lambda: os.listdir(os.path.join(store, "state")),
    "ingest": lambda: os.listdir(os.path.join(store, "ingest")),
}.items():
    try:
        attempt()
    except OSError as error:
        found["denied"][what] = errno.errorcode[error.errno]
print(json.dumps(found))
"""


@pytest.fixture
def ready(tmp_path: Path) -> tuple[Layout, Manifest]:
    layout = new_store(tmp_path / "store")
    return layout, make_ready(layout, FILES)


@pytest.fixture
def mount_point() -> Iterator[Path]:
    """A directory that any user may enter; tests' own directories are private."""
    point = Path(tempfile.mkdtemp(prefix="nvcache-pod-"))
    point.chmod(0o755)
    yield point
    shutil.rmtree(point)


def as_a_pod(source: Path, point: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees `source` at `point`, read-only, in mounts of its own."""
    script = 'mount --bind -o ro "$1" "$2" && shift 2 && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(source), str(point), *argv], capture_output=True, text=True, check=False, timeout=120
    )


def test_another_user_loads_from_a_read_only_mount(ready: tuple[Layout, Manifest], mount_point: Path) -> None:
    layout, _ = ready
    run = as_a_pod(layout.root, mount_point, sys.executable, "-c", READER, str(mount_point), COMMIT)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["warnings"] == []
    assert found["repos"] == ["org/model"]
    assert found["tensors"] == [sha256(TENSOR)] * 2
    assert found["files"] == {path: sha256(data) for path, data in FILES.items()}
    assert found["denied"] == {"write": "EACCES", "create": "EROFS", "remove": "EROFS", "state": "EACCES", "ingest": "EACCES"}


def test_a_pod_may_mount_just_the_model(ready: tuple[Layout, Manifest], mount_point: Path) -> None:
    layout, manifest = ready
    script = f"cd {mount_point} && cat config.json sub/tokenizer.json && sha256sum < model.safetensors"
    other = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    run = as_a_pod(layout.view(manifest.id), mount_point, *other, "sh", "-c", script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ['{"model_type":', '"test"}{}' + sha256(FILES["model.safetensors"]), "-"]
