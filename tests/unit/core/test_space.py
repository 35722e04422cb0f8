"""Admission: nothing is let in that does not fit, all that fits is, and a refusal gives its numbers."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nvcache.core.space import Room, admit, amount, effective_limit, human
from nvcache.errors import Code, SpaceError

sizes = st.integers(0, 2**60)
GB = 10**9


@given(sizes, sizes, sizes, sizes, sizes, sizes)
def test_what_is_admitted_fits_and_what_fits_is_admitted(limit: int, used: int, reserved: int, free: int, min_free: int, need: int) -> None:
    assume(need > 0)
    room = Room(limit, used, reserved, free, min_free)
    fits = used + reserved + need <= limit and reserved + need + min_free <= free
    could = need <= limit and need + min_free <= free + used  # with everything else removed
    if fits:
        admit(room, need, what="x")
        return
    with pytest.raises(SpaceError) as caught:
        admit(room, need, what="x")
    assert caught.value.code is (Code.FULL if could else Code.TOO_LARGE)


@given(sizes, sizes, sizes)
def test_the_default_limit_does_not_move_as_the_store_fills(free: int, used: int, more: int) -> None:
    more = min(more, free)
    assert effective_limit(None, free, used) == effective_limit(None, free - more, used + more)
    assert effective_limit(7, free, used) == 7


def test_a_model_that_never_fits_is_refused_with_numbers() -> None:
    with pytest.raises(SpaceError) as caught:
        admit(Room(limit=100 * GB, used=40 * GB, reserved=0, free=500 * GB), 140 * GB + 1, what="hf://org/name")
    assert str(caught.value) == (
        "cannot make room for hf://org/name: it needs 140.0 GB (140000000001 bytes), an empty cache could hold 100.0 GB (100000000000 bytes)"
    )
    assert (caught.value.facts["need_bytes"], caught.value.facts["limit_bytes"]) == (140 * GB + 1, 100 * GB)
    assert not caught.value.retryable


def test_a_disk_smaller_than_the_limit_is_named() -> None:
    with pytest.raises(SpaceError, match=r"an empty cache could hold 50\.0 GB .* its disk has less") as caught:
        admit(Room(limit=100 * GB, used=0, reserved=0, free=60 * GB, min_free=10 * GB), 60 * GB, what="x")
    assert caught.value.code is Code.TOO_LARGE


def test_a_full_cache_says_so_with_numbers_and_may_be_asked_again() -> None:
    with pytest.raises(SpaceError) as caught:
        admit(Room(limit=100 * GB, used=70 * GB, reserved=20 * GB, free=90 * GB), 11 * GB, what="x")
    assert caught.value.code is Code.FULL
    assert caught.value.retryable
    assert "just now: it needs 11.0 GB (11000000000 bytes), 10.0 GB (10000000000 bytes) are available (used 70.0 GB" in str(caught.value)


def test_a_hit_needs_no_room() -> None:
    admit(Room(limit=0, used=0, reserved=0, free=0), 0, what="x")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (GB * 3 // 2, "1.5 GB"),
        (10**22, "10000.0 EB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text


def test_amounts_are_exact() -> None:
    assert amount(12) == "12 bytes"
    assert amount(1500) == "1.5 kB (1500 bytes)"
