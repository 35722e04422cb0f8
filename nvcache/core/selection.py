"""Which files of a repository are taken: the default set, or include/exclude patterns. It fetches nothing.

Default: safetensors and every non-weight file. Where safetensors exist, the same weights in other formats are left out; where none exist, everything
is taken. Patterns are shell patterns over the whole path (`fnmatch`, as in huggingface_hub's allow_patterns); one that ends in `/` means the folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from nvcache.core.manifest import Selection

OTHER_WEIGHTS = (
    "*.bin",
    "*.pth",
    "*.pt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "original/*",
    "consolidated*",
    "*/consolidated*",
)


def is_safetensors(path: str) -> bool:
    """Whether the name says the file holds safetensors."""
    return path.endswith(".safetensors")


def chooses(selection: Selection, paths: Iterable[str]) -> set[str]:
    """The paths that `selection` takes out of `paths`."""
    every = set(paths)
    if selection.include:
        taken = {path for path in every if _any(path, selection.include)}
    elif any(is_safetensors(path) for path in every):
        taken = {path for path in every if not _any(path, OTHER_WEIGHTS)}
    else:
        taken = every
    return {path for path in taken if not _any(path, selection.exclude)}


def _any(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)
