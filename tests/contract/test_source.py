"""What every source owes the engine (nvcache/sources/base.py), whatever serves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from nvcache.core.names import check_names
from nvcache.core.plan import RemoteFile
from nvcache.errors import Interrupted, SourceError
from nvcache.sources.base import Reader, remote_from_dict, remote_to_dict
from nvcache.sources.open import open_remote
from tests.contract.conftest import Subject, Tools


def test_resolve_pins_a_revision(subject: Subject) -> None:
    """A model without a revision gets one, the same each time, and a pinned reference stays what it is."""
    resolved = subject.source.resolve(subject.ref)
    assert resolved.ref.pinned
    assert resolved.ref.at(None) == subject.ref
    assert subject.source.resolve(subject.ref) == resolved
    again = subject.source.resolve(resolved.ref)
    assert (again.ref, again.name) == (resolved.ref, None)


def test_a_moving_name_is_told(subject: Subject) -> None:
    """The Hub's branch that was followed is named; directories and blobs have none."""
    assert subject.source.resolve(subject.ref).name == subject.name


def test_list_is_complete_and_stable(subject: Subject) -> None:
    """Every file with its size, once, by path, and the same the next time."""
    resolved = subject.source.resolve(subject.ref)
    files = subject.source.list(resolved)
    check_names(file.path for file in files)
    assert [file.path for file in files] == sorted(subject.files)
    assert {file.path: file.size for file in files} == {path: source.stat().st_size for path, source in subject.files.items()}
    assert subject.source.list(resolved) == files


def test_list_gives_the_digests_that_are_published(subject: Subject) -> None:
    """LFS: SHA-256 of the content; plain files: git's blob id; directories and blobs: what stands beside them, else nothing."""
    for file in _list(subject):
        assert str(file.digest) == subject.digest(file.path), file.path
        if subject.digests == "hub":
            assert file.token == subject.digest(file.path).partition(":")[2]


def test_bytes_are_right_at_odd_offsets(subject: Subject, tools: Tools) -> None:
    """Whole files, and of the weights unaligned pieces, forwards and backwards, by one reader."""
    for file in _list(subject):
        content = subject.files[file.path].read_bytes()
        size = len(content)
        spans = [(0, size), (1, 8), (size - 1, size), (size // 3 | 1, size - 2), (5, 5)] if file.path.endswith(".safetensors") else [(0, size)]
        for reader in _reader(subject, tools, file):
            for start, stop in spans:
                assert _read(reader, start, stop) == content[start:stop], (file.path, start, stop)


def test_a_remote_survives_the_pipe_to_a_worker(subject: Subject) -> None:
    """What is located is plain data."""
    resolved = subject.source.resolve(subject.ref)
    for file in subject.source.list(resolved):
        remote = subject.source.locate(resolved, file)
        assert remote_from_dict(json.loads(json.dumps(remote_to_dict(remote)))) == remote


def test_many_threads_at_once(subject: Subject, tools: Tools) -> None:
    """All three calls, and readers, from eight threads."""
    largest = max(_list(subject), key=lambda file: file.size)
    content = subject.files[largest.path].read_bytes()

    def ask(_: int) -> object:
        resolved = subject.source.resolve(subject.ref)
        return resolved, subject.source.list(resolved)

    def read(number: int) -> bool:
        start = number * 1001
        return all(_read(reader, start, len(content)) == content[start:] for reader in _reader(subject, tools, largest))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
        assert all(pool.map(read, range(8)))


def test_an_aborted_reader_reads_no_more(subject: Subject, tools: Tools) -> None:
    """Abort holds for every later read; closing twice is allowed."""
    file = max(_list(subject), key=lambda file: file.size)
    for reader in _reader(subject, tools, file):
        reader.abort()
        with pytest.raises(Interrupted):
            _read(reader, 0, 10)
        reader.close()


def test_a_missing_model_is_named(subject: Subject) -> None:
    """One code for what does not exist, permanent, and no secret in any text."""
    gone = replace(subject.ref, location=subject.ref.location + "-gone")
    with pytest.raises(SourceError) as caught:
        subject.source.resolve(gone)
    assert caught.value.code is subject.missing
    assert not caught.value.retryable
    assert gone.location in str(caught.value)
    _no_secret(subject, caught.value)


def test_a_missing_revision_is_named(subject: Subject) -> None:
    """A name the model does not have, or a listing it no longer has, when resolved or at the latest when listed."""
    lost = subject.ref.at("no-such-name" if subject.name else "0" * 64)
    with pytest.raises(SourceError) as caught:
        subject.source.resolve(lost)
    assert caught.value.code is subject.lost_revision
    assert not caught.value.retryable
    _no_secret(subject, caught.value)


def test_nothing_printable_holds_a_secret(subject: Subject) -> None:
    """Representations of what is resolved, listed and located."""
    resolved = subject.source.resolve(subject.ref)
    files = subject.source.list(resolved)
    remotes = [subject.source.locate(resolved, file) for file in files]
    assert not [secret for secret in subject.secrets if secret in repr((resolved, files, remotes))]


def _list(subject: Subject) -> tuple[RemoteFile, ...]:
    return subject.source.list(subject.source.resolve(subject.ref))


def _reader(subject: Subject, tools: Tools, file: RemoteFile) -> Iterator[Reader]:
    """One reader of `file`, closed after use."""
    remote = subject.source.locate(subject.source.resolve(subject.ref), file)
    with closing(open_remote(remote, subject.transport, tools.throttle, tools.watchdog)()) as reader:
        yield reader


def _read(reader: Reader, start: int, stop: int) -> bytes:
    into = bytearray(stop - start)
    reader.read(start, memoryview(into))
    return bytes(into)


def _no_secret(subject: Subject, error: SourceError) -> None:
    told = f"{error!r} {error} {error.hint} {error.facts}"
    assert not [secret for secret in subject.secrets if secret in told]
