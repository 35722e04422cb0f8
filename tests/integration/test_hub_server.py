"""The test Hub is believed only because the real client, unmodified, gets identical files from it."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub import HubServer, Repo

FILES = {
    "config.json": b"{}",
    "deep/er/tokenizer.json": random.Random(5).randbytes(50_000),
    "model.safetensors": random.Random(6).randbytes(3_000_000),
    **{f"many/{number:04d}.txt": b"%d" % number for number in range(60)},
}
DOWNLOAD = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download('acme/m', revision=sys.argv[1]))"


def download(endpoint: str, home: Path, revision: str, token: str) -> Path:
    environment = {"PATH": os.environ["PATH"], "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", DOWNLOAD, revision], env=environment, capture_output=True, text=True, check=True, timeout=120)
    return Path(done.stdout.strip())


@pytest.mark.parametrize("resolve_cache", [False, True])
def test_the_real_client_gets_identical_files(tmp_path, resolve_cache):
    repo = Repo(FILES, private=True)
    with HubServer({"acme/m": repo}, token="hf_right", page_size=10, resolve_cache=resolve_cache) as hub:
        snapshot = download(hub.url, tmp_path, "main", "hf_right")
        assert {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()} == FILES
        assert snapshot.name == repo.commit
        assert len(hub.seen("/api/models/acme/m/tree/*")) == 7  # 63 files and 3 folders by tens
        assert hub.seen(origin="cdn")
        assert all("authorization" not in request.headers for request in hub.seen(origin="cdn"))
        moved = repo.push({"config.json": b"{1}"})
        assert download(hub.url, tmp_path, "main", "hf_right").name == moved


def test_the_command_serves_a_directory_until_it_is_told_to_stop(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(FILES["model.safetensors"])
    command = [sys.executable, "-m", "tests.support.hub", "--dir", str(source), "--repo", "acme/m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as server:
        try:
            endpoint = server.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
            assert (download(endpoint, tmp_path / "home", "main", "t") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
