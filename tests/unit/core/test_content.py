"""What a disk's first bytes say by themselves."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.content import ENDS, Kind, never_mounted, recognise


def ext4(*, mounted_at: int = 0, mounts: int = 0) -> bytes:
    """The first MiB of a disk with an ext4 superblock."""
    head = bytearray(ENDS)
    struct.pack_into("<I4xH", head, 1024 + 0x2C, mounted_at, mounts)
    struct.pack_into("<H", head, 1024 + 0x38, 0xEF53)
    return bytes(head)


def test_only_an_ext4_that_nobody_ever_mounted_counts_as_unused() -> None:
    assert recognise(ext4(), bytes(ENDS)).kind is Kind.EXT4
    assert never_mounted(ext4())
    assert not never_mounted(ext4(mounted_at=1))
    assert not never_mounted(ext4(mounts=1))
    assert not never_mounted(bytes(ENDS))


@pytest.mark.parametrize("short", [b"", b"\x01", bytes(1024), b"\x01" * 4096, b"XFSB", b"XFSB".ljust(119)])
def test_short_and_odd_heads_are_recognised_as_nothing_of_ours(short: bytes) -> None:
    assert recognise(short, b"").kind in (Kind.BLANK, Kind.UNKNOWN)
    assert not never_mounted(short)


@given(st.binary(max_size=8192), st.binary(max_size=64))
def test_whatever_the_bytes_there_is_an_answer(head: bytes, tail: bytes) -> None:
    assert recognise(head, tail).kind in Kind
    assert never_mounted(head) in (True, False)
