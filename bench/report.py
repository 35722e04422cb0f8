"""Turns results (JSON) into tables and plots: on the terminal, and in bench/README.md between its markers. It measures nothing and types no figure.

``python -m bench.report`` rewrites the marked sections of bench/README.md and the plots in bench/results/ from the results that are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import one_line

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
FILL_REACH = {"hf download": 0.35, "aria2c": 0.65}  # nvcache's wall time over theirs, at most
PSS_REACH = 250 * 10**6
ANSWER_REACH = {"p50": 1.0, "p99": 10.0}  # milliseconds, also while filling
MIN_WIDTH = 140  # of a table, also in a pipe
OURS_COLOUR, OTHER_COLOUR = "#2563a8", "#b8bec6"


@dataclass(frozen=True)
class Table:
    """A table before it has a form: the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table for the README."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes)])

    def show(self) -> None:
        """The table on the terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i)
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        console.width = max(console.width, MIN_WIDTH)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)


def fill_table(result: dict[str, Any]) -> Table:
    """What `bench.fill` found."""
    rows = []
    for name, row in result["rows"].items():
        ratio = result["ratios"].get(name)
        rows.append(
            (
                name,
                row["verifies"],
                _range(row["wall"], 2),
                f"{result['bytes'] / row['wall']['median'] / 1e9:.2f}",
                f"{row['sync']['median']:.1f}",
                _range(row["core_seconds"], 1),
                f"{row['origin_core_seconds']['median']:.1f}",
                f"{row['peak_pss']['max'] / 1e6:.0f}",
                "" if ratio is None else _range(ratio, 2),
            )
        )
    title = f"{result['bytes'] / 1e9:.2f} GB in {result['files']} files from nginx on loopback over {result['scheme']}, {result['rounds']} rounds"
    columns = ("", "verifies", "wall s", "GB/s", "sync after s", "core-s", "nginx core-s", "peak PSS MB", "nvcache ÷ it")
    return Table(title, columns, tuple(rows), (*_fill_verdicts(result), one_line(result["machine"])))


def _fill_verdicts(result: dict[str, Any]) -> list[str]:
    found = []
    for name, reach in FILL_REACH.items():
        if ratio := result["ratios"].get(name):
            found.append(_verdict(f"wall time ÷ {name}", ratio["median"], reach, "{:.2f}"))
    if ours := result["rows"].get("nvcache"):
        found.append(_verdict("peak PSS of all nvcache's processes, MB", ours["peak_pss"]["max"] / 1e6, PSS_REACH / 1e6, "{:.0f}"))
        found.append(f"Daemon start, not counted: {ours['daemon_start']['median']:.2f} s.")
    return found


def answer_table(result: dict[str, Any]) -> Table:
    """What `bench.answer` found."""
    rows = []
    for name, series in result["series"].items():
        figures = (series["requests"], series["p50"], series["p99"], series["max"], series["p99_from_schedule"])
        rows.append((name, f"{figures[0]}", *(f"{figure:.2f}" for figure in figures[1:])))
    title = f"GET /v1/models?ref=… of a ready model over the Unix socket, {result['rate']} requests a second"
    notes = [
        _verdict(f"{figure} {name}, ms", series[figure], reach, "{:.2f}")
        for name, series in result["series"].items()
        for figure, reach in ANSWER_REACH.items()
        if name.startswith("filling")
    ]
    notes.append(f"While filling: {result['fills']} fills of {result['fill_bytes'] / 1e9:.2f} GB, {_range(result['fill_rate'], 2)} GB/s each.")
    columns = ("", "requests", "p50 ms", "p99 ms", "max ms", "p99 from schedule ms")
    return Table(title, columns, tuple(rows), (*notes, one_line(result["machine"])))


def _verdict(what: str, value: float, reach: float, form: str) -> str:
    return f"{'Reached' if value <= reach else 'NOT reached'}: {what} = {form.format(value)} (at most {form.format(reach)})."


def _range(figure: dict[str, float], digits: int) -> str:
    return f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f}-{figure['max']:.{digits}f})"


def print_fill(result: dict[str, Any]) -> None:
    """Show a fill result, and where nvcache's time and memory went."""
    fill_table(result).show()
    if ours := result["rows"].get("nvcache"):
        rows = tuple((each["command"], f"{each['cpu']:.2f}", f"{each['pss'] / 1e6:.0f}") for each in ours["processes"])
        Table("nvcache by process, in the run of median wall time", ("command", "core-s", "peak PSS MB"), rows).show()


def plot_fill(result: dict[str, Any], stem: Path) -> None:
    """Bars of wall time and core-seconds, lines from least to most."""
    figure, axes = _figure(2)
    names = list(reversed(result["rows"]))
    colours = [OURS_COLOUR if name == "nvcache" else OTHER_COLOUR for name in names]
    for axis, key, label in zip(axes, ("wall", "core_seconds"), ("seconds to done (nvcache: verified and durable)", "core-seconds"), strict=True):
        figures = [result["rows"][name][key] for name in names]
        medians = [each["median"] for each in figures]
        spread = [[each["median"] - each["min"] for each in figures], [each["max"] - each["median"] for each in figures]]
        bars = axis.barh(names, medians, xerr=spread, color=colours, ecolor="#444", capsize=3, height=0.65)
        axis.bar_label(bars, [f"{each:.1f}" for each in medians], padding=6, fontsize=9)
        axis.set_xlabel(label)
        axis.set_xlim(0, max(each["max"] for each in figures) * 1.15)
    axes[1].set_yticklabels([])
    _save(figure, stem, f"{result['bytes'] / 1e9:.2f} GB over {result['scheme']}, median and spread of {result['rounds']} rounds", result["machine"])


def plot_answer(result: dict[str, Any], stem: Path) -> None:
    """Histograms of the latency, idle and filling, on one logarithmic axis."""
    figure, axes = _figure(2)
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
    _save(figure, stem, "Latency of the ready answer", result["machine"])


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "nvcache"  # the same result gives the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(10, 3.4), layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, stem: Path, title: str, machine: dict[str, Any]) -> None:
    from matplotlib import pyplot as plt

    figure.suptitle(title, fontsize=11)
    figure.supxlabel(one_line(machine), fontsize=7, color="#555")
    figure.savefig(stem.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


SECTIONS: dict[str, tuple[Callable[[dict[str, Any]], Table], Callable[[dict[str, Any], Path], None]]] = {
    "fill-http": (fill_table, plot_fill),
    "fill-tls": (fill_table, plot_fill),
    "answer": (answer_table, plot_answer),
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
    for name, (table, plot) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{name}: no result, left as it is")
            continue
        result = json.loads(path.read_text())
        plot(result, RESULTS / name)
        measured = f"Measured {result['machine']['at'][:10]} at revision {result['machine']['revision']}."
        sections.append((name, f"{table(result).markdown()}\n{measured}\n\n![{name}](results/{name}.svg)"))
    README.write_text(rewrite(README.read_text(), sections))
    print(f"rewrote {', '.join(name for name, _ in sections) or 'nothing'} in {README.name}")


if __name__ == "__main__":
    main()
