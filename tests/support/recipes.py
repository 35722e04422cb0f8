"""The code blocks of docs/recipes.md, by name, so that what people copy is what is run. It runs nothing itself."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/recipes.md"


def recipes() -> dict[str, str]:
    """Every block that has a name (```` ```sh recipe=NAME ````). Raises ValueError when two have the same."""
    blocks = re.findall(r"^```\w+ recipe=(\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    found = dict(blocks)
    if len(found) != len(blocks):
        raise ValueError("cannot tell the recipes apart: two have the same name")
    return found
