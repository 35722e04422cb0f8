"""Keeps what KAITO finds in step with what is ready: a view in the store for each Hub name, and a link to it where KAITO looks.

A KAITO pod asks nobody: it loads what lies under the name. So a link is made last, when the view is whole and the entry ready, and goes first,
before anything of the entry does; and everything here follows from what the shelf says (`settle`), whoever changed it. Whoever takes an entry away
says so on the shelf and awaits `settle` before he touches a file.

A name shows the entry that the name means without a revision. When another entry takes it over, the link is gone for a moment: a pod that is just
made waits, one that is just loading fails and starts again.

A daemon that stops leaves the links: the stripe stays mounted and the files stay right, so pods start as if it ran, and its upgrade is no outage.
Should the disks go meanwhile, the links lead nowhere, and the next start removes them. A daemon that learns that the stripe goes removes them all.

Nothing here fails a fill, a repair or a removal: what KAITO lacks is a warning of the model, tried again at the next change and every half minute.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nvcache.core.kaito import LACKS, kaito_name, share_out
from nvcache.core.manifest import Manifest
from nvcache.core.ref import EntryId
from nvcache.engine.blocking import DaemonExecutor, unbroken
from nvcache.engine.shelf import Entry, Shelf
from nvcache.errors import NvcacheError
from nvcache.settings import Settings
from nvcache.store.kaito import KaitoLinks
from nvcache.store.views import Views

log = logging.getLogger(__name__)


class Links:
    """KAITO's links of one daemon, which outlive its sessions. One thread does one call after the other, whatever the stripe's disks are stuck in."""

    def __init__(self, settings: Settings) -> None:
        self._links = KaitoLinks(settings.kaito_models, settings.kaito_store or settings.store) if settings.kaito_models else None
        self._thread = DaemonExecutor("kaito", 1)

    @property
    def wanted(self) -> bool:
        """Whether there are to be any."""
        return self._links is not None

    async def make(self, names: Iterable[str]) -> dict[str, str]:
        """Have these; why not, of each that cannot be made."""
        return await self._thread.call(self._links.make, list(names)) if self._links is not None else {}

    async def remove(self, names: Iterable[str]) -> None:
        """Have none of these."""
        if self._links is not None:
            await self._thread.call(self._links.remove, list(names))

    async def clear(self) -> None:
        """Have none at all."""
        await self._thread.call(self.keep, ())

    def keep(self, names: Iterable[str]) -> None:
        """Have none but these. Blocks: for a thread that opens a store, before `make` is called for it."""
        if self._links is not None:
            self._links.keep(frozenset(names))


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """A view for KAITO: under whose name, and which files."""

    hub_id: str
    manifest: Manifest

    def same_entry(self, other: _Shown | None) -> bool:
        """Whether the other view may take this one's place by links that are added."""
        return other is not None and (self.hub_id, self.manifest.id) == (other.hub_id, other.manifest.id)


