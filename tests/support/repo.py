"""Model repositories as a Hub keeps them: commits, names, LFS objects. It speaks no HTTP; `tests.support.hub` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20
LFS_SUFFIXES = (".safetensors", ".bin")


def lfs_by_default(path: str, size: int) -> bool:
    """What the Hub's usual .gitattributes sends to LFS."""
    return path.endswith(LFS_SUFFIXES) or size > MIB


def pointer(sha256: str, size: int) -> bytes:
    """A git-lfs pointer file (git-lfs spec v1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def pieces(source: bytes | Path) -> Iterator[bytes]:
    """The content in pieces of at most 4 MiB."""
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while piece := file.read(4 * MIB):
            yield piece


@dataclass(frozen=True)
class Blob:
    """One file of a commit: where its bytes are, its size, git blob id and, for an LFS file, the SHA-256 of its content."""

    source: bytes | Path = field(repr=False)
    size: int
    git_id: str
    sha256: str | None

    @classmethod
    def of(cls, path: str, source: bytes | Path, lfs: Callable[[str, int], bool]) -> Blob:
        """Measure and hash `source`; an LFS file's git id is that of its pointer, as git has it."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if lfs(path, size):
            digest = hashlib.sha256()
            for piece in pieces(source):
                digest.update(piece)
            text = pointer(digest.hexdigest(), size)
            return cls(source, size, hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest(), digest.hexdigest())
        sha1 = hashlib.sha1(b"blob %d\0" % size)
        for piece in pieces(source):
            sha1.update(piece)
        return cls(source, size, sha1.hexdigest(), None)

    @property
    def etag(self) -> str:
        """The quoted ETag the Hub gives for it: LFS SHA-256 or git id."""
        return f'"{self.sha256 or self.git_id}"'


class Repo:
    """A repository with its history. `files` is the content of the first commit on `main`; names are free text, hostile ones included.

    `listed_sizes` and `xet` change only what the listing says (a lying size, a Xet hash). `gated` repositories serve files only to the server's
    token, and only if `granted`; `private` ones are invisible without it.
    """

    def __init__(
        self,
        files: Mapping[str, bytes | Path],
        *,
        private: bool = False,
        gated: bool = False,
        granted: bool = True,
        lfs: Callable[[str, int], bool] = lfs_by_default,
        listed_sizes: Mapping[str, int] | None = None,
        xet: Mapping[str, str] | None = None,
    ) -> None:
        self.private, self.gated, self.granted, self.lfs = private, gated, granted, lfs
        self.listed_sizes, self.xet = dict(listed_sizes or {}), dict(xet or {})
        self.commits: dict[str, dict[str, Blob]] = {}
        self.names: dict[str, str] = {}
        self.commit = self.push(files)

    @classmethod
    def of_directory(cls, directory: Path, *, lfs: Callable[[str, int], bool] = lfs_by_default) -> Repo:
        """Every regular file below `directory`, served from where it is."""
        return cls({str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}, lfs=lfs)

    def push(self, files: Mapping[str, bytes | Path], name: str = "main") -> str:
        """Commit `files` (the whole tree) and move `name` to it; earlier commits stay served. Returns the commit: 40 hex derived from the content."""
        tree = {path: Blob.of(path, source, self.lfs) for path, source in files.items()}
        lines = "".join(f"{path}\0{blob.git_id}\n" for path, blob in sorted(tree.items()))
        commit = hashlib.sha1(lines.encode("utf-8", "surrogateescape")).hexdigest()
        self.commits[commit] = tree
        self.names[name] = commit
        self.commit = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit a branch, tag or commit id names."""
        return self.names.get(revision) or (revision if revision in self.commits else None)

    def listed_size(self, path: str, blob: Blob) -> int:
        """The size the listing claims."""
        return self.listed_sizes.get(path, blob.size)
