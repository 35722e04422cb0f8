"""The recipes of docs/recipes.md, block by block as they stand there, as a pod would run them: another user, a read-only store, no network."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.hub import HubServer
from tests.support.models import make_llama
from tests.support.pod import NOBODY, in_pod, pods_place
from tests.support.recipes import PAGE, recipes
from tests.support.repo import Repo

RECIPES = recipes()
PYTHON = ("python", "transformers-directory", "runai")
FROM_MODEL = "tensors = model.state_dict()\n"
DIGEST = """
import hashlib, torch
digest = hashlib.sha256()
for name in sorted(tensors):
    digest.update(name.encode() + bytes(tensors[name].detach().contiguous().view(torch.uint8).flatten().numpy()))
print(digest.hexdigest())
"""
BY_NAME = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained("org/name")
model = AutoModelForCausalLM.from_pretrained("org/name", dtype="auto")
{FROM_MODEL}{DIGEST}"""
STREAM = f"""
import sys
from pathlib import Path
from runai_model_streamer import SafetensorsStreamer
with SafetensorsStreamer() as streamer:
    streamer.stream_files([str(file) for file in Path(sys.argv[1]).glob("*.safetensors")])
    tensors = {{name: tensor.clone() for name, tensor in streamer.get_tensors()}}
{DIGEST}"""
ENGINE = f"""#!{sys.executable}
import json, os, sys
directory = next((word for word in sys.argv[1:] if word.startswith("/")), "")
print(json.dumps({{"argv": sys.argv[1:], "files": sorted(os.listdir(directory)) if os.path.isdir(directory) else []}}))
"""


@dataclass(frozen=True)
class Node:
    """A daemon whose Hub is gone, and the one model that it has, in `directory`, made from `source`. `env` is how pods reach the daemon."""

    place: Path
    source: Path
    directory: str
    digest: str
    env: dict[str, str]


