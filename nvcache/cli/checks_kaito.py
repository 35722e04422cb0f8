"""What `doctor` says of the links for KAITO: their directory as this shell sees it, and what the daemon lacks. It makes and removes no link."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nvcache.cli.checks import Finding, fail, ok, warn
from nvcache.core.kaito import LACKS


def links(directory: Path, models: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    """The directory, and each model that KAITO does not find there though it is ready, as the daemon tells."""
    if not directory.is_dir():
        yield fail("kaito", f"{directory} is not a directory", f"install -d -o USER {directory}, with the daemon's user; in a container mount it")
        return
    lacking = [f"{model['entry']}: {text}" for model in models for text in model["warnings"] if text.startswith(LACKS)]
    for text in lacking:
        yield warn("kaito", text, f"give the daemon's user {directory}, or remove what is in the way; it is tried again by itself")
    if not os.access(directory, os.W_OK | os.X_OK):
        yield warn(
            "kaito", f"{directory} is not writable by uid {os.geteuid()}", "run doctor as the daemon's user; if that is so, give it to that user"
        )
    elif not lacking:
        yield ok("kaito", f"links are made in {directory}")
