"""What pods do with the views: unmodified transformers, huggingface_hub and safetensors load from them offline, as another user, read-only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.hub import HubServer
from tests.support.models import make_llama
from tests.support.repo import Repo

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.manual_seed(0)
name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
ids = tokenizer("hello there", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "sum": float(logits.float().sum())}))
"""


@pytest.mark.slow
def test_transformers_loads_from_both_views(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_llama(source, 8 * 2**20, 3, seed=3)
    want = load(tmp_path, str(source), tmp_path)
    with HubServer({"acme/tiny": Repo.of_directory(source)}) as hub, DaemonProcess(tmp_path, hub.url) as daemon:
        warmed = daemon.cli("warm", "--json", "acme/tiny")
        assert warmed.returncode == 0, warmed.stderr
        model = json.loads(warmed.stdout)
        hub_repo = Path(model["hub_cache"])
    assert load(tmp_path, model["path"], tmp_path) == want
    assert load(tmp_path, "acme/tiny", hub_repo) == want


def load(place: Path, name: str, hub_cache: Path) -> dict[str, float]:
    """Load `name` in a process without the Hub, in which the store is mounted read-only."""
    store = place / "store"
    mount = f"mount --bind -o ro {store} {store} && mount -o remount,bind,ro {store} && " if store.exists() else ""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mount}exec "$0" "$@"', sys.executable, "-c", LOAD, name],
        env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache), "HOME": "/nonexistent", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer
