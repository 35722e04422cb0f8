"""The journal's records: whatever happens to the bytes, no wrong record is ever read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nvcache.store import journal
from nvcache.store.journal import RECORD_BYTES

KEY = "a" * 64 + "-1000000"
SIZE, CHUNK = 1_000_000, 4096
COUNT = -(-SIZE // CHUNK)

steps = st.lists(st.tuples(st.booleans(), st.integers(0, COUNT - 1), st.integers(0, 2**64 - 1)), max_size=30)


def written(history: list[tuple[bool, int, int]]) -> tuple[bytes, list[dict[int, int]]]:
    """The journal of a history, and what it says after each of its records."""
    data = journal.header(KEY, SIZE, CHUNK)
    says: list[dict[int, int]] = [{}]
    for keep, index, digest in history:
        data += journal.good(KEY, index, digest) if keep else journal.gone(KEY, index)
        now = dict(says[-1])
        if keep:
            now[index] = digest
        else:
            now.pop(index, None)
        says.append(now)
    return data, says


@given(steps)
def test_what_was_written_is_read(history: list[tuple[bool, int, int]]) -> None:
    data, says = written(history)
    found = journal.decode(KEY, data)
    assert found is not None
    assert (found.size, found.chunk_size, found.chunks, found.length) == (SIZE, CHUNK, says[-1], len(data))


@given(st.lists(st.tuples(st.sampled_from(["good", "lent", "gone"]), st.integers(0, 3)), max_size=20))
def test_whose_word_a_chunk_is(history: list[tuple[str, int]]) -> None:
    """The last record about a chunk says whether somebody vouches for it."""
    data = journal.header(KEY, SIZE, CHUNK)
    last: dict[int, str] = {}
    for kind, index in history:
        data += journal.gone(KEY, index) if kind == "gone" else journal.good(KEY, index, 7, lent=kind == "lent")
        last[index] = kind
    found = journal.decode(KEY, data)
    assert found is not None
    assert found.chunks.keys() == {index for index, kind in last.items() if kind != "gone"}
    assert found.lent == {index for index, kind in last.items() if kind == "lent"}


@given(steps, st.data())
def test_a_torn_tail_is_dropped(history: list[tuple[bool, int, int]], draw: st.DataObject) -> None:
    data, says = written(history)
    cut = draw.draw(st.integers(0, len(data)))
    found = journal.decode(KEY, data[:cut] + draw.draw(st.sampled_from([b"", bytes(RECORD_BYTES), b"\xff" * 7])))
    if cut < RECORD_BYTES:
        assert found is None
    else:
        assert found is not None
        assert found.chunks == says[cut // RECORD_BYTES - 1]
        assert found.length == cut // RECORD_BYTES * RECORD_BYTES


@given(steps, st.data())
def test_a_flipped_bit_never_makes_a_wrong_record(history: list[tuple[bool, int, int]], draw: st.DataObject) -> None:
    data, says = written(history)
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    hurt = bytearray(data)
    hurt[bit // 8] ^= 1 << bit % 8
    found = journal.decode(KEY, bytes(hurt))
    intact = bit // 8 // RECORD_BYTES
    if intact == 0:
        assert found is None
    else:
        assert found is not None
        assert found.chunks == says[intact - 1]


@given(st.binary(max_size=200))
def test_garbage_is_no_journal(data: bytes) -> None:
    assert journal.decode(KEY, data) is None


def test_the_journal_of_another_ingest_is_refused() -> None:
    data = journal.header(KEY, SIZE, CHUNK)
    assert journal.decode("other", data) is None
    mixed = journal.decode(KEY, data + journal.good("other", 1, 2) + journal.good(KEY, 3, 4))
    assert mixed is not None
    assert mixed.chunks == {}


def test_a_record_beyond_the_file_ends_the_reading() -> None:
    data = journal.header(KEY, SIZE, CHUNK) + journal.good(KEY, COUNT, 1) + journal.good(KEY, 0, 1)
    found = journal.decode(KEY, data)
    assert found is not None
    assert found.chunks == {}


def test_kept_bytes_count_the_short_last_chunk() -> None:
    found = journal.decode(KEY, journal.header(KEY, SIZE, CHUNK) + journal.good(KEY, 0, 1) + journal.good(KEY, COUNT - 1, 1))
    assert found is not None
    assert found.kept == CHUNK + SIZE % CHUNK
