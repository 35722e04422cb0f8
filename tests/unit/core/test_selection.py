"""Which files are taken: the default set, patterns, and what both never do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.manifest import Selection
from nvcache.core.selection import OTHER_WEIGHTS, chooses, is_safetensors

LLAMA = {
    "config.json",
    "modeling_llama.py",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "adapter/adapter_model.safetensors",
    "tokenizer.json",
    "README.md",
}
OTHERS = {
    "pytorch_model.bin",
    "sub/pytorch_model.bin",
    "original/params.json",
    "original/tokenizer.model",
    "consolidated.safetensors",
    "sub/consolidated.00.pth",
    "model.gguf",
    "onnx/model.onnx",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "x.pt",
}


def test_by_default_safetensors_win_over_the_same_weights_in_other_formats() -> None:
    assert chooses(Selection(), LLAMA | OTHERS) == LLAMA


def test_without_safetensors_everything_is_taken() -> None:
    files = {"model.gguf", "config.json", "pytorch_model.bin"}
    assert chooses(Selection(), files) == files


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        (("*.json",), (), {"config.json", "model.safetensors.index.json", "tokenizer.json", "original/params.json"}),
        (("original/",), (), {"original/params.json", "original/tokenizer.model"}),
        (("*.gguf",), (), {"model.gguf"}),
        (("*.json",), ("original/*",), {"config.json", "model.safetensors.index.json", "tokenizer.json"}),
        ((), ("*.safetensors", "*.py"), LLAMA - {f for f in LLAMA if f.endswith((".safetensors", ".py"))}),
        (("CONFIG.json",), (), set()),
    ],
)
def test_patterns_replace_and_narrow_the_default(include: tuple[str, ...], exclude: tuple[str, ...], taken: set[str]) -> None:
    assert chooses(Selection(include, exclude), LLAMA | OTHERS) == taken


paths = st.sets(st.sampled_from(sorted(LLAMA | OTHERS)) | st.text("ab/.*[", min_size=1, max_size=6))
patterns = st.lists(st.sampled_from(["*", "*.bin", "original/", "[", "a*"]) | st.text("ab*?[]!", max_size=4), max_size=2).map(tuple)


@given(paths, patterns, patterns)
def test_a_selection_takes_from_what_is_there_and_nothing_excluded(files: set[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    taken = chooses(Selection(include, exclude), files)
    assert taken <= files
    assert taken == chooses(Selection(include), files) - (chooses(Selection(exclude), files) if exclude else set())


@given(paths)
def test_the_default_never_loses_safetensors_config_or_code(files: set[str]) -> None:
    kept = {
        path for path in files if path.endswith((".safetensors", ".json", ".py")) and not path.startswith("original/") and "consolidated" not in path
    }
    assert kept <= chooses(Selection(), files)


def test_what_is_a_safetensors_file() -> None:
    assert is_safetensors("a/b.safetensors")
    assert not is_safetensors("model.safetensors.index.json")
    assert not any(is_safetensors(pattern) for pattern in OTHER_WEIGHTS)
