"""`ls`, `show`, `path`, `rm`, `pin`, `unpin`, `df`, `jobs`: what the daemon has and holds. They only ask and show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nvcache.cli import complete, output
from nvcache.cli.complete import SHORT
from nvcache.cli.daemon import Json, connected, daemon, each, failed, problem_of
from nvcache.cli.disks import stripe_line
from nvcache.cli.exits import Exit, worst
from nvcache.client import Problem
from nvcache.errors import Code, RequestError

if TYPE_CHECKING:
    from rich.text import Text

WIDE = 110  # columns that the whole table of `ls` takes
DIGEST_ROW = 64 + 9 + 15 + 3 * 2  # columns of a file's row in `show` besides its path: SHA-256, size, check, gaps
BAR = 50  # columns of the bar `df` draws
BIGGEST = 10  # models `df` names

COLUMNS = ("MODEL", "REVISION", "STATE", "SIZE", "FILES", "VERIFIED", "LAST USED", "PIN", "LEASES")
HOLDS_BYTES = frozenset({"ready", "degraded"})

json_option = click.option("--json", "json_", is_flag=True, help="the daemon's answer as JSON")
each_json_option = click.option("--json", "json_", is_flag=True, help="one JSON object a model, one a line")
ref_argument = click.argument("ref", shell_complete=complete.refs)
refs_argument = click.argument("refs", nargs=-1, required=True, metavar="REF...", shell_complete=complete.refs)


@click.command("ls")
@json_option
@connected
def ls(*, json_: bool) -> None:
    """List the models on this node; stderr has a line for each that failed or is degraded, and why."""
    answer = daemon().get("/v1/models")
    if json_:
        output.as_json(answer)
        return
    if not answer["models"]:
        output.say("no models yet; `nvcache warm org/name` fetches one")
        return
    models = sorted(answer["models"], key=lambda model: (model["ref"], model["revision"]))
    rows = [_row(model) for model in models]
    shown = list(range(len(COLUMNS)))
    if output.width() < WIDE:
        rows = [(str(row[0]).removeprefix("hf://"), *row[1:]) for row in rows]
        shown = [index for index in shown if any(str(row[index]) not in ("", "-") for row in rows)]
    names = [COLUMNS[index] for index in shown]
    output.table(names, [[row[index] for index in shown] for row in rows], right=["SIZE", "FILES", "LEASES"], whole=["REVISION", "SIZE"])
    for model in models:
        if model["error"]:
            output.say(f"{model['state']}: {model['error']['detail']}")


@click.command()
@ref_argument
@json_option
@connected
def show(ref: str, *, json_: bool) -> None:
    """Show everything about a model.

    Where it is, every file with its size, its SHA-256 and what it was checked against, what was left out, warnings.
    """
    model = daemon().on("GET", ref)
    if json_:
        output.as_json(model)
    else:
        _show(model)


@click.command("path")
@ref_argument
@click.option("--hub", is_flag=True, help="the directory to set as HF_HUB_CACHE instead")
@click.option("--json", "json_", is_flag=True, help="the model as JSON, or the error")
@connected
def path(ref: str, *, hub: bool, json_: bool) -> int:
    """Print the directory of a ready model.

    Exit 3, and nothing on stdout but what --json asks for, if it is not ready.
    """
    try:
        model = _usable(ref, daemon().model(ref), hub=hub)
    except (Problem, RequestError) as error:
        return failed(ref, problem_of(error), json_=json_)
    if json_:
        output.as_json(model, line=True)
    else:
        click.echo(model["hub_cache"] if hub else model["path"])
    return Exit.OK


def _usable(ref: str, model: Json, *, hub: bool) -> Json:
    """The model, if it has the path that is wanted. Raises `RequestError` (not-ready)."""
    if model["state"] != "ready":
        raise RequestError(Code.NOT_READY, f"cannot give a path for {model['ref']}: it is {model['state']}", hint=f"run `nvcache warm {ref}`")
    if hub and not model["hub_cache"]:
        raise RequestError(
            Code.NOT_READY,
            f"cannot give a HuggingFace cache for {model['ref']}: it has no name there",
            hint=f"run `nvcache warm {ref} --as ORG/NAME`",
        )
    return model


@click.command("rm")
@refs_argument
@click.option("--dry-run", is_flag=True, help="say what would be removed, and remove nothing; exit 10 too if it would be refused")
@each_json_option
@connected
def rm(refs: tuple[str, ...], *, dry_run: bool, json_: bool) -> int:
    """Remove models.

    Asks nothing, but refuses what is pinned, leased or open in a process (exit 10), and a REF without a revision that has several here.
    """
    asked = daemon()
    if dry_run:
        seen: list[Json] = []

        def look(ref: str) -> Json:
            seen.append(_foreseen(asked.on("GET", ref)))
            return seen[-1]

        return worst([each(refs, look, _would, json_=json_), *(Exit.HELD for model in seen if model["held"])])
    return each(refs, lambda ref: asked.on("DELETE", ref), lambda model: f"removed {model['entry']} {output.size(model['bytes'])}", json_=json_)


def _foreseen(model: Json) -> Json:
    """The model, with why it would not be removed."""
    held = [
        text
        for text, holds in (("pinned", model["pinned"]), (output.count(model["leases"], "lease"), model["leases"]), ("in use", model["in_use"]))
        if holds
    ]
    return {**{name: value for name, value in model.items() if name != "manifest"}, "held": held}


def _would(model: Json) -> str:
    held = ", ".join(model["held"])
    return f"{f'would be refused ({held})' if held else 'would remove'}: {model['entry']} {output.size(model['bytes'])}"


@click.command()
@refs_argument
@each_json_option
@connected
def pin(refs: tuple[str, ...], *, json_: bool) -> int:
    """Keep models.

    They are never removed to make room, and `rm` refuses them.
    """
    asked = daemon()
    return each(refs, lambda ref: asked.on("PUT", ref, "/pin"), lambda model: f"pinned {model['entry']}", json_=json_)


@click.command()
@refs_argument
@each_json_option
@connected
def unpin(refs: tuple[str, ...], *, json_: bool) -> int:
    """Undo `pin`."""
    asked = daemon()
    return each(refs, lambda ref: asked.on("DELETE", ref, "/pin"), lambda model: f"unpinned {model['entry']}", json_=json_)


@click.command()
@click.option("--cancel", metavar="JOB", shell_complete=complete.jobs, help="stop this job; what it fetched is kept for the next try")
@json_option
@connected
def jobs(*, cancel: str | None, json_: bool) -> None:
    """List running and recent jobs, newest last."""
    asked = daemon()
    answer = asked.get("/v1/jobs") if cancel is None else {"jobs": [asked.delete(f"/v1/jobs/{cancel}")]}
    if json_:
        output.as_json(answer)
        return
    if not answer["jobs"]:
        output.say("no jobs")
        return
    output.table(
        ["JOB", "KIND", "MODEL", "STATE", "FETCHED", "TIME", "WHY"],
        [
            (
                job["id"],
                job["kind"],
                job["ref"],
                output.state(job["state"], output.going(job["progress"]) if not job["ended_at"] else ""),
                output.size(job["progress"]["bytes_fetched"]),
                output.duration(job["seconds"]),
                job["error"]["detail"] if job["error"] else "",
            )
            for job in sorted(answer["jobs"], key=lambda job: str(job["created_at"]))
        ],
        right=["FETCHED", "TIME"],
    )


@click.command()
@json_option
@connected
def df(*, json_: bool) -> None:
    """Show the store's room and the biggest models."""
    asked = daemon()
    stripe = asked.get("/v1/stripe")
    space = asked.get("/v1/space")
    models = sorted((model for model in asked.get("/v1/models")["models"] if model["state"] in HOLDS_BYTES), key=lambda model: -int(model["bytes"]))
    if json_:
        output.as_json({**space, "stripe": stripe, "models": [{name: model[name] for name in ("entry", "state", "bytes")} for model in models]})
        return
    rest = space["used"] - space["quarantined"] - sum(model["bytes"] for model in models)
    room = max(0, min(space["limit"] - space["used"], space["free"] - space["min_free"]) - space["reserved"])
    kept = f", {output.size(space['min_free'])} of it for others" if space["min_free"] else ""
    output.fields(
        [
            ("cache", _bar(space)),
            ("limit", output.size(space["limit"])),
            ("used", output.size(space["used"])),
            ("reserved", f"{output.size(space['reserved'])} for fills"),
            ("free", f"{output.size(room)} in the cache, {output.size(space['free'])} of {output.size(space['total'])} on the file system{kept}"),
            ("evicts", f"above {output.size(space['high_mark'])}, down to {output.size(space['low_mark'])}"),
            *([("unfinished", f"{output.size(rest)} of fills under way or interrupted")] if rest > 0 else []),
            *([("quarantine", f"{output.size(space['quarantined'])} of what is used: bytes that went bad")] if space["quarantined"] else []),
            *([("stripe", line)] if (line := stripe_line(stripe)) else []),
        ]
    )
    if models:
        click.echo()
        output.table(["SIZE", "MODEL"], [(output.size(model["bytes"]), model["entry"]) for model in models[:BIGGEST]], right=["SIZE"])


