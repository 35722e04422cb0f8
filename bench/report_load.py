"""The table and the plot of `bench.load`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_least, at_most, ranged

OURS, LIMIT = "nvcache", "fio"
CASES = ("cold", "second process", "warm")
REACH = {"of_limit": 0.95, "slower": 1.0}


def table(result: dict[str, Any]) -> Table:
    """What `bench.load` found."""
    rows = [
        (f"{label}: {name}", *_cells(row, result["bytes"]), f"{result['peak_pss'][name] / 1e6:.0f}" if name in result["peak_pss"] else "")
        for label, path in result["paths"].items()
        for name, row in path["rows"].items()
    ]
    title = (
        f"{result['bytes'] / 1e9:.2f} GB in {result['files']} files: seconds until every byte of every tensor was there, {result['rounds']} rounds"
    )
    columns = ("", "cold s", "cold GB/s", "second process s", "warm s", "core-s", "peak PSS MB")
    return Table(title, columns, tuple(rows), (*_verdicts(result), *_disks(result), one_line(result["machine"])))


def _cells(row: dict[str, Any], size: int) -> list[str]:
    """Seconds of each case, nothing for one that the row does not have; the cold one's rate beside it; core-seconds of all of them."""
    cold, *others = (ranged(row[case]["seconds"], 2) if case in row else "" for case in CASES)
    cores = " / ".join(f"{row[case]['core_seconds']['median']:.1f}" for case in CASES if case in row)
    return [cold, f"{size / row['cold']['seconds']['median'] / 1e9:.2f}", *others, cores]


def _verdicts(result: dict[str, Any]) -> list[str]:
    found = []
    for label, path in result["paths"].items():
        if "of_limit" in path:
            found.append(at_least(f"{label}: rate of nvcache's cold load ÷ fio's", path["of_limit"]["median"], REACH["of_limit"], "{:.2f}"))
        for case in CASES if path.get("ratios") else ():
            name, ratio = max(((name, ratio[case]["median"]) for name, ratio in path["ratios"].items()), key=lambda each: each[1])
            found.append(at_most(f"{label}, {case}: nvcache's seconds ÷ those of the fastest other row, {name}", ratio, REACH["slower"], "{:.2f}"))
    return found


def _disks(result: dict[str, Any]) -> list[str]:
    """What is below each path, and how much faster nvcache loads from it than from the first."""
    found = []
    first = None
    for label, path in result["paths"].items():
        machine = path["machine"]
        said = f"{label}: {machine['file_system']} on {machine['disk']}, read-ahead {machine['read_ahead_kb']} KiB."
        if ours := path["rows"].get(OURS):
            cold = ours["cold"]["seconds"]["median"]
            said += f" nvcache loads from it, cold, {first / cold:.1f} times as fast as from the first path." if first else ""
            first = first or cold
        found.append(said)
    return found


def plot(result: dict[str, Any], stem: Path) -> None:
    """A bar of the cold load's seconds for each row, by path; marks for the other cases, and a line where fio's limit is."""
    paths = result["paths"]
    bars = [(label, name) for label, path in paths.items() for name in path["rows"] if name != LIMIT]
    figure, (axis,) = new_figure(1, 1.6 + 0.27 * len(bars) + 0.35 * len(paths))
    at, places, most = 0.0, [], 0.0
    for label, path in paths.items():
        rows = {name: row for name, row in path["rows"].items() if name != LIMIT}
        axis.text(0, at - 0.75, label, fontsize=9, fontweight="bold", va="center")
        top = at
        for name, row in rows.items():
            most = max(most, _bar(axis, at, name, row))
            places.append((at, name))
            at += 1
        if LIMIT in path["rows"]:
            limit = path["rows"][LIMIT]["cold"]["seconds"]["median"]
            axis.vlines(limit, top - 0.5, at - 0.5, color="#b3261e", linestyle="--", linewidth=1.2, label="fio, the limit")
        at += 0.9
    axis.set_yticks([place for place, _ in places], [name for _, name in places])
    axis.invert_yaxis()
    axis.set_xlim(0, most * 1.12)
    axis.set_xlabel("seconds until every byte of every tensor was there")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, loc="lower right")
    save(figure, stem, f"Loading {result['bytes'] / 1e9:.2f} GB, median and spread of {result['rounds']} rounds", result["machine"])


def _bar(axis: Any, at: float, name: str, row: dict[str, Any]) -> float:
    """Draw one row; the largest figure of it."""
    cold = row["cold"]["seconds"]
    spread = [[cold["median"] - cold["min"]], [cold["max"] - cold["median"]]]
    colour = OURS_COLOUR if name == OURS else OTHER_COLOUR
    axis.barh(at, cold["median"], xerr=spread, color=colour, ecolor="#444", capsize=2, height=0.7, label="cold" if name == OURS else None)
    axis.plot(row["second process"]["seconds"]["median"], at, "o", markersize=5, markerfacecolor="white", color="#222", label="second process")
    axis.plot(row["warm"]["seconds"]["median"], at, "D", markersize=5, markeredgecolor="white", color="#222", label="warm")
    most = max(row[case]["seconds"]["max"] for case in CASES)
    axis.annotate(f"{cold['median']:.1f} s", (cold["max"], at), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
    return float(most)
