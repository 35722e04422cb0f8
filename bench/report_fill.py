"""The table and the plot of `bench.fill`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_most, ranged

REACH = {"hf download": 0.35, "aria2c": 0.65, "SDK": 0.6, "azcopy": 1.0, "azcopy MD5": 1.0}  # nvcache's wall time over theirs, at most
PSS_REACH = 250 * 10**6


def table(result: dict[str, Any]) -> Table:
    """What `bench.fill` found."""
    rows = []
    for name, row in result["rows"].items():
        ratio = result["ratios"].get(name)
        rows.append(
            (
                name,
                row["verifies"],
                ranged(row["wall"], 2),
                f"{result['bytes'] / row['wall']['median'] / 1e9:.2f}",
                f"{row['sync']['median']:.1f}",
                ranged(row["core_seconds"], 1),
                f"{row['origin_core_seconds']['median']:.1f}",
                f"{row['peak_pss']['max'] / 1e6:.0f}",
                "" if ratio is None else ranged(ratio, 2),
            )
        )
    origin = result.get("origin", "nginx")  # older results do not name it: there was no other
    title = f"{result['bytes'] / 1e9:.2f} GB in {result['files']} files from {origin} on loopback over {result['scheme']}, {result['rounds']} rounds"
    columns = ("", "verifies", "wall s", "GB/s", "sync after s", "core-s", f"{origin} core-s", "peak PSS MB", "nvcache ÷ it")
    return Table(title, columns, tuple(rows), (*_verdicts(result), one_line(result["machine"])))


def _verdicts(result: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for name, reach in REACH.items():
        if ratio := result["ratios"].get(name):
            found.append(at_most(f"wall time ÷ {name}", ratio["median"], reach, "{:.2f}"))
    for name, ratio in result.get("ratios_to_last_write", {}).items():
        if name.startswith("azcopy"):  # only its command waits for something else than the bytes
            wrote = ranged(result["rows"][name]["last_write"], 2)
            found.append(f"{name} wrote its last byte after {wrote} s; nvcache's wall time is {ranged(ratio, 2)} times that.")
    if ours := result["rows"].get("nvcache"):
        found.append(at_most("peak PSS of all nvcache's processes, MB", ours["peak_pss"]["max"] / 1e6, PSS_REACH / 1e6, "{:.0f}"))
        found.append(f"Daemon start, not counted: {ours['daemon_start']['median']:.2f} s.")
    return found


def show(result: dict[str, Any]) -> None:
    """Show a fill result, and where nvcache's time and memory went."""
    table(result).show()
    if ours := result["rows"].get("nvcache"):
        rows = tuple((each["command"], f"{each['cpu']:.2f}", f"{each['pss'] / 1e6:.0f}") for each in ours["processes"])
        Table("nvcache by process, in the run of median wall time", ("command", "core-s", "peak PSS MB"), rows).show()


def plot(result: dict[str, Any], stem: Path) -> None:
    """Bars of wall time and core-seconds, lines from least to most."""
    figure, axes = new_figure(2)
    names = list(reversed(result["rows"]))
    colours = [OURS_COLOUR if name.startswith("nvcache") else OTHER_COLOUR for name in names]
    for axis, key, label in zip(axes, ("wall", "core_seconds"), ("seconds to done (nvcache: verified and durable)", "core-seconds"), strict=True):
        figures = [result["rows"][name][key] for name in names]
        medians = [each["median"] for each in figures]
        spread = [[each["median"] - each["min"] for each in figures], [each["max"] - each["median"] for each in figures]]
        bars = axis.barh(names, medians, xerr=spread, color=colours, ecolor="#444", capsize=3, height=0.65)
        axis.bar_label(bars, [f"{each:.1f}" for each in medians], padding=6, fontsize=9)
        axis.set_xlabel(label)
        axis.set_xlim(0, max(each["max"] for each in figures) * 1.15)
    axes[1].set_yticklabels([])
    title = f"{result['bytes'] / 1e9:.2f} GB from {result.get('origin', 'nginx')} over {result['scheme']}"
    save(figure, stem, f"{title}, median and spread of {result['rounds']} rounds", result["machine"])