def _row(model: Json) -> tuple[str | Text, ...]:
    return (
        model["ref"].rpartition("@")[0] if model["ref"].endswith(f"@{model['revision']}") else model["ref"],
        model["revision"][:SHORT],
        output.state(model["state"], output.going(model["progress"]) if not model["error"] else ""),
        output.size(model["bytes"]),
        str(model["files"]),
        output.ago(model["checked_at"] or model["verified_at"]),
        "in use" if model["in_use"] else output.ago(model["last_used"]),
        "pinned" if model["pinned"] else "",
        str(model["leases"] or ""),
    )


def _show(model: Json) -> None:
    manifest = model["manifest"]
    output.fields(
        [
            ("model", model["ref"]),
            ("entry", model["entry"]),
            ("state", output.state(model["state"], output.going(model["progress"]) if not model["error"] else "")),
            ("path", model["path"] or "-"),
            ("HF_HUB_CACHE", f"{model['hub_cache']} as {model['hub_id']}" if model["hub_cache"] else "-"),
            ("size", f"{output.size(model['bytes'])} in {output.count(model['files'], 'file')}"),
            ("verified", output.moment(model["verified_at"])),
            *([("unproven", f"{output.count(model['unproven'], 'file')}: the source publishes no digest (first-use)")] if model["unproven"] else []),
            ("re-checked", output.moment(model["checked_at"])),
            ("last used", output.moment(model["last_used"])),
            ("pinned", "yes" if model["pinned"] else "no"),
            ("in use", "yes, by a process of this node" if model["in_use"] else "no"),
            *_holders(model),
            *([("note", model["note"])] if model["note"] else []),
            *([("error", model["error"]["detail"])] if model["error"] else []),
            *(_origin(manifest) if manifest else []),
            *[("warning", text) for text in model["warnings"]],
        ]
    )
    if not manifest:
        return
    click.echo()
    longest = max((len(check["path"]) for check in manifest["checks"]), default=0)
    digits = SHORT if output.width() < longest + DIGEST_ROW else None
    output.table(
        ["FILE", "SIZE", "SHA-256", "CHECKED AGAINST"],
        [(check["path"], output.size(check["size"]), check["sha256"][:digits], check["check"]) for check in manifest["checks"]]
        + [(left["path"], output.size(left["size"]), "", "left out") for left in manifest["left_out"]],
        right=["SIZE"],
    )