class Kaito:
    """Views and links of one store. All methods but `take_over` belong to the event loop."""

    def __init__(self, shelf: Shelf, views: Views, disk: DaemonExecutor, links: Links, doubt: Callable[[NvcacheError], None]) -> None:
        self._shelf = shelf
        self._views = views
        self._disk = disk
        self._links = links
        self._doubt = doubt
        self._lock = asyncio.Lock()  # one change of views at a time; links are removed without it
        self._closed = False
        self._holders: dict[str, str] = {}  # KAITO's name → the Hub id that has it
        self._shown: dict[str, _Shown] = {}  # KAITO's name → what its view shows
        self._refused: dict[EntryId, str] = {}  # who goes without a name, and why
        self._warnings: dict[EntryId, str] = {}

    def take_over(self) -> frozenset[str]:
        """At start, blocking: find the views that are right, remove every link to another, and name them. Raises `DiskError`."""
        for hub_id, entry in self._shelf.standing().items() if self._links.wanted else ():
            name = kaito_name(hub_id)
            if name not in self._shown and _servable(entry) and self._views.kaito_shows(entry.manifest, hub_id):
                self._holders[name], self._shown[name] = hub_id, _Shown(hub_id, entry.manifest)
        self._links.keep(self._shown)
        return frozenset(self._shown)

    async def settle(self) -> None:
        """Make views and links agree with the shelf. When this returns, no link leads to an entry that was not ready when it was called."""
        if self._links.wanted and not self._closed:
            await unbroken(self._settle())

    def close(self) -> None:
        """The session ends: make no link any more."""
        self._closed = True

    def shown_as(self, entry: Entry) -> str | None:
        """The Hub name as which KAITO is shown just this state of the entry, if it is."""
        shown = self._shown.get(kaito_name(entry.hub_id)) if entry.hub_id else None
        return shown.hub_id if shown is not None and shown.manifest is entry.manifest else None

    def warnings(self, entry_id: EntryId) -> tuple[str, ...]:
        """What keeps KAITO from finding the entry, where it should."""
        found = self._warnings.get(entry_id)
        return () if found is None else (found,)

    async def _settle(self) -> None:
        wanted = self._wanted()
        if gone := [name for name, shown in self._shown.items() if not shown.same_entry(wanted.get(name))]:
            await self._links.remove(gone)
        async with self._lock:
            lacking = await self._settle_views()
            wanted = self._wanted()  # who withdrew an entry meanwhile found no link to remove
            whole = [name for name, shown in self._shown.items() if shown.same_entry(wanted.get(name))]
            if not self._closed:
                lacking |= await self._links.make(whole)
                self._warn(self._refused | {wanted[name].manifest.id: why for name, why in lacking.items() if name in wanted})

    def _wanted(self) -> dict[str, _Shown]:
        """What KAITO should be shown, by its name."""
        standing = self._shelf.standing()
        self._holders, without = share_out(standing, self._holders)
        self._refused = {standing[mine].id: f"{other} has its name there, {kaito_name(mine)}" for mine, other in without.items()}
        return {name: _Shown(hub_id, standing[hub_id].manifest) for name, hub_id in self._holders.items() if _servable(standing[hub_id])}

    async def _settle_views(self) -> dict[str, str]:
        """Hide and show what has to be; the names that lack something, and why."""
        lacking: dict[str, str] = {}
        for name, shown in list(self._shown.items()):
            if not shown.same_entry(self._wanted().get(name)):
                del self._shown[name]  # from here on a look at the entry's files passes it over
                if why := await self._change(self._views.withdraw_kaito, hub_id=shown.hub_id):
                    lacking[name], self._shown[name] = why, shown
        for name, target in self._wanted().items():
            now = self._shown.get(name)
            if now is not None and (now.manifest is target.manifest or not now.same_entry(target)):
                continue  # it is right, or another's that could not be hidden
            if why := await self._change(self._views.publish_kaito, target.manifest, hub_id=target.hub_id):
                lacking[name] = why
            else:
                self._shown[name] = target
        return lacking

    async def _change(self, change: Callable[..., None], *args: Manifest, hub_id: str) -> str | None:
        """Why a change of a view failed; None when it did not."""
        try:
            await self._disk.call(change, *args, hub_id=hub_id)
        except NvcacheError as error:
            self._doubt(error)
            return str(error)
        return None

    def _warn(self, lacking: dict[EntryId, str]) -> None:
        """Note what is lacking as warnings of the entries, and say in the log what was not said before."""
        found = {entry_id: f"{LACKS}: {why}" for entry_id, why in lacking.items()}
        for entry_id, warning in found.items():
            if self._warnings.get(entry_id) != warning:
                log.warning("%s", warning, extra={"facts": {"model": str(entry_id)}})
        self._warnings = found


def _servable(entry: Entry) -> bool:
    return entry.broken is None and not entry.removing
