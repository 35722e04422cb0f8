"""What happens between opening a store and being ready: read the catalog, put half-made things right.

Every step may be repeated and may be killed at any instant. An entry whose blobs are gone, short or in quarantine is degraded, and repaired like one
whose files went bad while the daemon ran: its pin and its leases stay. What the disk does not give back is not taken for gone: a model whose manifest
cannot be read is not served, and keeps its blobs and leases; one whose state cannot be read counts as pinned.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from nvcache.core.plan import FillPlan
from nvcache.core.ref import EntryId
from nvcache.core.timeline import Kind
from nvcache.engine import clock
from nvcache.engine.context import Context
from nvcache.engine.shelf import Entry
from nvcache.errors import Code, IntegrityError
from nvcache.store.catalog import EntryState
from nvcache.store.condemn import finish_condemning
from nvcache.store.root import Root

log = logging.getLogger(__name__)


def load_shelf(do: Context, root: Root, leases_until: float) -> list[FillPlan]:
    """Read everything back and make the disk agree with it; returns the fills to go on with. Blocks. Raises `DiskError`, `SpaceError`.

    Leases live at least until `leases_until` (unix seconds).
    """
    finish_condemning(do.layout, do.blobs)
    plans = do.catalog.plans()
    states: dict[EntryId, EntryState] = {}
    found = do.catalog.manifests()
    for entry_id, manifest in found.items():
        states[entry_id] = do.catalog.state(entry_id)
        if do.layout.state_file(entry_id) in do.catalog.unread:
            states[entry_id] = replace(states[entry_id], pin=True)  # it may have been
        entry = Entry(manifest, states[entry_id], last_used=do.catalog.last_used(entry_id, clock.unix()))
        missing = [sha256 for sha256, size in manifest.blobs.items() if not do.blobs.has(sha256, size)]
        if missing:
            _withdraw(do, entry, f"{len(missing)} of its files are gone or went bad")
        do.shelf.put(entry)
    root.sweep()
    shown = [(entry.manifest, entry.hub_id) for entry in do.shelf.entries.values() if entry.broken is None]
    do.views.prune(shown, kaito=do.kaito.take_over(), unknown=do.catalog.unread_entries())
    for entry in do.shelf.entries.values():
        if entry.broken is None and not do.views.complete(entry.manifest, entry.hub_id):
            do.views.publish(entry.manifest, hub_id=entry.hub_id, names=entry.state.names)
    _collect_garbage(do, {file.sha256 for plan in plans.values() for file in plan.files if file.sha256})
    _load_leases(do, leases_until)
    return list(plans.values())


def _withdraw(do: Context, entry: Entry, why: str) -> None:
    """It is not served before its repair, which reads all of it. `prune` takes its views away."""
    log.error("a model is withdrawn and repaired: %s", why, extra={"facts": {"model": str(entry.id)}})
    entry.suspect = True
    entry.broken = IntegrityError(Code.DEGRADED, f"cannot serve {entry.id}: {why}; they are being repaired")
    do.timeline.at_start(entry.id, Kind.WITHDRAWN, what=f"{why}, as the daemon started", code=str(Code.DEGRADED))


def _collect_garbage(do: Context, wanted: set[str]) -> None:
    """Remove blobs that no view shows and no plan wants; nothing else runs yet, so none can be on its way to a view."""
    keep = set(wanted)
    for entry in do.shelf.entries.values():
        keep |= entry.manifest.blobs.keys()
    keep |= do.receipted()
    for sha256, _ in list(do.blobs.unreferenced(keep, grace=0)):
        do.blobs.remove_if_unreferenced(sha256, grace=0)


def _load_leases(do: Context, until: float) -> None:
    now, unknown = clock.unix(), do.catalog.unread_entries()
    for lease in do.catalog.leases().values():
        if lease.entry in do.shelf.entries:
            do.shelf.leases[lease.id] = replace(lease, expires=max(min(lease.expires, now + lease.ttl), until))  # the clock may have been set back
        elif lease.entry not in unknown:
            do.catalog.remove_lease(lease.id)
