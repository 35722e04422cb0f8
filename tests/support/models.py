"""Makes Llama-shaped bf16 repositories that real libraries load. It trains nothing: weights are pseudo-random, finite and small.

Every tensor follows from (seed, name), so the same arguments give the same bytes. The safetensors headers are what `safetensors.serialize` writes.
Also a command: `python -m tests.support.models --size 1GiB --shards 4 OUT`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEAD_DIM = 64
MIN_VOCAB = 320  # 256 bytes, 3 special tokens, and room
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
SLICE = 1 << 20  # weights are made and written this many at a time
GIT_ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes a Llama model is made of."""

    hidden: int
    layers: int
    vocab: int

    @property
    def heads(self) -> int:
        """Attention heads; a fourth as many hold keys and values."""
        return self.hidden // HEAD_DIM

    @property
    def kv(self) -> int:
        """Width of keys and of values."""
        return max(1, self.heads // 4) * HEAD_DIM

    @property
    def inner(self) -> int:
        """Width of the feed-forward part."""
        return self.hidden * 7 // 2

    @property
    def layer_bytes(self) -> int:
        """bf16 bytes of one layer."""
        return 2 * (2 * self.hidden * self.hidden + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner + 2 * self.hidden)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order they are sharded."""
        h = self.hidden
        yield "model.embed_tokens.weight", (self.vocab, h)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (h,)
            yield f"{layer}.self_attn.q_proj.weight", (h, h)
            yield f"{layer}.self_attn.k_proj.weight", (self.kv, h)
            yield f"{layer}.self_attn.v_proj.weight", (self.kv, h)
            yield f"{layer}.self_attn.o_proj.weight", (h, h)
            yield f"{layer}.post_attention_layernorm.weight", (h,)
            yield f"{layer}.mlp.gate_proj.weight", (self.inner, h)
            yield f"{layer}.mlp.up_proj.weight", (self.inner, h)
            yield f"{layer}.mlp.down_proj.weight", (h, self.inner)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocab, h)


def shape_for(total_bytes: int) -> Shape:
    """The model whose weights come within one vocabulary row of `total_bytes`, from below. Raises ValueError below about 300 kB."""
    hidden = HEAD_DIM
    while hidden < 8192 and Shape(2 * hidden, 1, MIN_VOCAB).layer_bytes * 16 <= total_bytes:
        hidden *= 2
    row = 2 * 2 * hidden  # one row of the embedding and one of the head
    body = total_bytes - MIN_VOCAB * row - 2 * hidden
    layers = body // Shape(hidden, 1, MIN_VOCAB).layer_bytes
    if layers < 1:
        raise ValueError(f"{total_bytes} bytes are too few for a Llama model")
    spare = body - layers * Shape(hidden, 1, MIN_VOCAB).layer_bytes
    return Shape(hidden, layers, MIN_VOCAB + spare // row)


def make_llama(directory: Path, total_bytes: int, shards: int = 1, seed: int = 0) -> Shape:
    """Write a repository into `directory` (made if needed): weights of about `total_bytes` in `shards` files, index, configuration, tokenizer."""
    shape = shape_for(total_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    groups = _split(list(shape.tensors()), shards)
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        _write_shard(directory / name, group, seed)
        weight_map |= dict.fromkeys((tensor for tensor, _ in group), name)
    if shards > 1:
        total = sum(2 * math.prod(dims) for _, dims in shape.tensors())
        _json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_config(directory, shape)
    _write_tokenizer(directory)
    (directory / ".gitattributes").write_text(GIT_ATTRIBUTES)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A generated model\n\nRandom weights of a Llama shape, for tests.\n")
    return shape


def _split(tensors: list[tuple[str, tuple[int, ...]]], shards: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the list into `shards` runs of nearly equal bytes, none empty."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{shards} shards cannot be made of {len(tensors)} tensors")
    total = sum(math.prod(dims) for _, dims in tensors)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    done = 0
    for i, (name, dims) in enumerate(tensors):
        missing = shards - len(groups)
        if groups[-1] and missing and (done >= total * len(groups) / shards or len(tensors) - i == missing):
            groups.append([])
        groups[-1].append((name, dims))
        done += math.prod(dims)
    return groups


def _write_shard(path: Path, group: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    ordered = sorted(group)  # one dtype: safetensors orders by name
    for name, dims in ordered:
        size = 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, dims in ordered:
            for piece in _weights(name, math.prod(dims), seed):
                out.write(piece)


def _weights(name: str, count: int, seed: int) -> Iterator[memoryview]:
    """bf16 values: ones for norms, else ±2^-7…2^-5, a function of (seed, name)."""
    if name.endswith("norm.weight"):
        yield np.full(count, 0x3F80, dtype="<u2").data
        return
    raw = np.random.SFC64(list(hashlib.sha256(f"{seed}|{name}".encode()).digest()))
    for at in range(0, count, SLICE):
        wanted = min(SLICE, count - at)
        words = raw.random_raw(-(-wanted // 4))
        words &= np.uint64(0x80FF80FF80FF80FF)  # keep sign, mantissa and the exponent's lowest bit
        words |= np.uint64(0x3C003C003C003C00)  # exponent 2^-7
        yield words.view("<u2")[:wanted].data


def _write_config(directory: Path, shape: Shape) -> None:
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    _json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": max(1, shape.heads // 4),
            "head_dim": HEAD_DIM,
            "vocab_size": shape.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **ids,
        },
    )
    _json(directory / "generation_config.json", {**ids, "do_sample": False, "max_length": 2048})


def _write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: one token a byte, and the special tokens."""
    alphabet = _byte_alphabet()
    special = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {char: i for i, char in enumerate(alphabet)} | {text: 256 + i for i, text in enumerate(SPECIAL)},
        "merges": [],
    }
    _json(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": model,
        },
    )
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    _json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **names})
    _json(directory / "special_tokens_map.json", names)


def _byte_alphabet() -> list[str]:
    """The printable stand-in of every byte, as GPT-2's byte-level tokenizer defines it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """The command."""
    from nvcache.settings import parse_size

    parser = argparse.ArgumentParser(description="Write a Llama-shaped bf16 repository.")
    parser.add_argument("--size", type=parse_size, default="1GiB")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    shape = make_llama(args.out, args.size, args.shards, args.seed)
    print(f"{args.out}: {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocab}, {args.shards} shards")


if __name__ == "__main__":
    main()
