"""`nvcache warm --dry-run`: what making models ready would fetch, and whether it fits. It fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence

import click

from nvcache.cli import output
from nvcache.cli.daemon import Daemon, Json, exit_for, failed, problem_of
from nvcache.cli.exits import Exit, worst
from nvcache.client import Problem


def dry_run(asked: Daemon, wishes: Sequence[Json], *, json_: bool) -> Exit:
    """Print the plan of every wish; returns the worst exit code, that of a refusal too."""
    exits = []
    for wish in wishes:
        try:
            plan = asked.post("/v1/models", {**wish, "dry_run": True})
        except Problem as problem:
            exits.append(failed(wish["ref"], problem_of(problem), json_=json_))
            continue
        if json_:
            output.as_json(plan, line=True)
        else:
            _show(plan)
        exits.append(exit_for(plan["refusal"]) if plan["refusal"] else Exit.OK)
    return worst(exits)


def _show(plan: Json) -> None:
    output.table(
        ["FILE", "SIZE", "STATE"],
        [(file["path"], output.size(file["size"]), "here" if file["here"] else "to fetch") for file in plan["paths"]]
        + [(file["path"], output.size(file["size"]), "left out") for file in plan["left_out"]],
        right=["SIZE"],
    )
    click.echo()
    left = sum(file["size"] for file in plan["left_out"])
    took = "unknown: no rate measured yet" if plan["seconds"] is None else f"about {output.duration(plan['seconds'])} at the last measured rate"
    if not plan["bytes_to_fetch"]:
        took = "none"
    output.fields(
        [
            ("model", plan["ref"]),
            ("entry", plan["entry"]),
            ("all", f"{output.size(plan['bytes'])} in {output.count(plan['files'], 'file')}"),
            ("here by digest", output.size(plan["bytes_here"])),
            ("to fetch", output.size(plan["bytes_to_fetch"])),
            ("left out", f"{output.size(left)} in {output.count(len(plan['left_out']), 'file')}"),
            ("time", took),
            ("fits", "yes" if plan["fits"] else "no"),
            *(("makes way", entry) for entry in plan["would_evict"]),
        ]
    )
    if plan["refusal"]:
        output.complain(plan["refusal"]["detail"], plan["refusal"]["hint"])
