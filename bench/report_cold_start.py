"""The table and the plot of `bench.cold_start`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, ranged

COLOURS = ("#f0b860", OURS_COLOUR, OTHER_COLOUR, "#6f9fd0")  # of the parts, in their order


def table(result: dict[str, Any]) -> Table:
    """What `bench.cold_start` found."""
    rows = []
    for name, row in result["rows"].items():
        ratio = result["ratios"].get(name)
        rows.append(
            (
                name,
                row["source"],
                ranged(row["total"], 2),
                *(f"{seconds:.2f}" if seconds else "" for seconds in row["median_run"].values()),
                f"{row['core_seconds']['median']:.1f}",
                f"{row['peak_pss'] / 1e6:.0f}",
                "" if ratio is None else ranged(ratio, 2),
            )
        )
    title = (
        f"{result['bytes'] / 1e9:.2f} GB in {result['files']} files, from the outage until every tensor is loaded again, {result['rounds']} rounds"
    )
    columns = ("", "source", "seconds", *(f"{part} s" for part in result["rows"]["nvcache"]["parts"]), "core-s", "peak PSS MB", "nvcache ÷ it")
    return Table(title, columns, tuple(rows), (_disks(result), one_line(result["machine"])))


def _disks(result: dict[str, Any]) -> str:
    """What lay where."""
    if result["same_disk"]:
        return "nvcache's store and the OS disk's row are on the same disk: what differs is the way to load."
    store, other = (f"{machine['file_system']} on {machine['disk']}" for machine in (result["machine"], result["os_disk"]))
    return f"nvcache's store is on {store}, the OS disk's row on {other}."


def plot(result: dict[str, Any], stem: Path) -> None:
    """A bar for each row, made of the parts of its run of median total, with a line from the least total to the most."""
    figure, (axis,) = new_figure(1)
    names = list(reversed(result["rows"]))
    rows = [result["rows"][name] for name in names]
    ends = [0.0] * len(rows)
    for part, colour in zip(rows[0]["median_run"], COLOURS, strict=True):
        seconds = [row["median_run"][part] for row in rows]
        axis.barh(names, seconds, left=ends, color=colour, height=0.6, label=part)
        ends = [end + each for end, each in zip(ends, seconds, strict=True)]
    totals = [row["total"] for row in rows]
    spread = [
        [end - each["min"] for end, each in zip(ends, totals, strict=True)],
        [each["max"] - end for end, each in zip(ends, totals, strict=True)],
    ]
    axis.errorbar(ends, names, xerr=spread, fmt="none", ecolor="#444", capsize=3)
    for name, each in zip(names, totals, strict=True):
        axis.annotate(f"{each['median']:.1f}", (each["max"], name), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, max(each["max"] for each in totals) * 1.1)
    axis.set_xlabel("seconds")
    axis.legend(fontsize=8, frameon=False)
    title = f"{result['bytes'] / 1e9:.2f} GB, from the outage until every tensor is loaded again"
    save(figure, stem, f"{title}, median and spread of {result['rounds']} rounds", result["machine"])
