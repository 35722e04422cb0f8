"""The table and the plot of `bench.many`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_most, ranged

READY_SECONDS = 3.0
LS_MS = 100.0
STEADY_BYTES = 150e6


def table(result: dict[str, Any]) -> Table:
    """What `bench.many` found."""
    rows = [(f"start to ready, {name}, s", "", ranged(found, 2), "", "") for name, found in result["ready"].items()]
    for name, found in {**result["answers"], **result["commands"]}.items():
        figures = (f"{found[figure]:.1f}" for figure in ("p50", "p99", "max"))
        rows.append((f"{name}, ms", f"{found['asked']}", *figures))
    for when, parts in result["memory"].items():
        rows += [(f"PSS {when}, {part}, MB", "", ranged(_in_mb(found), 0), "", "") for part, found in parts.items()]
    notes = [at_most(f"start, {name}, s", found["max"], READY_SECONDS, "{:.2f}") for name, found in result["ready"].items()]
    notes += [at_most(f"p50 of {name}, ms", found["p50"], LS_MS, "{:.1f}") for name, found in _lists(result).items()]
    notes += [
        at_most(f"PSS of the daemon {when}, MB", parts["daemon"]["max"] / 1e6, STEADY_BYTES / 1e6, "{:.0f}")
        for when, parts in result["memory"].items()
    ]
    notes.append(f"Filling them took {result['fill_seconds']:.0f} s.")
    title = f"{result['models']} models of {result['files']} files each"
    return Table(title, ("", "times", "p50, or median (least-most)", "p99", "max"), tuple(rows), (*notes, one_line(result["machine"])))


def plot(result: dict[str, Any], stem: Path) -> None:
    """What is asked, p50 and p99, on a logarithmic axis."""
    figure, (axis,) = new_figure(1)
    found = {**result["answers"], **result["commands"]}
    for offset, (name, colour) in enumerate({"p50": OTHER_COLOUR, "p99": OURS_COLOUR}.items()):
        axis.barh(
            [index + 0.4 * offset for index in range(len(found))], [each[name] for each in found.values()], height=0.36, color=colour, label=name
        )
    axis.axvline(LS_MS, color="black", linestyle=":", linewidth=1)
    axis.set_xscale("log")
    axis.set_yticks([index + 0.2 for index in range(len(found))], list(found))
    axis.set_xlabel("milliseconds")
    axis.legend(fontsize=8, frameon=False)
    save(figure, stem, f"A daemon with {result['models']} models", result["machine"])


def _lists(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The questions that list every model."""
    asked = {**result["answers"], **result["commands"]}
    return {name: found for name, found in asked.items() if name == "GET /v1/models" or name.startswith("nvcache ls")}


def _in_mb(figure: dict[str, float]) -> dict[str, float]:
    return {name: value / 1e6 for name, value in figure.items()}
