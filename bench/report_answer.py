"""The table and the plot of `bench.answer`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_most, ranged

REACH = {"p50": 1.0, "p99": 10.0}  # milliseconds, also while filling


def table(result: dict[str, Any]) -> Table:
    """What `bench.answer` found."""
    rows = []
    for name, series in result["series"].items():
        figures = (series["requests"], series["p50"], series["p99"], series["max"], series["p99_from_schedule"])
        rows.append((name, f"{figures[0]}", *(f"{figure:.2f}" for figure in figures[1:])))
    title = f"GET /v1/models?ref=… of a ready model over the Unix socket, {result['rate']} requests a second"
    notes = [
        at_most(f"{figure} {name}, ms", series[figure], reach, "{:.2f}")
        for name, series in result["series"].items()
        for figure, reach in REACH.items()
        if name.startswith("filling")
    ]
    notes.append(f"While filling: {result['fills']} fills of {result['fill_bytes'] / 1e9:.2f} GB, {ranged(result['fill_rate'], 2)} GB/s each.")
    columns = ("", "requests", "p50 ms", "p99 ms", "max ms", "p99 from schedule ms")
    return Table(title, columns, tuple(rows), (*notes, one_line(result["machine"])))


def plot(result: dict[str, Any], stem: Path) -> None:
    """Histograms of the latency, idle and filling, on one logarithmic axis."""
    figure, axes = new_figure(2)
    for axis, kind in zip(axes, ("kept", "new"), strict=True):
        for when, colour in (("idle", OTHER_COLOUR), ("filling", OURS_COLOUR)):
            series = result["series"][f"{when}, {kind} connection"]
            axis.stairs(series["histogram"]["counts"], series["histogram"]["edges_ms"], fill=True, alpha=0.6, color=colour, label=when)
            axis.axvline(series["p99"], color=colour, linestyle="--", linewidth=1.2, label=f"{when}, p99 {series['p99']:.2f} ms")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"milliseconds, {kind} connection")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("answers")
    save(figure, stem, "Latency of the ready answer", result["machine"])
