"""Safetensors headers: whatever the safetensors package refuses is refused, with duplicate keys besides. Indexes: what is fatal, what is told."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from nvcache.core.shards import DTYPE_BITS, HEADER_CAP, Tensor, check_weights, header_length, index_files, parse_header
from nvcache.errors import Code, IntegrityError


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header (bytes as they are, else as JSON)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def ours(file: bytes) -> dict[str, Tensor]:
    length = header_length(file[:8], len(file), "model.safetensors")
    return parse_header(file[8 : 8 + length], len(file), "model.safetensors")


def refused(file: bytes) -> str:
    with pytest.raises(IntegrityError) as caught:
        ours(file)
    assert caught.value.code is Code.BAD_SAFETENSORS
    assert str(caught.value).startswith("cannot use safetensors file model.safetensors: ")
    return str(caught.value)


def library(file: bytes) -> dict[str, dict[str, object]] | None:
    """What the safetensors package reads, or None where it refuses."""
    try:
        return dict(deserialize(file))
    except SafetensorError:
        return None


U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
DEEP = 125  # levels of an unknown field that the library still reads

REFUSED_BY_BOTH = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "empty header": struct.pack("<Q", 0),
    "header beyond the file": struct.pack("<Q", 3) + b"{}",
    "header over the cap": struct.pack("<Q", HEADER_CAP + 1) + b"{}",
    "header of all ones": b"\xff" * 16,
    "html": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "not UTF-8": file_of(b'{"__metadata__":{"a":"\xff"}}'),
    "byte order mark": file_of(b"\xef\xbb\xbf{}"),
    "not JSON": file_of(b"{"),
    "a list": file_of([]),
    "a string": file_of("x"),
    "null": file_of(None),
    "trailing garbage": file_of(b"{} x"),
    "trailing NUL": file_of(b"{}\0"),
    "NaN": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":NaN}}', b"1"),
    "Infinity": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":-Infinity}}', b"1"),
    "number out of range": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":1e999}}', b"1"),
    "integer out of range": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":' + b"9" * 309 + b"}}", b"1"),
    "integer of 5000 digits": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":' + b"9" * 5000 + b"}}", b"1"),
    "lone surrogate": file_of(b'{"__metadata__":{"a":"\\ud800"}}'),
    "lone surrogate in an unknown field": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":["\\uDC00"]}}', b"1"),
    "control character in a string": file_of(b'{"__metadata__":{"a":"\n"}}'),
    "nested too deep": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":' + b"[" * 126 + b"]" * 126 + b"}}", b"1"),
    "nested far too deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata number": file_of({"__metadata__": {"a": 1}}),
    "metadata list": file_of({"__metadata__": []}),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{}}'),
    "field twice": file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "tensor null": file_of({"a": None}),
    "no dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "no shape": file_of({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"),
    "no offsets": file_of({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "unknown dtype": file_of({"a": {**U8, "dtype": "U9"}}, b"1"),
    "dtype in lower case": file_of({"a": {**U8, "dtype": "u8"}}, b"1"),
    "shape of floats": file_of(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"1"),
    "shape of booleans": file_of({"a": {**U8, "shape": [True]}}, b"1"),
    "negative shape": file_of({"a": {**U8, "shape": [-1]}}, b"1"),
    "minus zero": file_of(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "shape beyond 64 bits": file_of({"a": {**U8, "shape": [2**64]}}, b"1"),
    "shape that overflows": file_of({"a": {"dtype": "U8", "shape": [2**63, 4, 0], "data_offsets": [0, 0]}}),
    "bits that overflow": file_of({"a": {"dtype": "F64", "shape": [2**61], "data_offsets": [0, 0]}}),
    "three offsets": file_of({"a": {**U8, "data_offsets": [0, 1, 1]}}, b"1"),
    "one offset": file_of({"a": {**U8, "data_offsets": [0]}}, b"1"),
    "offsets reversed": file_of({"a": {**U8, "data_offsets": [1, 0]}}, b"1"),
    "offsets beyond the file": file_of({"a": {**U8, "shape": [2], "data_offsets": [0, 2]}}, b"1"),
    "shape and offsets disagree": file_of({"a": {**U8, "shape": [2]}}, b"1"),
    "half a byte": file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"12"),
    "a hole": file_of({"a": U8, "b": {**U8, "data_offsets": [2, 3]}}, b"123"),
    "a hole at the start": file_of({"a": {**U8, "data_offsets": [1, 2]}}, b"12"),
    "an overlap": file_of({"a": {**U8, "shape": [2], "data_offsets": [0, 2]}, "b": {**U8, "shape": [2], "data_offsets": [1, 3]}}, b"123"),
    "two tensors in one place": file_of({"a": U8, "b": U8}, b"1"),
    "trailing data": file_of({"a": U8}, b"12"),
    "data without tensors": file_of({}, b"1"),
    "truncated data": file_of({"a": {**U8, "shape": [4], "data_offsets": [0, 4]}}, b"123"),
}

REFUSED_BY_US = {
    "tensor twice": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "key of the metadata twice": file_of(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "key of an unknown field twice": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":{"b":1,"b":2}}}', b"1"),
}

ACCEPTED = {
    "no tensors": file_of({}),
    "metadata only": file_of({"__metadata__": {"format": "pt"}}),
    "metadata null": file_of({"__metadata__": None}),
    "scalar": file_of({"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, b"1"),
    "zero-size tensors": file_of(
        {"a": U8, "b": {**U8, "shape": [0], "data_offsets": [0, 0]}, "c": {**U8, "shape": [0], "data_offsets": [1, 1]}}, b"1"
    ),
    "zero in front of an enormous shape": file_of({"a": {**U8, "shape": [0, 2**63, 4], "data_offsets": [0, 0]}}),
    "spaces around": file_of(b' \n{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} \t', b"1"),
    "unknown fields": file_of({"a": {**U8, "z": [1, {"y": 2.5}, "\U0001f600"]}}, b"1"),
    "unknown field, deep": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":' + b"[" * DEEP + b"]" * DEEP + b"}}", b"1"),
    "names from anywhere": file_of({"": U8, "名\0/..": {**U8, "data_offsets": [1, 2]}}, b"12"),
    "order of names is free": file_of({"b": {**U8, "data_offsets": [1, 2]}, "a": U8}, b"12"),
    "two of four bits": file_of({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"),
}


@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_what_the_library_refuses_is_refused(case: str) -> None:
    assert library(REFUSED_BY_BOTH[case]) is None
    refused(REFUSED_BY_BOTH[case])


@pytest.mark.parametrize("case", REFUSED_BY_US)
def test_duplicate_keys_are_refused_although_the_library_takes_the_last(case: str) -> None:
    assert library(REFUSED_BY_US[case]) is not None
    assert "duplicate key" in refused(REFUSED_BY_US[case])


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_sound_headers_are_accepted(case: str) -> None:
    agree(ACCEPTED[case])


def agree(file: bytes) -> None:
    """Both read the same tensors out of `file`."""
    theirs = library(file)
    assert theirs is not None
    data = file[8 + int.from_bytes(file[:8], "little") :]
    found = {name: {"dtype": t.dtype, "shape": list(t.shape), "data": data[t.begin : t.end]} for name, t in ours(file).items()}
    assert found == theirs


def test_every_dtype_of_the_library_is_known_at_its_width() -> None:
    with pytest.raises(SafetensorError, match="expected one of") as caught:
        deserialize(file_of({"a": {**U8, "dtype": "?"}}, b"1"))
    theirs = set(str(caught.value).partition("expected one of")[2].split("`")[1::2])
    assert theirs <= set(DTYPE_BITS)
    for dtype in theirs:
        size = DTYPE_BITS[dtype]
        agree(file_of({"a": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}, bytes(size)))


def test_messages_name_what_is_wrong() -> None:
    assert "needs 16 bits for its shape, but has bytes 0 to 1" in refused(REFUSED_BY_BOTH["shape and offsets disagree"])
    assert "tensor 'b' begins at byte 2, not at 1" in refused(REFUSED_BY_BOTH["a hole"])
    assert "unknown dtype 'U9'" in refused(REFUSED_BY_BOTH["unknown dtype"])
    assert "more than the 100000000 allowed" in refused(REFUSED_BY_BOTH["header over the cap"])
    assert "its tensors take 4 bytes, but 3 follow the header" in refused(REFUSED_BY_BOTH["truncated data"])


names = st.text(max_size=4)
numbers = st.one_of(st.integers(-1, 20), st.sampled_from([2**32, 2**63, 2**64 - 1, 2**64, -(2**63), 0.0, 1.5, True, None, "1"]))
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPE_BITS, "X"]), "shape": st.lists(numbers, max_size=3), "data_offsets": st.lists(numbers, min_size=1, max_size=3)},
    optional={"extra": st.recursive(st.one_of(st.none(), names, numbers), lambda inner: st.lists(inner, max_size=2), max_leaves=3)},
)
headers = st.one_of(
    st.dictionaries(names, entries, max_size=3), st.recursive(st.one_of(names, numbers), lambda x: st.dictionaries(names, x, max_size=3))
)


@given(headers, st.binary(max_size=24))
def test_any_header_the_library_refuses_is_refused(header: object, data: bytes) -> None:
    file = file_of(header, data)
    if library(file) is None:
        refused(file)
    else:
        agree(file)


@given(st.data())
def test_a_sound_file_with_a_byte_changed_is_read_as_the_library_reads_it(data: st.DataObject) -> None:
    file = bytearray(ACCEPTED[data.draw(st.sampled_from(sorted(ACCEPTED)))])
    file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    if library(bytes(file)) is None:
        refused(bytes(file))


@given(st.binary(max_size=64))
@example(b"")
def test_any_bytes_give_a_header_or_our_error(junk: bytes) -> None:
    for file in (junk, file_of(junk)):
        if library(file) is None:
            refused(file)


@st.composite
def sound(draw: st.DrawFn) -> bytes:
    """A file as writers make it: any dtypes, any order of names, tensors one after the other."""
    header: dict[str, object] = {"__metadata__": draw(st.dictionaries(names, names, max_size=2))}
    at = 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), [*draw(st.lists(st.integers(0, 3), max_size=2)), 4]
        bits = DTYPE_BITS[dtype]
        for length in shape:
            bits *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    return file_of(header, bytes(i % 251 for i in range(at)))


@given(sound())
def test_sound_files_are_read_as_the_library_reads_them(file: bytes) -> None:
    agree(file)


T = {"a": Tensor("U8", (4,), 0, 4)}, {"b": Tensor("U8", (6,), 0, 6)}
FILES = {"one.safetensors": 100, "two.safetensors": 100, "model.safetensors.index.json": 50}
HEADERS = {"one.safetensors": T[0], "two.safetensors": T[1]}


def index(weight_map: object = None, total: object = 10, **others: object) -> bytes:
    weights = {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weights, **others}).encode()


def check(content: bytes, *, files: dict[str, int] = FILES, path: str = "model.safetensors.index.json") -> list[str]:
    return check_weights(files, HEADERS, {path: content})


def test_an_index_that_agrees_is_silent() -> None:
    assert check(index()) == []
    assert check(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (index(["one.safetensors"]), "no weight_map"),
        (index({"a": 1}), "no weight_map"),
        (index({"a": "gone.safetensors"}), "gone.safetensors, which the repository does not have"),
        (index({str(i): f"gone-{i}.safetensors" for i in range(9)}), "gone-2.safetensors and 6 more, which"),
        (index({"a": "../one.safetensors"}), "'..' segment"),
        (index({"a": "/one.safetensors"}), "absolute"),
        (index({"a": "sub\\one.safetensors"}), "backslash"),
        (index({"a": ""}), "empty"),
        (index({"a": "model.safetensors.index.json"}), "not a .safetensors file"),
    ],
)
def test_an_index_that_no_loader_can_follow_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        check(content)
    assert caught.value.code is Code.BAD_INDEX
    assert str(caught.value).startswith("cannot use weights index model.safetensors.index.json: ")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        (index(total=11), "says total_size 11, the tensors have 10 bytes"),
        (index({"a": "two.safetensors", "b": "one.safetensors"}), "puts a, b into another shard"),
        (index({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}), "names c, which no shard has"),
        (b'{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "b": "two.safetensors"}}', "lists b twice"),
    ],
)
def test_an_untidy_index_is_told(content: bytes, warning: str) -> None:
    (told,) = check(content)
    assert told.startswith("model.safetensors.index.json ")
    assert warning in told


def test_a_tensor_the_index_forgets_is_told() -> None:
    headers = {**HEADERS, "one.safetensors": {**T[0], "x": Tensor("U8", (0,), 4, 4)}}
    assert check_weights(FILES, headers, {"model.safetensors.index.json": index()}) == [
        "model.safetensors.index.json does not name x, which the shards have"
    ]


def test_a_single_file_beside_its_index_is_told() -> None:
    (told,) = check(index(), files={**FILES, "model.safetensors": 9})
    assert told.startswith("model.safetensors is beside model.safetensors.index.json: ")


def test_shards_left_out_on_purpose_are_not_missing() -> None:
    assert check_weights(FILES, {"one.safetensors": T[0]}, {"model.safetensors.index.json": index()}) == [
        "model.safetensors.index.json names two.safetensors, which the selection leaves out"
    ]


def test_an_index_speaks_for_its_own_folder() -> None:
    path = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    with pytest.raises(IntegrityError, match=r"names unet/one\.safetensors, unet/two\.safetensors, which"):
        check(index(), path=path)
    files = {f"unet/{name}": size for name, size in FILES.items()}
    headers = {f"unet/{name}": tensors for name, tensors in HEADERS.items()}
    assert check_weights(files, headers, {path: index()}) == []


def test_indexes_are_found_by_name() -> None:
    paths = ["config.json", "model.safetensors.index.json", "a/b.safetensors.index.fp16.json", "pytorch_model.bin.index.json", "x.safetensors"]
    assert index_files(paths) == ["a/b.safetensors.index.fp16.json", "model.safetensors.index.json"]
