"""What happens between opening a store and being ready: read the catalog, put half-made things right.

Every step may be repeated and may be killed at any instant. A manifest whose blobs are gone is dropped, aloud; one whose blob lies in quarantine is
degraded and repaired.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from nvcache.core.manifest import Manifest
from nvcache.core.ref import EntryId
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.shelf import Entry, hub_id
from nvcache.errors import Code, IntegrityError
from nvcache.store.catalog import EntryState
from nvcache.store.condemn import finish_condemning
from nvcache.store.root import Root

log = logging.getLogger(__name__)


def load_shelf(do: Context, root: Root, leases_until: float) -> None:
    """Read everything back and make the disk agree with it. Blocks. Leases live at least until `leases_until` (unix seconds)."""
    finish_condemning(do.layout, do.blobs)
    plans = do.catalog.plans()
    states: dict[EntryId, EntryState] = {}
    found = do.catalog.manifests()
    for entry_id, manifest in found.items():
        states[entry_id] = do.catalog.state(entry_id)
        entry = Entry(manifest, states[entry_id], last_used=do.catalog.last_used(entry_id, clock.unix()))
        missing = [sha256 for sha256, size in manifest.blobs.items() if not do.blobs.has(sha256, size)]
        lost = [sha256 for sha256 in missing if not (do.layout.quarantine / sha256).exists()]
        if lost and entry_id not in plans:
            _drop(do, manifest, entry)
            continue
        if missing:
            entry.suspect = True
            entry.broken = IntegrityError(Code.DEGRADED, f"cannot serve {entry_id}: {len(missing)} of its files went bad and are being repaired")
        do.shelf.put(entry)
    root.sweep()
    do.views.prune([(entry.manifest, entry.hub_id) for entry in do.shelf.entries.values() if entry.broken is None])
    for entry in do.shelf.entries.values():
        if entry.broken is None and not do.views.complete(entry.manifest, entry.hub_id):
            do.views.publish(entry.manifest, hub_id=entry.hub_id, names=entry.state.names)
    _collect_garbage(do, {file.sha256 for plan in plans.values() for file in plan.files if file.sha256})
    _load_leases(do, leases_until)


def _drop(do: Context, manifest: Manifest, entry: Entry) -> None:
    log.error("a model is dropped: blobs of it are gone", extra={"facts": {"model": str(manifest.id)}})
    do.counters.dropped_manifests += 1
    do.views.withdraw(manifest, hub_id=hub_id(manifest.ref, entry.state.alias))
    do.catalog.remove_manifest(manifest.id)
    do.catalog.remove_state(manifest.id)


def _collect_garbage(do: Context, wanted: set[str]) -> None:
    """Remove blobs that no view shows and no plan wants; nothing else runs yet, so none can be on its way to a view."""
    keep = set(wanted)
    for entry in do.shelf.entries.values():
        keep |= entry.manifest.blobs.keys()
    keep |= do.receipted()
    for sha256, _ in list(do.blobs.unreferenced(keep, grace=0)):
        do.blobs.remove_if_unreferenced(sha256, grace=0)


def _load_leases(do: Context, until: float) -> None:
    for lease in do.catalog.leases().values():
        if lease.entry in do.shelf.entries:
            do.shelf.leases[lease.id] = replace(lease, expires=max(lease.expires, until))
        else:
            do.catalog.remove_lease(lease.id)
