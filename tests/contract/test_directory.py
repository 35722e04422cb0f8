"""The directory source: which files it takes, what it notices, what it says of what it cannot read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from nvcache.core.ref import Ref, Scheme
from nvcache.errors import Code, SourceError
from nvcache.sources.base import FileRemote
from nvcache.sources.directory import PIECE, Directory, file_readers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with two files, one in a folder."""
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "w.safetensors").write_bytes(bytes(range(256)) * 8)
    return folder


def ref(folder: Path) -> Ref:
    """The reference of `folder`."""
    return Ref(Scheme.FILE, str(folder))


def paths(folder: Path) -> list[str]:
    """What is listed."""
    return [file.path for file in Directory().list(Directory().resolve(ref(folder)))]


def refused(call: Callable[[], object]) -> SourceError:
    """The error that `call` raises."""
    with pytest.raises(SourceError) as caught:
        call()
    return caught.value


def remote_of(folder: Path, path: str) -> FileRemote:
    """Where one of its files is."""
    resolved = Directory().resolve(ref(folder))
    return Directory().locate(resolved, next(file for file in Directory().list(resolved) if file.path == path))


def read(remote: FileRemote, start: int, size: int) -> bytes:
    """Bytes by a reader of their own."""
    reader, into = file_readers(remote)(), bytearray(size)
    try:
        reader.read(start, memoryview(into))
    finally:
        reader.close()
    return bytes(into)


