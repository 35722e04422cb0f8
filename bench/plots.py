"""The form of a plot, and its PNG and SVG file. It knows no bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.machine import one_line

OURS_COLOUR, OTHER_COLOUR = "#2563a8", "#b8bec6"


def new_figure(panels: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure of ten inches by `height` and its axes, side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "nvcache"  # the same result gives the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(10, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save(figure: Any, stem: Path, title: str, machine: dict[str, Any]) -> None:
    """Write `stem`.png and `stem`.svg, the machine below."""
    from matplotlib import pyplot as plt

    figure.suptitle(title, fontsize=11)
    figure.supxlabel(one_line(machine), fontsize=7, color="#555")
    figure.savefig(stem.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
