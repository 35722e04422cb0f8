"""Which entry a name means, among several revisions."""

from __future__ import annotations

import pytest

from nvcache.core.manifest import Manifest
from nvcache.core.ref import EntryId, parse_name, parse_ref
from nvcache.engine.shelf import Entry, LeaseBook, Shelf
from nvcache.errors import Code, RequestError
from nvcache.store.catalog import EntryState, Lease

FIRST, SECOND, OTHER = "cef110c9f631" + "0" * 28, "cef110c9f632" + "0" * 28, "20240101" + "f" * 32
LISTING = "ab" * 32


def shelf_of(*refs: str, names: tuple[str, ...] = ()) -> Shelf:
    shelf = Shelf()
    for number, ref in enumerate(refs):
        manifest = Manifest(parse_ref(ref), asked=ref, endpoint="", files=(), verified_at="2026-01-01T00:00:00Z", version="0")
        shelf.put(Entry(manifest, EntryState(names=names, resolved_at=number)))
    return shelf


@pytest.mark.parametrize("name", ["org/mini@cef110c9f631", "hf://org/mini@cef110c9f631", "hf--org--mini@cef110c9f631", f"org/mini@{FIRST}"])
def test_the_first_digits_of_a_revision_name_it(name: str) -> None:
    shelf = shelf_of(f"org/mini@{FIRST}", f"org/mini@{SECOND}", f"org/maxi@{FIRST}")
    for find in (shelf.find, shelf.only):
        assert find(parse_name(name)) == EntryId("hf--org--mini", FIRST)


@pytest.mark.parametrize("name", [f"file:///srv/x@{LISTING[:12]}", f"file--srv--x@{LISTING[:12]}"])
def test_those_of_a_directory_as_well(name: str) -> None:
    shelf = shelf_of(f"file:///srv/x@{LISTING}")
    assert shelf.find(parse_name(name)) == EntryId("file--srv--x", LISTING)
    shelf = shelf_of(f"file:///srv/x@{LISTING}", f"file:///srv/x@{LISTING[:12]}@{OTHER + OTHER[:24]}")
    if name.startswith("file://"):  # a directory of just that name comes first
        found = shelf.find(parse_name(name))
        assert found is not None
        assert found.revision == OTHER + OTHER[:24]


@pytest.mark.parametrize("name", ["org/mini@cef110c", "hf--org--mini@cef110c"])
def test_digits_that_several_begin_with_are_refused(name: str) -> None:
    shelf = shelf_of(f"org/mini@{FIRST}", f"org/mini@{SECOND}")
    for find in (shelf.find, shelf.only):
        with pytest.raises(RequestError, match="2 are here that begin with cef110c") as caught:
            find(parse_name(name))
        assert caught.value.code is Code.AMBIGUOUS_REVISION
        assert caught.value.facts["entries"] == [f"hf--org--mini@{SECOND}", f"hf--org--mini@{FIRST}"]


@pytest.mark.parametrize("name", ["org/mini@abcdef0", "org/none@cef110c", "hf--org--mini@abcdef0", "org/mini@cef110"])
def test_others_find_nothing(name: str) -> None:
    shelf = shelf_of(f"org/mini@{FIRST}")
    assert shelf.find(parse_name(name)) is None


def test_a_tag_that_looks_like_digits_is_a_tag_first() -> None:
    shelf = shelf_of(f"org/mini@{FIRST}", names=("20240101",))
    shelf.put(shelf_of(f"org/mini@{OTHER}").entries[EntryId("hf--org--mini", OTHER)])
    assert shelf.find(parse_name("org/mini@20240101")) == EntryId("hf--org--mini", FIRST)


def test_the_leases_of_an_entry_are_found_without_those_of_others() -> None:
    one, two = EntryId("hf--a--b", FIRST), EntryId("hf--a--b", SECOND)
    book = LeaseBook()
    first, second, third = (Lease(name, entry, "pod", 10.0, 5.0) for name, entry in (("x", one), ("y", two), ("z", one)))
    for lease in (first, second, third):
        book[lease.id] = lease
    assert (list(book.of(one)), list(book.of(two)), len(book)) == ([first, third], [second], 3)
    renewed = book["x"] = Lease("x", one, "pod", 20.0, 5.0)
    assert list(book.of(one)) == [renewed, third]
    moved = book["z"] = Lease("z", two, "pod", 10.0, 5.0)
    assert (list(book.of(one)), list(book.of(two))) == ([renewed], [second, moved])
    assert book.pop("x", None) is renewed
    assert book.pop("x", None) is None
    assert (list(book.of(one)), list(book)) == ([], ["y", "z"])
    with pytest.raises(KeyError):
        del book["x"]