def digest_of(directory: Path) -> str:
    """What `DIGEST` prints, from the files' own bytes."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                tensors[name] = data[start + first : start + last]
    return hashlib.sha256(b"".join(name.encode() + tensors[name] for name in sorted(tensors))).hexdigest()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with pods_place() as place, ExitStack() as life:
        source = place / "source"
        make_llama(source, 8 * 2**20, 3, seed=3)
        hub = life.enter_context(HubServer({"org/name": Repo.of_directory(source)}))
        (place / "kaito").mkdir()
        with DaemonProcess(place, hub.url, kaito_models=place / "kaito") as daemon:
            warmed = daemon.cli("warm", "org/name")
            assert warmed.returncode == 0, warmed.stderr
            life.close()  # from here on nothing comes from the Hub
            yield Node(place, source, warmed.stdout.strip(), digest_of(source), {"NVCACHE_SOCKET": str(daemon.socket)})


def test_a_pod_is_a_stranger_who_may_read(node: Node) -> None:
    """What the tests below stand on."""
    done = in_pod(node.place, ["sh", "-c", f"id -u; id -G; ls {node.place}/store/state; touch {node.directory}/new"], node.env)
    assert done.stdout.split() == [str(NOBODY)] * 2
    assert "Permission denied" in done.stderr
    assert "Read-only file system" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHON)
def test_a_block_of_python_has_the_bytes_of_the_source(node: Node, name: str) -> None:
    program = RECIPES[name] + (FROM_MODEL if name.startswith("transformers") else "") + DIGEST
    done = in_pod(node.place, ["python", "-c", program], node.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [node.digest]


@pytest.mark.slow
def test_a_program_that_names_its_model_loads_it_from_the_view(node: Node) -> None:
    """With the daemon's help, and with the variables as the text says they can be fixed and no daemon in sight."""
    program(node.place, "serve.py", BY_NAME)
    fixed = {"HF_HUB_CACHE": str(node.place / "store/hub"), "HF_HUB_OFFLINE": "1"}
    for command, env in (("sh", node.env), ("python", fixed)):
        arguments = ["sh", "-c", RECIPES["transformers-name"]] if command == "sh" else ["python", "serve.py"]
        done = in_pod(node.place, arguments, env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [node.digest]


@pytest.mark.parametrize(
    ("name", "engine", "flags"),
    [
        ("vllm-directory", "vllm", ["serve", "{}", "--served-model-name", "org/name"]),
        ("sglang", "python", ["-m", "sglang.launch_server", "--model-path", "{}", "--served-model-name", "org/name"]),
        ("vllm-streamer", "vllm", ["--served-model-name", "org/name", "--load-format", "runai_streamer"]),
        ("sglang-streamer", "python", ["--served-model-name", "org/name", "--load-format", "runai_streamer"]),
    ],
)
def test_an_engine_is_given_the_directory_or_the_name(node: Node, name: str, engine: str, flags: list[str]) -> None:
    """What the shell makes of the block; a stand-in for the engine says what it was given and what it sees there."""
    program(node.place, engine, ENGINE)
    for given, env in ((node.directory, node.env), ("org/name", nowhere(node.place))):
        done = in_pod(node.place, ["sh", "-c", RECIPES[name]], env, node.place / "pod")
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        expected = [flag if flag != "{}" else given for flag in flags]
        assert " ".join(expected) in " ".join(seen["argv"])
        assert given in seen["argv"]
        assert seen["files"] == (sorted(os.listdir(node.source)) if given == node.directory else [])
    (node.place / "pod" / engine).unlink()


def test_kaito_streams_from_where_it_looks(node: Node) -> None:
    """The daemon's link is followed when it is mounted; the pod sees that directory and nothing of the store."""
    mounted = node.place / "pod" / "model"
    mounted.mkdir()
    mounts = f'mount --bind -o ro "{node.place}/kaito/org-name" "{mounted}"\nmount -t tmpfs tmpfs "{node.place / "store"}"'
    done = in_pod(node.place, ["python", "-c", STREAM, str(mounted)], node.env, node=mounts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == node.digest


@pytest.mark.slow
def test_without_the_daemon_it_is_as_without_nvcache(node: Node) -> None:
    """Blocks that promise so download from the Hub; the other two say `daemon-unreachable`."""
    program(node.place, "serve.py", BY_NAME)
    for number, arguments in enumerate(
        (["python", "-c", RECIPES["transformers-directory"] + FROM_MODEL + DIGEST], ["sh", "-c", RECIPES["transformers-name"]])
    ):
        with HubServer({"org/name": Repo.of_directory(node.source)}) as hub:
            env = {**nowhere(node.place), "HF_ENDPOINT": hub.url, "HF_HOME": str(node.place / "pod" / f"hf{number}")}
            done = in_pod(node.place, arguments, env, network=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.split() == [node.digest]
            assert hub.bytes_sent("*.safetensors") > 0
    for name in ("python", "runai"):
        told = f"try:\n    exec({RECIPES[name]!r})\nexcept Exception as error:\n    print(type(error).__name__, error.code)"
        done = in_pod(node.place, ["python", "-c", told], nowhere(node.place))
        assert done.stdout.split() == ["Problem", "daemon-unreachable"], done.stderr


def test_every_block_is_run() -> None:
    text = PAGE.read_text()
    unnamed = [line for line in text.splitlines() if line.startswith(("```sh", "```python")) and "recipe=" not in line]
    assert unnamed == []
    here = {*PYTHON, "transformers-name", "vllm-directory", "vllm-streamer", "sglang", "sglang-streamer"}
    assert set(RECIPES) == here | {"vllm-name"}  # by bench.engines.vllm_cpu


def program(place: Path, name: str, text: str) -> None:
    """Put a program into the pod's working directory."""
    file = place / "pod" / name
    file.write_text(text)
    file.chmod(0o755)


def nowhere(place: Path) -> dict[str, str]:
    """A pod whose daemon is not there."""
    return {"NVCACHE_SOCKET": str(place / "none.sock")}
