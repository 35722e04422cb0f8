"""The names that models have for KAITO, and who has one that two share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.kaito import kaito_name, share_out


@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        ("deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai-deepseek-v4-flash"),  # KAITO's own examples
        ("google/gemma-4-31B-it", "google-gemma-4-31b-it"),
        ("gpt2", "gpt2"),
        ("Org\\Name", "org-name"),
    ],
)
def test_names_are_kaito_s(hub_id: str, name: str) -> None:
    assert kaito_name(hub_id) == name


def test_who_has_a_name_keeps_it() -> None:
    assert share_out(["a-b/c", "a/b-c"], {}) == ({"a-b-c": "a-b/c"}, {"a/b-c": "a-b/c"})
    assert share_out(["a-b/c", "a/b-c"], {"a-b-c": "a/b-c"}) == ({"a-b-c": "a/b-c"}, {"a-b/c": "a/b-c"})
    assert share_out(["a-b/c"], {"a-b-c": "a/b-c"}) == ({"a-b-c": "a-b/c"}, {})
    assert share_out([], {"a-b-c": "a/b-c"}) == ({}, {})


IDS = st.lists(st.sampled_from(["a/b-c", "a-b/c", "A/b-C", "x/y", "X/Y", "z"]), unique=True)


@given(IDS, IDS)
def test_each_has_its_name_or_knows_who_has(first: list[str], second: list[str]) -> None:
    before, _ = share_out(first, {})
    given_, without = share_out(second, before)
    assert {*given_.values(), *without} == set(second)
    assert set(given_.values()).isdisjoint(without)
    for name, hub_id in given_.items():
        assert kaito_name(hub_id) == name
        assert hub_id == before.get(name, hub_id) or before[name] not in second
    for loser, winner in without.items():
        assert given_[kaito_name(loser)] == winner
