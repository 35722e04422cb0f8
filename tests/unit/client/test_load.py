"""Tensors come back as they were written: from a file, a directory, an index."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from bench.cold import drop
from nvcache.client import load_safetensors, reading, stream_safetensors
from tests.support.models import make_llama


def test_a_file(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "x.safetensors")
    tensors = load_safetensors(tmp_path / "x.safetensors")
    assert list(tensors) == ["a"]
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_torch_tensors_are_views_of_the_mapping(tmp_path: Path) -> None:
    save_file({"a": np.arange(4096, dtype=np.int64)}, tmp_path / "x.safetensors")
    tensor = load_safetensors(str(tmp_path), "pt")["a"]
    assert tensor[:4].tolist() == [0, 1, 2, 3]
    rows = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("x.safetensors")]
    assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in rows)


def test_the_index_says_which_shard_has_which_tensor(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1), "old": np.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(1), "a": np.ones(1)}, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert {name: float(value[0]) for name, value in load_safetensors(tmp_path).items()} == {"a": 0.0, "b": 1.0}


def test_without_an_index_a_name_may_occur_once(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(1)}, tmp_path / "2.safetensors")
    assert sorted(load_safetensors(tmp_path)) == ["a", "b"]
    save_file({"a": np.zeros(1)}, tmp_path / "3.safetensors")
    with pytest.raises(ValueError, match="tensor 'a' is in several files"):
        load_safetensors(tmp_path)


DTYPES = {  # of torch, and what stock safetensors writes of each
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_every_type_is_bit_for_bit_what_the_stock_library_gives(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.frombuffer(os.urandom(8 * 24), np.uint8).copy())
    tensors = {str(dtype): (noise % 2 if dtype is torch.bool else noise.clone()).view(dtype).reshape(2, -1) for dtype in DTYPES}
    tensors |= {"empty": torch.empty((0, 3)), "scalar": torch.tensor(2.5), "odd": torch.zeros(3, dtype=torch.uint8)}
    save_torch(tensors, tmp_path / "x.safetensors")
    stock = load_torch(tmp_path / "x.safetensors")
    ours = load_safetensors(tmp_path, "pt")
    assert ours.keys() == stock.keys() == tensors.keys()
    for name, tensor in stock.items():
        assert (ours[name].dtype, ours[name].shape, bits(ours[name])) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_a_sharded_model_is_bit_for_bit_what_the_stock_library_gives(tmp_path: Path) -> None:
    make_llama(tmp_path / "m", 8 * 2**20, 3, seed=7)
    ours = load_safetensors(tmp_path / "m", "pt")
    stock: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "m").glob("*.safetensors")):
        stock |= load_torch(path)
    assert ours.keys() == stock.keys()
    assert all(ours[name].dtype == stock[name].dtype and torch.equal(ours[name], stock[name]) for name in stock)


def test_numpy_is_what_the_stock_library_gives(tmp_path: Path) -> None:
    arrays = {
        name: np.frombuffer(os.urandom(64), np.uint8).view(name).reshape(2, -1)
        for name in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "c8")
    }
    save_file(arrays, tmp_path / "x.safetensors")
    ours = load_safetensors(tmp_path)
    for name, array in load_numpy(tmp_path / "x.safetensors").items():
        assert (ours[name].dtype, ours[name].shape, ours[name].tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_numpy_has_no_bfloat16_of_its_own(tmp_path: Path) -> None:
    save_torch({"a": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'a': numpy has no BF16; use framework='pt', or install the package ml_dtypes"):
        load_safetensors(tmp_path)


def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    """Stock files are; the format does not promise it."""
    header = json.dumps(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    ).encode()
    data = b"\x07" + np.array([1.5, -2.5], np.float32).tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    for framework in ("np", "pt"):
        assert load_safetensors(tmp_path, framework)["b"].tolist() == [1.5, -2.5]


def test_what_a_program_changes_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(4096, np.float32)}, path)
    before = path.read_bytes()
    path.chmod(0o444)
    for framework in ("np", "pt"):
        load_safetensors(path, framework)["a"][:] = 5
        assert float(load_safetensors(path, framework)["a"].sum()) == 0
    assert path.read_bytes() == before


def test_four_bit_floats_come_in_pairs_as_the_stock_library_gives_them(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2,6],"data_offsets":[0,6]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x12\x34\x56\x78\x9a\xbc")
    ours, stock = load_safetensors(tmp_path, "pt")["a"], load_torch(tmp_path / "x.safetensors")["a"]
    assert (ours.dtype, ours.shape, bits(ours)) == (stock.dtype, stock.shape, bits(stock))
    with pytest.raises(ValueError, match=r"numpy has no F4; use framework='pt'$"):
        load_safetensors(tmp_path)


def test_tensors_hold_the_mapping_and_no_descriptor(tmp_path: Path) -> None:
    for number in range(5):
        save_file({f"t{number}": np.full(10_000, number, np.int64)}, tmp_path / f"{number}.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    tensors = load_safetensors(tmp_path, "pt")
    assert len(os.listdir("/proc/self/fd")) == before
    del tensors["t0"]
    for path in tmp_path.iterdir():
        path.unlink()
    assert [int(tensor[9999]) for tensor in tensors.values()] == [1, 2, 3, 4]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 4
    tensors.clear()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_model_that_is_replaced_meanwhile_is_loaded_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision in (1, 2):
        for shard in (1, 2):
            (tmp_path / str(revision)).mkdir(exist_ok=True)
            save_file({f"t{shard}": np.full(4, revision)}, tmp_path / str(revision) / f"{shard}.safetensors")
    link = tmp_path / "current"
    link.symlink_to("1")
    monkeypatch.chdir(tmp_path)
    stream = stream_safetensors("current")
    first = next(stream)
    monkeypatch.chdir("/")
    link.unlink()
    link.symlink_to("2")
    shutil.rmtree(tmp_path / "1")
    assert [int(tensor[0]) for _, tensor in (first, *stream)] == [1, 1]


def test_a_tensor_comes_as_soon_as_its_bytes_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk answers for the first piece and keeps the rest back."""
    count = reading.PIECE // 4
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    path = folder / "x.safetensors"
    save_file({"a": np.full(count // 2, 1, np.float32), "b": np.full(2 * count, 2, np.float32)}, path)
    drop(folder)
    answers, populate = threading.Event(), reading.populate

    def gated(handle: int, offset: int, size: int) -> bool:
        if offset >= reading.PIECE and not answers.wait(20):
            raise OSError(errno.EIO, "nobody has let it through")
        return populate(handle, offset, size)

    monkeypatch.setattr(reading, "populate", gated)
    monkeypatch.setattr(reading, "LARGE_PAGES", True)  # on an old kernel the fallback comes after the gate as well
    try:
        stream = stream_safetensors(path)
        assert next(stream)[0] == "a"
        assert not answers.is_set()
        answers.set()
        assert [name for name, _ in stream] == ["b"]
    finally:
        answers.set()
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no safetensors file, or was cut short"),
        (b"\x00" * 8, "no safetensors file, or was cut short"),
        ((2**40).to_bytes(8, "little") + b"{}", "no safetensors file, or was cut short"),
        ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
        ((2).to_bytes(8, "little") + b"{,", "header is damaged"),
        *(
            (len(text).to_bytes(8, "little") + text + b"1234", says)
            for text, says in (
                (b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', "type 'Q4', which is not known"),
                (b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}', "does not fit its shape"),
                (b'{"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}', "no number"),
                (b'{"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]}}', "no number"),
                (b'{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,4]}}', "beyond all sizes"),
                (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "is in it twice"),
                (b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', "begins at byte"),
                (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', "begins at byte"),
                (b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', "its tensors end at byte"),
                (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"__metadata__":{"x":1}}', "metadata are not text"),
                (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"__metadata__":[1]}', "header is damaged"),
                (b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "header is damaged"),
                (b"[" * 200_000, "header is damaged"),
                (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "header is damaged"),
                (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "4 bytes, which does not fit its shape"),
                (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "no number"),
                (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "no number"),
                (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "its tensors end at byte"),
                (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', "header is damaged"),
                (b'{"a":{"shape":[1],"data_offsets":[0,4]}}', "header is damaged"),
                (b'{"a":7}', "header is damaged"),
            )
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_safetensors(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        *("{", "[]", "[" * 200_000, '{"weight_map": {"a": 7}}', '{"weight_map": {}}', '{"weight_map": {"gone": "x.safetensors"}}'),
        *('{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "/x.safetensors"}}', '{"weight_map": {"a": "x\\u0000"}}'),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, index: str) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index.json is damaged|'gone', which the index says is in it, is not"):
        load_safetensors(tmp_path)


def test_another_framework_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither np nor pt"):
        load_safetensors(tmp_path, "tf")  # type: ignore[arg-type]


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        load_safetensors(tmp_path)


def test_the_client_needs_only_the_standard_library() -> None:
    """With nothing but the standard library on the path the client imports, and says what loading needs."""
    root = Path(__file__).parents[3]
    script = """
try:
    nvcache.client.load_safetensors("/x")
except ImportError as error:
    print(error)
print([name for name in sys.modules if name.startswith("nvcache.") and not name.startswith("nvcache.client")])
"""
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(root)!r}); import nvcache.client\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "cannot load tensors: the package numpy is not installed\n[]\n"
