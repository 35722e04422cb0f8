"""`nvcache evict`: makes room by removing the models used longest ago, or says which. What goes is the daemon's choice."""

from __future__ import annotations

import click

from nvcache.cli import output
from nvcache.cli.daemon import Json, connected, daemon
from nvcache.cli.exits import Exit


@click.command()
@click.option("--need", type=output.Size(), metavar="SIZE", required=True, help="how much is to be available afterwards, such as 140GB")
@click.option("--dry-run", is_flag=True, help="say what would be removed, and remove nothing")
@click.option("--json", "json_", is_flag=True, help="the daemon's answer as JSON")
@connected
def evict(*, need: int, dry_run: bool, json_: bool) -> Exit:
    """Make room by removing models.

    Those used longest ago go first, whole; never one that is pinned, declared or leased, and one that a process reads goes last. A fill that does not
    fit does the same by itself. Exit 7 if there would not be enough, and then nothing is removed.
    """
    answer = daemon().post("/v1/evict", {"need_bytes": need, "dry_run": dry_run})
    if json_:
        output.as_json(answer)
    else:
        _show(answer, dry_run=dry_run)
    return Exit.OK if answer["enough"] else Exit.SPACE


def _show(answer: Json, *, dry_run: bool) -> None:
    if answer["victims"]:
        output.table(
            ["MODEL", "FREES", "LAST USED", ""],
            [
                (victim["entry"], output.size(victim["frees"]), output.ago(victim["last_used"]), "a process reads it" if victim["in_use"] else "")
                for victim in answer["victims"]
            ],
            right=["FREES"],
        )
        click.echo()
    output.fields(
        [
            ("need", output.size(answer["need"])),
            ("short of", output.size(answer["short"])),
            ("would free" if dry_run else "freed", output.size(answer["freed"])),
            ("enough", "yes" if answer["enough"] else "no"),
        ]
    )
    if not answer["enough"] and answer["in_the_way"]:
        click.echo()
        output.table(
            ["IN THE WAY", "SIZE", "WHY"],
            [(each["entry"], output.size(each["bytes"]), ", ".join(each["held"])) for each in answer["in_the_way"]],
            right=["SIZE"],
        )
