"""The catalog on disk: what is written is read back, and garbage is set aside, never fatal."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvcache.core.plan import Priority
from nvcache.store.catalog import Catalog, EntryState, Lease
from nvcache.store.layout import Layout
from tests.unit.store.helpers import manifest_of, new_store, noise, plan_of

FILES = {"config.json": b"{}", "model.safetensors": noise(200_000)}
MANIFEST, PLAN = manifest_of(FILES), plan_of(FILES)
ENTRY = MANIFEST.id
STATE = EntryState(
    pin=True, alias="org/alias", names=("main", "refs/pr/1"), checked_at="2025-01-01T00:00:00Z", resolved_at=12.5, fill_bytes=7, fill_seconds=0.5
)
LEASE = Lease("l-1", ENTRY, "pod-7", 1_700_000_000.5, 600.0)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_store(tmp_path / "store")


@pytest.fixture
def catalog(layout: Layout) -> Catalog:
    return Catalog(layout)


def test_everything_survives_a_restart(layout: Layout, catalog: Catalog) -> None:
    catalog.write_manifest(MANIFEST)
    catalog.write_plan(PLAN.with_priority(Priority.REPAIR))
    catalog.write_state(ENTRY, STATE)
    catalog.write_lease(LEASE)
    again = Catalog(layout)
    assert again.manifests() == {ENTRY: MANIFEST}
    assert again.plans() == {ENTRY: PLAN.with_priority(Priority.REPAIR)}
    assert again.state(ENTRY) == STATE
    assert again.leases() == {"l-1": LEASE}
    again.write_lease(replace(LEASE, expires=2.0))
    assert catalog.leases()["l-1"].expires == 2.0
    assert os.listdir(layout.tmp) == []


def test_what_is_removed_is_gone_and_removing_twice_is_fine(catalog: Catalog) -> None:
    catalog.write_manifest(MANIFEST)
    catalog.write_plan(PLAN)
    catalog.write_state(ENTRY, STATE)
    catalog.write_lease(LEASE)
    catalog.touch(ENTRY, 5.0)
    for _ in range(2):
        catalog.remove_manifest(ENTRY)
        catalog.remove_plan(ENTRY)
        catalog.remove_state(ENTRY)
        catalog.remove_lease("l-1")
    assert (catalog.manifests(), catalog.plans(), catalog.leases(), catalog.state(ENTRY)) == ({}, {}, {}, EntryState())
    assert catalog.last_used(ENTRY, 10.0) is None


def test_the_last_use_is_kept_and_never_in_the_future(catalog: Catalog) -> None:
    assert catalog.last_used(ENTRY, 100.0) is None
    catalog.touch(ENTRY, 50.0)
    assert catalog.last_used(ENTRY, 100.0) == 50.0
    catalog.touch(ENTRY, 500.0)
    assert catalog.last_used(ENTRY, 100.0) == 100.0


@pytest.mark.parametrize("folder", ["manifests", "plans", "leases"])
def test_a_torn_file_is_set_aside_and_the_others_are_read(layout: Layout, catalog: Catalog, caplog: pytest.LogCaptureFixture, folder: str) -> None:
    catalog.write_manifest(MANIFEST)
    catalog.write_plan(PLAN)
    catalog.write_lease(LEASE)
    place: Path = getattr(layout, folder)
    sound = next(place.glob("*.json"))
    (place / "torn.json").write_bytes(sound.read_bytes()[:-20])
    (place / "renamed.json").write_bytes(sound.read_bytes())
    (place / "deep.json").write_bytes(b"[" * 100_000)
    (place / "notes.txt").write_text("not ours to judge")
    with caplog.at_level(logging.WARNING):
        assert len(getattr(catalog, folder)()) == 1
    assert sorted(os.listdir(place)) == sorted([sound.name, "notes.txt"])
    assert sorted(os.listdir(layout.quarantine / folder)) == ["deep.json", "renamed.json", "torn.json"]
    assert sum("cannot use" in record.message for record in caplog.records) == 3
    assert len(getattr(catalog, folder)()) == 1


def test_torn_state_is_the_default_and_set_aside(layout: Layout, catalog: Catalog) -> None:
    layout.state_file(ENTRY).write_bytes(b'{"pin": "yes"')
    assert catalog.state(ENTRY) == EntryState()
    assert os.listdir(layout.quarantine / "state") == [layout.state_file(ENTRY).name]


def test_an_unreadable_file_is_said_and_left(layout: Layout, catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    layout.state_file(ENTRY).mkdir()
    assert catalog.state(ENTRY) == EntryState()
    assert layout.state_file(ENTRY).is_dir()
    assert "cannot read" in caplog.text


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "entry", "holder", "pin", "names", "format", "files"]), inner),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.binary(max_size=60) | json_like.map(lambda value: json.dumps(value).encode()))
def test_no_garbage_is_fatal(layout: Layout, catalog: Catalog, content: bytes) -> None:
    name = f"{ENTRY}.json"
    for place in (layout.manifests, layout.plans, layout.leases, layout.state):
        (place / name).write_bytes(content)
    assert (catalog.manifests(), catalog.plans(), catalog.leases(), catalog.state(ENTRY)) == ({}, {}, {}, EntryState())
