"""Writes tables and plots of results (JSON) into bench/README.md, between its markers. It measures nothing and types no figure.

``python -m bench.report`` rewrites the marked sections of bench/README.md and the plots in bench/results/ from the results that are there. What is
shown of a bench is in a module of its own, `bench.report_…`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bench import (
    report_answer,
    report_clients,
    report_cold_start,
    report_fill,
    report_load,
    report_load_vm,
    report_many,
    report_stripe,
    report_sweep,
)
from bench.tables import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"


class Report(Protocol):
    """What such a module has."""

    def table(self, result: dict[str, Any]) -> Table:
        """The figures, the verdicts and the machine."""
        ...

    def plot(self, result: dict[str, Any], stem: Path) -> None:
        """Write `stem`.png and `stem`.svg."""
        ...


SECTIONS: dict[str, Report] = {
    "fill-http": report_fill,
    "fill-tls": report_fill,
    "fill-azure-nginx-http": report_fill,
    "fill-azure-nginx-tls": report_fill,
    "fill-azure-azurite-http": report_fill,
    "answer": report_answer,
    "clients": report_clients,
    "many": report_many,
    "stripe": report_stripe,
    "load": report_load,
    "load-vm": report_load_vm,
    "sweep": report_sweep,
    "cold-start": report_cold_start,
}


def rewrite(text: str, sections: Sequence[tuple[str, str]]) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises ValueError when a marker is missing."""
    for name, content in sections:
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"cannot write section {name}: its markers are missing")
        text = marked.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """The command."""
    sections = []
    for name, report in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{name}: no result, left as it is")
            continue
        result = json.loads(path.read_text())
        report.plot(result, RESULTS / name)
        measured = f"Measured {result['machine']['at'][:10]} at revision {result['machine']['revision']}."
        sections.append((name, f"{report.table(result).markdown()}\n{measured}\n\n![{name}](results/{name}.svg)"))
    README.write_text(rewrite(README.read_text(), sections))
    print(f"rewrote {', '.join(name for name, _ in sections) or 'nothing'} in {README.name}")


if __name__ == "__main__":
    main()
