"""The dashboard: every metric and every label that it asks for is one that the daemon has, and no metric that matters is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/nvcache.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
OFF_DASHBOARD = {  # what tells nothing over time, or only one thing to one who looks for it
    "nvcache_stripe_info",
    "nvcache_stripe_generation",
    "nvcache_signal_failures_total",
}


def documented() -> dict[str, tuple[str, set[str]]]:
    """Metric → its type and labels, as docs/metrics.md has them."""
    rows = re.findall(r"^\| `(nvcache_\w+)` \| (\w+) \| (.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def family(name: str) -> str:
    """The metric that a time series belongs to."""
    base = re.sub(r"_(sum|count|bucket)$", "", name)
    return base if documented().get(base, ("", set()))[0] == "histogram" else name


def used() -> set[str]:
    texts = [target["expr"] for target in TARGETS] + [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    return {family(name) for text in texts for name in re.findall(r"nvcache_\w+", text)}


def test_every_metric_it_asks_for_exists() -> None:
    assert len(documented()) > 30
    assert used() - documented().keys() == set()


def test_no_metric_that_matters_is_left_out() -> None:
    assert documented().keys() - used() == OFF_DASHBOARD & documented().keys()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target["expr"])[:60])
def test_labels_are_those_of_the_metrics(target: dict[str, Any]) -> None:
    known = {"instance"}.union(*(documented()[family(name)][1] for name in re.findall(r"nvcache_\w+", target["expr"])))
    asked = set(re.findall(r"(\w+)=~?\"", target["expr"])) | {
        label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")
    }
    assert asked <= known
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == (grouped if target["legendFormat"] and "{{" in target["legendFormat"] else set())
    assert target["expr"].count("(") == target["expr"].count(")")
    assert 'instance=~"$instance"' in target["expr"]


def test_counters_are_only_read_as_rates_and_gauges_never() -> None:
    for target in TARGETS:
        for call, name in re.findall(r"(\w*)\(?(nvcache_\w+)\{", target["expr"]):
            kind = documented()[family(name)][0]
            assert (call in ("rate", "increase")) is (kind in ("counter", "histogram")), target["expr"]


def test_panels_stand_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] for panel in DASHBOARD["panels"])
