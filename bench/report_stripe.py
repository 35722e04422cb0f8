"""The table and the plot of `bench.stripe`. It measures nothing; `bench.report` writes them into the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line
from bench.plots import OTHER_COLOUR, OURS_COLOUR, new_figure, save
from bench.tables import Table, at_most, ranged

REACH: dict[str, Any] = {"disks": ("2", "4"), "ratio": 0.95, "create": 15.0, "again": 2.0}  # seconds


def table(result: dict[str, Any]) -> Table:
    """What `bench.stripe` found."""
    rows = [("one disk, raw", ranged(_scaled(result["one_disk"], 1e-6), 1), "", "", "")]
    notes = []
    for count, found in result["counts"].items():
        rows.append(
            (
                f"{count} disk{'' if count == '1' else 's'}, mounted",
                ranged(_scaled(found["rate"], 1e-6), 1),
                ranged(found["ratio"], 2),
                ranged(found["create"], 1),
                ranged(found["again"], 2),
            )
        )
        if count in REACH["disks"]:
            ratio, least = found["ratio"]["median"], REACH["ratio"]
            notes.append(
                f"{'Reached' if ratio >= least else 'NOT reached'}: {count} disks read at {ratio:.2f} x {count} x one disk (at least {least})."
            )
    four = result["counts"]["4"]
    notes.append(at_most("create of 4 disks, s", four["create"]["median"], REACH["create"], "{:.1f}"))
    notes.append(at_most("`ensure` on a good stripe of 4, s", four["again"]["median"], REACH["again"], "{:.2f}"))
    title = f"Stripe of disks throttled to {result['rate'] / 1e6:.0f} MB/s each, in a virtual machine without KVM, {result['rounds']} rounds"
    columns = ("", "read MB/s", "÷ (N x one disk)", "create s", "`ensure` again s")
    return Table(title, columns, tuple(rows), (*notes, one_line(result["machine"])))


def _scaled(figure: dict[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in figure.items()}


def plot(result: dict[str, Any], stem: Path) -> None:
    """Read rate against the number of disks, beside N times one disk."""
    figure, (axis, times) = new_figure(2)
    counts = [int(count) for count in result["counts"]]
    found = list(result["counts"].values())
    axis.plot(counts, [result["one_disk"]["median"] * count / 1e6 for count in counts], color=OTHER_COLOUR, linestyle="--", label="N x one disk")
    axis.plot(counts, [each["rate"]["median"] / 1e6 for each in found], color=OURS_COLOUR, marker="o", label="mounted stripe")
    axis.set_xticks(counts)
    axis.set_xlabel("disks")
    axis.set_ylabel("MB/s, sequential read")
    axis.legend(fontsize=8, frameon=False)
    places = range(len(counts))
    times.bar([place - 0.2 for place in places], [each["create"]["median"] for each in found], 0.4, color=OURS_COLOUR, label="create")
    times.bar([place + 0.2 for place in places], [each["again"]["median"] for each in found], 0.4, color=OTHER_COLOUR, label="ensure again")
    times.set_xticks(list(places), [str(count) for count in counts])
    times.set_xlabel("disks")
    times.set_ylabel("seconds")
    times.legend(fontsize=8, frameon=False)
    save(figure, stem, "The stripe in a virtual machine with throttled disks", result["machine"])