def _holders(model: Json) -> list[tuple[str, str]]:
    """Each lease that may be seen; pods' socket shows one's own only."""
    told = [("leased by", f"{held['holder']} until {output.moment(held['expires'])}, {held['lease'][:12]}") for held in model["holders"]]
    others = model["leases"] - len(told)
    return told + ([("leases", f"{others} of others" if told else str(others))] if others > 0 or not told else [])


def _origin(manifest: Json) -> list[tuple[str, str | Text]]:
    """Where a model came from and which part of it was taken."""
    chosen = [f"{name} {' '.join(patterns)}" for name, patterns in manifest["selection"].items() if patterns]
    checked = "safetensors headers and index were checked" if manifest["parsed"] else "it has no safetensors"
    return [
        ("asked as", manifest["asked"]),
        ("from", manifest["endpoint"]),
        *([("copy of", f"commit {manifest['commit']}")] if manifest["commit"] else []),
        ("selection", ", ".join(chosen) or "the default set"),
        ("weights", checked),
    ]


def _bar(space: Json) -> Text:
    """Used, reserved and free shares of the limit, as one bar."""
    from rich.text import Text

    limit = max(1, space["limit"])
    used = min(BAR, -(-BAR * space["used"] // limit))
    reserved = min(BAR - used, -(-BAR * space["reserved"] // limit))
    return Text.assemble(("█" * used, "green"), ("▒" * reserved, "cyan"), ("·" * (BAR - used - reserved), "dim"), f" {100 * space['used'] // limit}%")
