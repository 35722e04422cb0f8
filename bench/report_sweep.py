"""The table and the heat maps of `bench.sweep`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import new_figure, save
from bench.tables import Table, at_least

READERS = ("mmap", "nvcache")
REACH = 0.95  # of the best of what else could have been chosen


def table(result: dict[str, Any]) -> Table:
    """MB/s of every array and reader at every read-ahead, the defaults in bold, and whether they are proven."""
    defaults = result["defaults"]
    rows = []
    for reader in READERS:
        for row in result["rows"]:
            ours = (row["filesystem"], row["chunk"]) == (defaults["filesystem"], defaults["chunk"])
            cells = [f"{figure['median'] / 1e6:.0f}" for figure in row[reader]]
            cells = [
                f"**{cell}**" if ours and size == defaults["read_ahead"] else cell for cell, size in zip(cells, result["read_aheads"], strict=True)
            ]
            rows.append((f"{reader}, {size_of(row['chunk'])}, {row['filesystem']}", *cells, f"{row['fio']['median'] / 1e6:.0f}"))
    ideal = result["disks"] * result["rate"] / 1e6
    title = (
        f"MB/s from {result['disks']} disks of {result['rate'] / 1e6:.0f} each, {ideal:.0f} in all, by reader, file system, chunk and read-ahead, "
        f"{result['bytes'] / 1e6:.0f} MB in {result['files']} files, cold, in a virtual machine without KVM, medians of {result['rounds']} rounds"
    )
    columns = ("", *map(size_of, result["read_aheads"]), "fio")
    return Table(title, columns, tuple(rows), (*_verdicts(result), one_line(result["machine"])))


def size_of(size: int) -> str:
    """A power of two in words."""
    return f"{size >> 20}M" if size >= 1 << 20 else f"{size >> 10}K"


def _verdicts(result: dict[str, Any]) -> Iterator[str]:
    """Each default beside the best of its alternatives, the two others being the defaults."""
    defaults = result["defaults"]
    rates = {(row["filesystem"], row["chunk"]): row for row in result["rows"]}
    at = result["read_aheads"].index(defaults["read_ahead"])
    ours = rates[defaults["filesystem"], defaults["chunk"]]
    yield f"Defaults of nvcache: {defaults['filesystem']}, chunk {size_of(defaults['chunk'])}, read-ahead {size_of(defaults['read_ahead'])}."
    for reader in READERS:
        rate = ours[reader][at]["median"]
        chunks = [row[reader][at]["median"] for (filesystem, _), row in rates.items() if filesystem == defaults["filesystem"]]
        systems = [row[reader][at]["median"] for (_, chunk), row in rates.items() if chunk == defaults["chunk"]]
        for what, others in (("read-ahead", [each["median"] for each in ours[reader]]), ("chunk", chunks), ("file system", systems)):
            yield at_least(f"{reader}: rate at the default {what} ÷ rate at the best", rate / max(others), REACH, "{:.2f}")
        yield at_least(f"{reader}: rate at the defaults ÷ fio's", rate / ours["fio"]["median"], REACH, "{:.2f}")


def plot(result: dict[str, Any], stem: Path) -> None:
    """A heat map of chunk and read-ahead for each reader and file system; the defaults are framed."""
    defaults = result["defaults"]
    systems = list(dict.fromkeys(row["filesystem"] for row in result["rows"]))
    panels = [(reader, filesystem) for reader in READERS for filesystem in systems]
    figure, axes = new_figure(len(panels), 3.2)
    ideal = result["disks"] * result["rate"] / 1e6
    for axis, (reader, filesystem) in zip(axes, panels, strict=True):
        rows = [row for row in result["rows"] if row["filesystem"] == filesystem]
        rates = [[figure["median"] / 1e6 for figure in row[reader]] for row in rows]
        axis.imshow(rates, vmin=0, vmax=ideal, cmap="Blues", aspect="auto")
        for y, line in enumerate(rates):
            for x, rate in enumerate(line):
                axis.text(x, y, f"{rate:.0f}", ha="center", va="center", fontsize=7, color="white" if rate > 0.6 * ideal else "black")
                if (filesystem, rows[y]["chunk"], result["read_aheads"][x]) == tuple(defaults.values()):
                    axis.add_patch(_frame(x, y))
        axis.set_title(f"{reader}, {filesystem}", fontsize=9)
        axis.set_xticks(range(len(result["read_aheads"])), map(size_of, result["read_aheads"]), fontsize=7)
        axis.set_yticks(range(len(rows)), [size_of(row["chunk"]) for row in rows], fontsize=7)
        axis.set_xlabel("read-ahead", fontsize=8)
    axes[0].set_ylabel("chunk", fontsize=8)
    title = f"MB/s from {result['disks']} disks, together {ideal:.0f}, medians of {result['rounds']} rounds; nvcache's defaults framed"
    save(figure, stem, title, result["machine"])


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor="#c2703d", linewidth=2)
