"""The table and the plot of `bench.clients`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_most, ranged

P99_MS = 50.0
FIGURES = ("p50", "p99", "max", "p99_from_schedule")


def table(result: dict[str, Any]) -> Table:
    """What `bench.clients` found."""
    rows, notes = [], []
    for name, turn in result["turns"].items():
        for kind, found in {"all": turn["all"], **turn["kinds"]}.items():
            rows.append((f"{name}: {kind}", f"{found['answers']}", *(f"{found[figure]:.1f}" for figure in FIGURES)))
        notes.append(at_most(f"p99, {name}, ms", turn["all"]["p99"], P99_MS, "{:.1f}"))
        notes.append(at_most(f"errors, {name}", turn["errors"], 0, "{:.0f}"))
        meanwhile = f"{turn['fills']} fills, {ranged(turn['fill_rate'], 2)} GB/s each"
        notes.append(f"Meanwhile {meanwhile}; the daemon and its workers used {turn['daemon_core_seconds']:.0f} core-s.")
    fill = f"a fill of {result['bandwidth'] / 1e6:g} MB/s at most" if result["bandwidth"] else "a fill"
    title = f"{result['clients']} clients on the Unix socket, each with {result['rate']:g} questions a second, while {fill} runs"
    return Table(title, ("", "answers", "p50 ms", "p99 ms", "max ms", "p99 from schedule ms"), tuple(rows), (*notes, one_line(result["machine"])))


def plot(result: dict[str, Any], stem: Path) -> None:
    """p50 and p99 of each kind of question, a panel for each turn."""
    figure, axes = new_figure(2)
    for axis, (name, turn) in zip(axes, result["turns"].items(), strict=True):
        kinds = list(turn["kinds"])
        for offset, (figure_name, colour) in enumerate({"p50": OTHER_COLOUR, "p99": OURS_COLOUR}.items()):
            places = [index + 0.4 * offset for index in range(len(kinds))]
            axis.barh(places, [turn["kinds"][kind][figure_name] for kind in kinds], height=0.36, color=colour, label=figure_name)
        axis.axvline(P99_MS, color="black", linestyle=":", linewidth=1)
        axis.set_yticks([index + 0.2 for index in range(len(kinds))], kinds)
        axis.set_xlabel(f"milliseconds, {name}")
        axis.legend(fontsize=8, frameon=False)
    save(figure, stem, "Answers to many clients during a fill", result["machine"])
