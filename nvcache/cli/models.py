"""`ls`, `show`, `path`, `rm`, `pin`, `unpin`, `df`, `jobs`: what the daemon has and holds. They only ask and show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nvcache.cli import output
from nvcache.cli.daemon import Json, connected, daemon
from nvcache.errors import Code, RequestError

if TYPE_CHECKING:
    from rich.text import Text

SHORT = 12  # digits of a revision or a digest where it stands for itself
BAR = 50  # columns of the bar `df` draws
BIGGEST = 10  # models `df` names

json_option = click.option("--json", "json_", is_flag=True, help="the daemon's answer as JSON")


@click.command("ls")
@json_option
@connected
def ls(*, json_: bool) -> None:
    """List the models on this node."""
    answer = daemon().get("/v1/models")
    if json_:
        output.as_json(answer)
        return
    if not answer["models"]:
        output.say("no models yet; `nvcache warm org/name` fetches one")
        return
    output.table(
        ["MODEL", "REVISION", "STATE", "SIZE", "FILES", "VERIFIED", "LAST USED", "PIN", "LEASES"],
        [_row(model) for model in sorted(answer["models"], key=lambda model: (model["ref"], model["revision"]))],
        right=["SIZE", "FILES", "LEASES"],
    )


@click.command()
@click.argument("ref")
@json_option
@connected
def show(ref: str, *, json_: bool) -> None:
    """Show everything about a model.

    Where it is, every file with its size, its SHA-256 and what it was checked against, what was left out, warnings.
    """
    asked = daemon()
    entry = asked.model(ref)["entry"]
    model = asked.get(f"/v1/models/{entry}")
    if json_:
        output.as_json(model)
    else:
        _show(model)


@click.command("path")
@click.argument("ref")
@click.option("--hub", is_flag=True, help="the directory to set as HF_HUB_CACHE instead")
@connected
def path(ref: str, *, hub: bool) -> None:
    """Print the directory of a ready model.

    Exit 3, and nothing on stdout, if it is not ready.
    """
    model = daemon().model(ref)
    if model["state"] != "ready":
        raise RequestError(Code.NOT_READY, f"cannot give a path for {model['ref']}: it is {model['state']}", hint=f"run `nvcache warm {ref}`")
    if hub and not model["hub_cache"]:
        raise RequestError(
            Code.NOT_READY,
            f"cannot give a HuggingFace cache for {model['ref']}: it has no name there",
            hint=f"run `nvcache warm {ref} --as ORG/NAME`",
        )
    click.echo(model["hub_cache"] if hub else model["path"])


@click.command("rm")
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option("--dry-run", is_flag=True, help="say what would be removed, and remove nothing")
@connected
def rm(refs: tuple[str, ...], *, dry_run: bool) -> None:
    """Remove models.

    Asks nothing, but refuses what is pinned, leased or open in a process (exit 10), and a REF without a revision that has several here.
    """
    asked = daemon()
    for ref in refs:
        if dry_run:
            model = asked.get(asked.place(ref))
            held = [text for text, holds in (("pinned", model["pinned"]), (f"{model['leases']} leases", model["leases"])) if holds]
            click.echo(f"{'would be refused (' + ', '.join(held) + ')' if held else 'would remove'}: {model['entry']} {output.size(model['bytes'])}")
        else:
            model = asked.delete(asked.place(ref))
            click.echo(f"removed {model['entry']} {output.size(model['bytes'])}")


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@connected
def pin(refs: tuple[str, ...]) -> None:
    """Keep models.

    They are never removed to make room, and `rm` refuses them.
    """
    asked = daemon()
    for ref in refs:
        click.echo(f"pinned {asked.put(asked.place(ref) + '/pin')['entry']}")


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@connected
def unpin(refs: tuple[str, ...]) -> None:
    """Undo `pin`."""
    asked = daemon()
    for ref in refs:
        click.echo(f"unpinned {asked.delete(asked.place(ref) + '/pin')['entry']}")


@click.command()
@click.option("--cancel", metavar="JOB", help="stop this job; what it fetched is kept for the next try")
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
    space = asked.get("/v1/space")
    models = sorted(asked.get("/v1/models")["models"], key=lambda model: -int(model["bytes"]))
    if json_:
        output.as_json({**space, "models": [{"entry": model["entry"], "bytes": model["bytes"]} for model in models]})
        return
    room = max(0, space["limit"] - space["used"] - space["reserved"])
    output.fields(
        [
            ("cache", _bar(space)),
            ("limit", output.size(space["limit"])),
            ("used", output.size(space["used"])),
            ("reserved", f"{output.size(space['reserved'])} for fills"),
            ("free", f"{output.size(room)} in the cache, {output.size(space['free'])} of {output.size(space['total'])} on the file system"),
            *([("quarantine", output.size(space["quarantined"]))] if space["quarantined"] else []),
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
        output.ago(model["last_used"]),
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
            ("size", f"{output.size(model['bytes'])} in {model['files']} files"),
            ("verified", _moment(model["verified_at"])),
            ("re-checked", _moment(model["checked_at"])),
            ("last used", _moment(model["last_used"])),
            ("pinned", "yes" if model["pinned"] else "no"),
            ("leases", str(model["leases"])),
            *([("note", model["note"])] if model["note"] else []),
            *([("error", model["error"]["detail"])] if model["error"] else []),
            *(_origin(manifest) if manifest else []),
            *[("warning", text) for text in model["warnings"]],
        ]
    )
    if not manifest:
        return
    click.echo()
    output.table(
        ["FILE", "SIZE", "SHA-256", "CHECKED AGAINST"],
        [(check["path"], output.size(check["size"]), check["sha256"], check["check"]) for check in manifest["checks"]]
        + [(left["path"], output.size(left["size"]), "", "left out") for left in manifest["left_out"]],
        right=["SIZE"],
    )


def _origin(manifest: Json) -> list[tuple[str, str | Text]]:
    """Where a model came from and which part of it was taken."""
    chosen = [f"{name} {' '.join(patterns)}" for name, patterns in manifest["selection"].items() if patterns]
    checked = "safetensors headers and index were checked" if manifest["parsed"] else "it has no safetensors"
    return [
        ("asked as", manifest["asked"]),
        ("from", manifest["endpoint"]),
        ("selection", ", ".join(chosen) or "the default set"),
        ("weights", checked),
    ]


def _moment(text: str | None) -> str:
    return f"{text} ({output.ago(text)})" if text else "-"


def _bar(space: Json) -> Text:
    """Used, reserved and free shares of the limit, as one bar."""
    from rich.text import Text

    limit = max(1, space["limit"])
    used = min(BAR, -(-BAR * space["used"] // limit))
    reserved = min(BAR - used, -(-BAR * space["reserved"] // limit))
    return Text.assemble(("█" * used, "green"), ("▒" * reserved, "cyan"), ("·" * (BAR - used - reserved), "dim"), f" {100 * space['used'] // limit}%")
