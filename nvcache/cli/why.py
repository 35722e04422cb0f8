"""`nvcache why`: what happened to a model and where the time went, as the daemon has noted it. It judges nothing but which phase took longest."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from nvcache.cli import output
from nvcache.cli.daemon import Daemon, Json, connected, daemon
from nvcache.cli.models import json_option, ref_argument
from nvcache.client import Problem
from nvcache.core.ref import parse_name
from nvcache.errors import Code

if TYPE_CHECKING:
    from rich.text import Text

LAST = 12  # of the events after a start, the newest, that are shown without --all
ENDED = {"ready": "ready after", "failed": "failed after", "cancelled": "cancelled after", "interrupted": "interrupted after"}
MOVES = frozenset({"fetched", "proven", "read"})  # bytes, at a rate that tells something
BAD = frozenset({"failed", "withdrawn", "interrupted", "cancelled", "expired", "evicted", "removed", "retried"})


@click.command()
@ref_argument
@click.option("--all", "all_", is_flag=True, help="everything that is noted, not only the last start")
@json_option
@connected
def why(ref: str, *, all_: bool, json_: bool) -> None:
    """Show what happened to a model, and what made its start slow.

    The last time that it had to be made ready, phase by phase: what was waited for, what came from where and how fast, what failed with which code;
    then who held it, and why it went. A model that is gone still has its story.
    """
    answer = _ask(daemon(), ref)
    if json_:
        output.as_json(answer)
        return
    if not answer["events"]:
        output.say("nothing is noted of it yet: it was made ready by a version that took no notes")
        return
    shown, hidden = (answer["events"], 0) if all_ else _last_start(answer["events"])
    if sentence := _sentence(shown):
        click.echo(f"{sentence}\n")
    output.table(
        ["TIME (UTC)", "EVENT", "TOOK", "", "SIZE", "RATE", "DETAILS"],
        [_row(event) for event in shown],
        right=["TOOK", "SIZE", "RATE"],
        whole=["TOOK"],
    )
    if hidden:
        output.say(f"{output.count(hidden, 'event')} before the last {LAST} left out; --all shows everything")


def _ask(asked: Daemon, ref: str) -> Json:
    """The story of what `ref` names; of a branch of a model that is gone, that of the model."""
    try:
        return asked.on("GET", ref, "/timeline")
    except Problem as problem:
        if problem.code != Code.UNKNOWN_MODEL:
            raise
        return asked.on("GET", parse_name(ref).slug, "/timeline")


def _starts(events: list[Json]) -> list[str]:
    """The jobs that somebody waited for, in their order. Whose caller was served all the same, while the source was down, is none."""
    served = {event["job"] for event in events if event["kind"] == "hit"}
    return [event["job"] for event in events if event["kind"] == "asked" and event["job"] not in served]


def _last_start(events: list[Json]) -> tuple[list[Json], int]:
    """The last time that it had to be made ready, and the newest of what came after; how many events between the two are left out."""
    starts = _starts(events)
    if not starts:
        return events[-LAST:], 0
    places = [index for index, event in enumerate(events) if event["job"] == starts[-1]]
    start, after = events[places[0] : places[-1] + 1], events[places[-1] + 1 :]
    return start + after[-LAST:], max(0, len(after) - LAST)


def _sentence(events: list[Json]) -> str:
    """The answer to the question, in one sentence; nothing where no start is told."""
    starts = _starts(events)
    of_job = [event for event in events if starts and event["job"] == starts[-1]]
    end = next((event for event in of_job if event["kind"] in ENDED), None)
    slow = next((event for event in of_job if event["slowest"]), None)
    if end is None and not any(event["going"] for event in of_job):
        return ""
    total = end["seconds"] if end else (datetime.now(UTC) - datetime.fromisoformat(of_job[0]["at"])).total_seconds()
    parts = [f"{ENDED[end['kind']]} {output.duration(total)}" if end else f"under way for {output.duration(total)}"]
    if slow and total:
        parts.append(f"{min(100, round(100 * slow['seconds'] / total))}% of it {_phase(slow)}")
    if retried := [event for event in of_job if event["kind"] == "retried"]:
        codes = ", ".join(dict.fromkeys(event["code"] for event in retried))
        parts.append(f"{output.count(sum(event['count'] for event in retried), 'request')} had to be made again ({codes})")
    if end and end["code"]:
        parts.append(f"{end['what']} ({end['code']})")
    return output.visible("; ".join(parts))


def _phase(event: Json) -> str:
    """A phase in words: `fetched 2.1 GB at 150.0 MB/s from https://…`."""
    size = f" {output.size(event['bytes'])}" if event["bytes"] else ""
    rate = f" at {output.rate(event['rate'])}" if event["rate"] else ""
    origin = f" from {event['source']}" if event["source"] else ""
    return f"waited for {event['what']}" if event["kind"] == "waited" else f"{event['kind']}{size}{rate}{origin}"


def _row(event: Json) -> tuple[str | Text, ...]:
    from rich.text import Text

    style = "bold" if event["slowest"] else "red" if event["kind"] in BAD else "green" if event["kind"] == "ready" else ""
    moment = datetime.fromisoformat(event["at"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        moment,
        Text(f"{event['kind']}{'…' if event['going'] else ''}", style=style),
        "" if event["seconds"] is None else output.duration(event["seconds"]),
        Text("slowest" if event["slowest"] else "", style="bold"),
        output.size(event["bytes"]) if event["bytes"] else "",
        output.rate(event["rate"]) if event["rate"] and event["kind"] in MOVES else "",
        ", ".join(_details(event)),
    )


def _details(event: Json) -> list[str]:
    """What else there is to say, in order of weight."""
    count, kind = event["count"], event["kind"]
    noun = {"retried": "time", "hit": "time", "failed": "time"}.get(kind, "file")
    return [
        *([f"from {event['source']}"] if event["source"] else []),
        *([event["code"]] if event["code"] else []),
        *([output.count(count, noun)] if count else []),
        *([event["what"]] if event["what"] else []),
        *([f"by {event['who']}"] if event["who"] else []),
    ]
