"""The table and the plot of `bench.load_vm`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_least, at_most, ranged

OS_DISK = "OS disk"
OURS, STOCK, LIMIT = "nvcache", "safetensors", "fio"
REACH_SHARE = 0.95  # of fio's rate on the same stripe, and of so many times one disk
REACH_COUNTS = ("2", "4")  # beyond, the emulated processors end it
REACH_OS = 5.5
REACH_ROWS = 1.02  # of each other row's time: readers that all wait for the disks differ by chance
COLOURS = {STOCK: "#c2703d", OURS: OURS_COLOUR, "runai": "#5b9a68", "fastsafetensors": "#8d6aa8", "read": OTHER_COLOUR, LIMIT: "#222222"}


def named(place: str) -> str:
    """A place in words."""
    return place if place == OS_DISK else f"{place} disk{'' if place == '1' else 's'}"


def table(result: dict[str, Any]) -> Table:
    """Seconds of each row in each place, and the verdicts."""
    places = result["places"]
    rows = tuple((row, *(ranged(found[row], 2) for found in places.values())) for row in COLOURS if row in places[OS_DISK])
    title = (
        f"Seconds to load {result['bytes'] / 1e6:.0f} MB in {result['files']} files, cold, from disks of {result['rate'] / 1e6:.0f} MB/s each and an "
        f"OS disk of {result['os_rate'] / 1e6:.1f} MB/s, in a virtual machine without KVM, {result['rounds']} rounds"
    )
    return Table(title, ("", *map(named, places)), rows, (*_verdicts(result), *_left_out(result), one_line(result["machine"])))


def _verdicts(result: dict[str, Any]) -> Iterator[str]:
    found = result["ratios"]
    for count, ratio in found["limit"].items():
        yield at_least(f"{named(count)}: nvcache's rate ÷ fio's", ratio["median"], REACH_SHARE, "{:.2f}")
    for count, ratio in found["one disk"].items():
        what = f"{named(count)}: nvcache's rate ÷ ({count} x fio's from one disk)"
        if count in REACH_COUNTS:
            yield at_least(what, ratio["median"], REACH_SHARE, "{:.2f}")
        elif count != "1":
            yield f"{what} = {ratio['median']:.2f}."
    for row, ratio in found["os disk"].items():
        yield at_least(f"seconds of {row} from the OS disk ÷ those of nvcache from 2 disks", ratio["median"], REACH_OS, "{:.2f}")
    for place, others in found["rows"].items():
        row, ratio = max(((row, ratio["median"]) for row, ratio in others.items()), key=lambda each: each[1])
        yield at_most(f"{named(place)}: nvcache's seconds ÷ those of the fastest other row, {row}", ratio, REACH_ROWS, "{:.2f}")


def _left_out(result: dict[str, Any]) -> Iterator[str]:
    return (f"{row} is left out: {why}." for row, why in result["left_out"].items())


def plot(result: dict[str, Any], stem: Path) -> None:
    """Load time by place, a line for each row over the numbers of disks; beside it the OS disk and two disks, as the published figures have them."""
    figure, (lines, bars) = new_figure(2, 3.8)
    places = result["places"]
    stripes = range(1, len(places))  # the OS disk, in place 0, stands apart
    for row, colour in COLOURS.items():
        if row in places[OS_DISK]:
            medians = [found[row]["median"] for found in places.values()]
            style = {
                "color": colour,
                "marker": "_" if row == LIMIT else "o",
                "markersize": 9 if row == LIMIT else 4,
                "zorder": 3 if row == OURS else 2,
            }
            lines.plot(stripes, medians[1:], label=row, linestyle="--" if row == LIMIT else "-", linewidth=2.2 if row == OURS else 1.2, **style)
            lines.plot([0], medians[:1], linestyle="none", **style)
    lines.set_yscale("log", base=2)
    lines.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lines.set_xticks(range(len(places)), [named(place) for place in places])
    lines.set_ylabel("seconds to load, cold (logarithmic)")
    lines.legend(fontsize=8, frameon=False)
    _bars(bars, places)
    save(figure, stem, f"{result['bytes'] / 1e6:.0f} MB from throttled disks, medians of {result['rounds']} rounds", result["machine"])


def _bars(axis: Any, places: dict[str, Any]) -> None:
    shown = {
        f"{row}, {named(place)}": (places[place][row], COLOURS[row])
        for place, row in (("2", OURS), ("2", STOCK), (OS_DISK, OURS), (OS_DISK, STOCK))
        if place in places and row in places[place]
    }
    figures = [figure for figure, _ in shown.values()]
    medians = [each["median"] for each in figures]
    spread = [[each["median"] - each["min"] for each in figures], [each["max"] - each["median"] for each in figures]]
    drawn = axis.barh(list(shown), medians, xerr=spread, color=[colour for _, colour in shown.values()], ecolor="#444", capsize=3, height=0.6)
    axis.bar_label(drawn, [f"{each:.1f} s" for each in medians], padding=6, fontsize=9)
    axis.set_xlim(0, max(each["max"] for each in figures) * 1.15)
    axis.set_xlabel("seconds to load, cold")
