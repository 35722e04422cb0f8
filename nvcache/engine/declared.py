"""The models that the operator has declared, as the file has them now, and which entries they mean. It fetches nothing and removes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from nvcache.core.ref import EntryId, Ref
from nvcache.engine.shelf import Entry, Shelf
from nvcache.errors import RequestError
from nvcache.settings import ModelSetting


class Declared:
    """What is declared, one a daemon: it outlives every store, and is put in place anew when the file changes."""

    def __init__(self, models: Iterable[ModelSetting]) -> None:
        self.put(models)

    def put(self, models: Iterable[ModelSetting]) -> None:
        """From now on these are declared and no others."""
        self.models = tuple(dict.fromkeys(models))
        self.refs = tuple(dict.fromkeys(model.reference for model in self.models))
        self.aliased = {model.alias: model.reference for model in self.models if model.alias and model.reference.location != model.alias}
        self._pinned = frozenset(model.reference for model in self.models if model.pin)
        self._by_name: dict[str, list[Ref]] = {}  # slug or name in the HuggingFace view → what is declared under it
        for ref in self.refs:
            for name in (ref.slug, ref.location):
                self._by_name.setdefault(name, []).append(ref)

    def holds(self, entry: Entry, shelf: Shelf) -> bool:
        """Whether a declared model means this entry just now; an older revision of it is not what is declared any more."""
        return bool(self._meaning(entry, shelf))

    def pins(self, entry: Entry, shelf: Shelf) -> bool:
        """The same of those with `pin`."""
        return not self._pinned.isdisjoint(self._meaning(entry, shelf))

    def _meaning(self, entry: Entry, shelf: Shelf) -> list[Ref]:
        named = (*self._by_name.get(entry.id.slug, ()), *self._by_name.get(entry.hub_id or "", ()))
        return [ref for ref in named if _find(ref, shelf) == entry.id]


def _find(ref: Ref, shelf: Shelf) -> EntryId | None:
    try:
        return shelf.find(ref)
    except RequestError:  # it begins several commits
        return None
