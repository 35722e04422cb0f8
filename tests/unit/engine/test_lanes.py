"""Files through lanes: every byte once, hashed in order whatever lane has it, and an end in every case. The files are real ones."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvcache.core.digest import Algorithm, Digest, git_blob_header
from nvcache.core.ref import Ref, Scheme
from nvcache.engine.lanes import Lanes, Progress
from nvcache.errors import Code, IntegrityError, Interrupted, SourceError
from nvcache.sources.base import FileRemote, ReaderFactory
from nvcache.sources.directory import Directory, file_readers

BLOCK = 1000


class Copying:
    """Keeps what it is given; `act` is called with each block's index first."""

    algorithms = frozenset(Algorithm)

    def __init__(self, remote: FileRemote, act: Callable[[int], object] = lambda index: None) -> None:
        self.path, self.size, self.block = remote.name, remote.size, BLOCK
        self.remote, self.act = remote, act
        self.parts: dict[int, bytes] = {}
        self.times: Counter[int] = Counter()
        self.digests: dict[Algorithm, Digest] = {}
        self.tools: set[int] = set()

    def readers(self) -> ReaderFactory:
        return file_readers(self.remote)

    def take(self, tool: int, index: int, view: memoryview) -> None:
        self.act(index)
        self.times[index] += 1
        self.parts[index] = bytes(view)
        self.tools.add(tool)

    def finish(self, tool: int, digests: dict[Algorithm, Digest]) -> None:
        assert not self.digests
        self.digests = digests


class Tools:
    """A number for each lane."""

    def __init__(self) -> None:
        self.made = self.open = 0
        self.lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[int]:
        with self.lock:
            self.made, self.open = self.made + 1, self.open + 1
            number = self.made
        try:
            yield number
        finally:
            with self.lock:
                self.open -= 1


def remotes(directory: Path, contents: dict[str, bytes]) -> dict[str, FileRemote]:
    """The files, written, as the directory source locates them."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    source = Directory()
    resolved = source.resolve(Ref(Scheme.FILE, str(directory)))
    found = {file.path: source.locate(resolved, file) for file in source.list(resolved)}
    return {name: remote for name, remote in found.items() if isinstance(remote, FileRemote)}


def go(errands: list[Copying], lanes: int = 4) -> tuple[Tools, list[Progress], threading.Event]:
    """Run them."""
    tools, seen, stop = Tools(), list[Progress](), threading.Event()
    try:
        Lanes(errands, lanes, tools, stop).run(seen.append)
    finally:
        assert tools.open == 0
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane") and not thread.daemon]
    return tools, seen, stop


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5 * BLOCK), min_size=1, max_size=6), st.integers(1, 5))
def test_every_byte_once_and_hashed_in_order(tmp_path: Path, sizes: list[int], lanes: int) -> None:
    contents = {f"f{number}": bytes((number + at // 7) % 256 for at in range(size)) for number, size in enumerate(sizes)}
    errands = [Copying(remote) for _, remote in sorted(remotes(tmp_path / "d", contents).items())]
    tools, seen, _ = go(errands, lanes)
    for errand in errands:
        content = contents[errand.path]
        assert b"".join(errand.parts[index] for index in sorted(errand.parts)) == content
        assert set(errand.times.values()) == {1}
        assert {algorithm: digest.hex for algorithm, digest in errand.digests.items()} == {
            Algorithm.SHA256: hashlib.sha256(content).hexdigest(),
            Algorithm.GIT_SHA1: hashlib.sha1(git_blob_header(len(content)) + content).hexdigest(),
            Algorithm.MD5: hashlib.md5(content).hexdigest(),
        }
    assert tools.made <= lanes
    assert (seen[-1].bytes_done, seen[-1].files_done) == (sum(sizes), len(sizes))


def test_nothing_to_do_is_done() -> None:
    assert go([])[1] == []


def test_lanes_share_a_large_file(tmp_path: Path) -> None:
    """Each waits with its first block until all have one."""
    together = threading.Barrier(4, timeout=10)
    errand = Copying(remotes(tmp_path, {"f": bytes(4 * BLOCK)})["f"], lambda index: together.wait())
    go([errand])
    assert len(errand.tools) == 4


@pytest.mark.parametrize("error", [IntegrityError(Code.DIGEST_MISMATCH, "cannot: wrong"), ValueError("a defect")])
def test_one_that_fails_ends_all_and_is_what_is_raised(tmp_path: Path, error: Exception) -> None:
    """Also where others wait for its block."""
    files = remotes(tmp_path, {"a": bytes(20 * BLOCK), "b": bytes(9)})

    def act(index: int) -> None:
        if index == 3:
            raise error

    first, second = Copying(files["a"], act), Copying(files["b"])
    with pytest.raises(type(error)) as caught:
        go([first, second])
    assert caught.value is error
    assert not first.digests


def test_a_file_that_changes_is_no_file(tmp_path: Path) -> None:
    """The reader's error comes through."""
    errand = Copying(remotes(tmp_path, {"f": bytes(3 * BLOCK)})["f"], lambda index: (tmp_path / "f").write_bytes(b"other"))
    with pytest.raises(SourceError) as caught:
        go([errand], 1)
    assert caught.value.code is Code.SOURCE_CHANGED


@pytest.mark.parametrize(("refusals", "code"), [(2, None), (3, Code.BAD_TOKEN)])
def test_a_credential_that_is_refused_is_asked_for_anew(tmp_path: Path, refusals: int, code: Code | None) -> None:
    """A few times."""
    errand = Refused(remotes(tmp_path, {"f": bytes(3 * BLOCK)})["f"], refusals)
    if code is None:
        go([errand], 1)
        assert errand.digests
    else:
        with pytest.raises(SourceError) as caught:
            go([errand], 1)
        assert caught.value.code is code
    assert errand.located == min(refusals + 1, 3)


class Refused(Copying):
    """A source that refuses the first readers."""

    def __init__(self, remote: FileRemote, refusals: int) -> None:
        super().__init__(remote)
        self.refusals, self.located = refusals, 0

    def readers(self) -> ReaderFactory:
        self.located += 1
        if self.located <= self.refusals:
            raise SourceError(Code.BAD_TOKEN, "cannot fetch f: the token is refused")
        return super().readers()


def test_what_happens_to_the_caller_ends_them(tmp_path: Path) -> None:
    """As Ctrl-C does; a reader that waits is cut."""
    files = remotes(tmp_path, {"f": bytes(3 * BLOCK)})
    errand = Copying(files["f"])
    stalled = Stalled()
    errand.readers = lambda: lambda: stalled  # type: ignore[method-assign]

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lanes([errand], 1, Tools(), threading.Event()).run(interrupt)
    assert stalled.ended.is_set()


class Stalled:
    """Says nothing until it is cut."""

    def __init__(self) -> None:
        self.received = 0
        self._aborted, self.ended = threading.Event(), threading.Event()

    def read(self, offset: int, into: memoryview) -> None:
        self._aborted.wait(20)
        raise Interrupted(Code.CANCELLED, "cannot fetch f: cancelled")

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self.ended.set()