def test_hidden_names_and_what_is_no_file_are_left_out(folder: Path) -> None:
    """.git/, .cache/ and dot files, pipes."""
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / "sub" / ".hidden").write_text("x")
    os.mkfifo(folder / "pipe")
    assert paths(folder) == ["config.json", "sub/w.safetensors"]


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    """To files and folders anywhere; a link to a folder above it is left out."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tokenizer.json").write_text("{}")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)
    (elsewhere / "self").symlink_to(elsewhere)
    assert paths(folder) == ["again/tokenizer.json", "config.json", "linked/tokenizer.json", "sub/w.safetensors"]


def test_folders_that_multiply_are_refused(folder: Path, tmp_path: Path) -> None:
    """Thirty folders, each linked twice from the one before, are two to the thirty paths."""
    places = [tmp_path / f"d{i}" for i in range(30)]
    for place in places:
        place.mkdir()
    for place, following in pairwise(places):
        (place / "x").symlink_to(following)
        (place / "y").symlink_to(following)
    (folder / "deep").symlink_to(places[0])
    assert refused(lambda: paths(folder)).code is Code.SOURCE_PROTOCOL


def test_a_dangling_link_is_an_error(folder: Path) -> None:
    """A model that lacks a shard must not look whole."""
    (folder / "shard.safetensors").symlink_to(folder / "gone")
    error = refused(lambda: paths(folder))
    assert error.code is Code.FILE_NOT_FOUND
    assert "shard.safetensors" in str(error)


@pytest.mark.parametrize("change", ["content", "touch", "add", "remove", "replace"])
def test_any_change_is_another_revision(folder: Path, change: str) -> None:
    """A pinned reference whose files changed is gone; a listing of the old revision is refused."""
    source, file = Directory(), folder / "config.json"
    before = source.resolve(ref(folder))
    match change:
        case "content":
            file.write_text("[]")
            os.utime(file, ns=(1, 1))
        case "touch":
            os.utime(file, ns=(1, 1))
        case "add":
            (folder / "new").write_text("")
        case "remove":
            file.unlink()
        case _:
            facts = file.stat()
            other = folder.parent / "other"
            other.write_text("[]")
            os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            other.replace(file)
    assert source.resolve(ref(folder)).ref.revision != before.ref.revision
    assert refused(lambda: source.resolve(before.ref)).code is Code.REVISION_NOT_FOUND
    changed = refused(lambda: source.list(before))
    assert (changed.code, changed.retryable) == (Code.SOURCE_CHANGED, True)


def test_a_token_is_of_one_place_and_a_revision_of_its_content(folder: Path, tmp_path: Path) -> None:
    """Hard links differ (two names, maybe two digests), links to one file do not; a changed inode is another token, but no other revision."""
    source, file = Directory(), folder / "config.json"
    (folder / "hard.json").hardlink_to(file)
    (folder / "soft.json").symlink_to("config.json")
    before = source.resolve(ref(folder))
    tokens = {listed.path: listed.token for listed in source.list(before)}
    assert tokens["config.json"] == tokens["soft.json"] != tokens["hard.json"]
    remote = remote_of(folder, "config.json")
    (tmp_path / "backup.json").hardlink_to(file)  # moves the ctime only
    assert source.resolve(ref(folder)).ref.revision == before.ref.revision
    assert {listed.path: listed.token for listed in source.list(before)}["config.json"] != tokens["config.json"]
    assert refused(lambda: read(remote, 0, 2)).code is Code.SOURCE_CHANGED


def test_the_revision_does_not_depend_on_the_mount(folder: Path) -> None:
    """Path, size, mtime and inode: what is the same when the disk is mounted again."""
    digest = hashlib.sha256()
    for path in ("config.json", "sub/w.safetensors"):
        facts = (folder / path).stat()
        digest.update(f"{path}\0{facts.st_size}\0{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}\0".encode())
    assert Directory().resolve(ref(folder)).ref.revision == digest.hexdigest()


def test_a_link_that_leads_elsewhere_is_noticed(folder: Path) -> None:
    """A hard link of the same inode in its place is not what was listed either."""
    (folder / "hard.json").hardlink_to(folder / "config.json")
    (folder / "soft.json").symlink_to("config.json")
    remote = remote_of(folder, "soft.json")
    assert read(remote, 0, 2) == b"{}"
    (folder / "soft.json").unlink()
    (folder / "soft.json").symlink_to("hard.json")
    assert refused(lambda: read(remote, 0, 2)).code is Code.SOURCE_CHANGED


@pytest.mark.parametrize("change", ["touch", "truncate", "replace"])
def test_a_file_that_changes_under_a_reader_is_noticed(folder: Path, change: str) -> None:
    """Between listing and opening, and between two reads."""
    path = folder / "sub" / "w.safetensors"
    remote = remote_of(folder, "sub/w.safetensors")
    reader, into = file_readers(remote)(), memoryview(bytearray(100))
    reader.read(0, into)
    match change:
        case "touch":
            os.utime(path, ns=(1, 1))
        case "truncate":
            os.truncate(path, 150)
        case _:
            path.unlink()
            path.write_bytes(bytes(2048))
    if change != "replace":  # an open file is not affected by another that takes its name
        assert refused(lambda: reader.read(100, into)).code is Code.SOURCE_CHANGED
    reader.close()
    assert refused(lambda: read(remote, 0, 10)).code is Code.SOURCE_CHANGED


def test_a_pipe_in_the_place_of_a_file_does_not_block(folder: Path) -> None:
    """It is opened without waiting for a writer."""
    remote = remote_of(folder, "config.json")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert refused(lambda: read(remote, 0, 2)).code is Code.SOURCE_CHANGED
    (folder / "config.json").unlink()
    assert refused(lambda: read(remote, 0, 2)).code is Code.FILE_NOT_FOUND


def test_a_read_longer_than_a_piece(folder: Path) -> None:
    """Several system calls, one buffer."""
    content = os.urandom(2 * PIECE + 12345)
    (folder / "big.bin").write_bytes(content)
    assert read(remote_of(folder, "big.bin"), 777, len(content) - 777) == content[777:]


def test_sums_give_digests(folder: Path) -> None:
    """Text and binary mode, comments, ./, hidden files; a file that is not named has none."""
    one, two = (hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in ("config.json", "sub/w.safetensors"))
    (folder / "SHA256SUMS").write_text(f"# made by hand\n{one} *config.json\n{two.upper()}  ./sub/w.safetensors\n{one}  .gitattributes\n\n")
    files = {file.path: file.sha256 for file in Directory().list(Directory().resolve(ref(folder)))}
    assert files == {"SHA256SUMS": None, "config.json": one, "sub/w.safetensors": two}


@pytest.mark.parametrize(
    ("sums", "code", "text"),
    [
        ("d41d8cd98f00b204e9800998ecf8427e  config.json\n", Code.SOURCE_PROTOCOL, "line 1"),
        ("nonsense\n", Code.SOURCE_PROTOCOL, "line 1"),
        (f"{'a' * 64}  config.json\n{'a' * 64}  gone.bin\n", Code.FILE_NOT_FOUND, "gone.bin"),
    ],
)
def test_sums_that_cannot_be_right_are_refused(folder: Path, sums: str, code: Code, text: str) -> None:
    """Digests that are silently ignored would be worse than none."""
    (folder / "SHA256SUMS").write_text(sums)
    error = refused(lambda: paths(folder))
    assert (error.code, error.retryable) == (code, False)
    assert text in str(error)


def test_what_is_no_directory_is_named(folder: Path) -> None:
    """Missing, or a file."""
    for location in (folder / "gone", folder / "config.json", folder / "config.json" / "x"):
        error = refused(lambda location=location: Directory().resolve(ref(location)))  # type: ignore[misc]
        assert error.code is Code.REPOSITORY_NOT_FOUND
        assert str(location) in str(error)


def test_what_may_not_be_read_is_named(folder: Path) -> None:
    """As a user without rights: the directory, then one file."""
    script = """
import os, sys
from nvcache.core.ref import Ref, Scheme
from nvcache.errors import SourceError
from nvcache.sources.directory import Directory, file_readers
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    resolved = Directory().resolve(Ref(Scheme.FILE, sys.argv[1]))
    file = Directory().list(resolved)[0]
    file_readers(Directory().locate(resolved, file))().read(0, memoryview(bytearray(2)))
except SourceError as error:
    print(error.code, error)
"""
    for parent in folder.parents[:-2]:
        parent.chmod(0o755)

    def attempt() -> str:
        return subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60, check=True).stdout

    (folder / "config.json").chmod(0)
    assert attempt().startswith("source-forbidden cannot read ")
    folder.chmod(0)
    try:
        answer = attempt()
    finally:
        folder.chmod(0o755)
    assert answer.startswith("source-forbidden cannot list ")
    assert str(folder) in answer
