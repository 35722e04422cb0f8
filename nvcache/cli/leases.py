"""`nvcache leases`: who holds which model, and, for an operator, the end of a hold. It takes no lease; `warm --lease` and `hold` do."""

from __future__ import annotations

from urllib.parse import quote

import click

from nvcache.cli import output
from nvcache.cli.daemon import Daemon, Json, connected, daemon
from nvcache.client import Problem
from nvcache.errors import Code


@click.command()
@click.option("--break", "broken", metavar="LEASE", multiple=True, help="end this lease, whoever has it (its first digits do); may be repeated")
@click.option("--json", "json_", is_flag=True, help="the daemon's answer as JSON")
@connected
def leases(*, broken: tuple[str, ...], json_: bool) -> None:
    """List the leases on the node, or break some.

    A model that is leased is never removed. A lease runs out by itself when its holder is gone; breaking one that is alive lets a model be removed
    under a pod that loads it (what the pod has open stays whole). Needs the admin socket.
    """
    asked = daemon()
    answer = asked.get("/v1/leases")
    if broken:
        answer = {"leases": [_break(asked, answer["leases"], each) for each in broken]}
    if json_:
        output.as_json(answer)
        return
    if not answer["leases"]:
        output.say("no leases")
        return
    output.table(
        ["LEASE", "MODEL", "HOLDER", "BROKEN" if broken else "RUNS OUT"],
        [
            (lease["lease"][:12], lease["entry"], lease["holder"], "yes" if broken else output.moment(lease["expires"]))
            for lease in sorted(answer["leases"], key=lambda lease: (str(lease["entry"]), str(lease["expires"])))
        ],
    )


def _break(asked: Daemon, held: list[Json], wanted: str) -> Json:
    found = [lease for lease in held if str(lease["lease"]).startswith(wanted)] if wanted else []
    if len(found) != 1:
        why = "no lease has this id" if not found else f"{len(found)} leases begin so"
        raise Problem(Code.UNKNOWN_LEASE, f"cannot break lease {wanted[:64]!r}: {why}", hint="`nvcache leases` lists them")
    (lease,) = found
    asked.delete(f"/v1/models/{quote(str(lease['entry']), safe='@')}/leases/{quote(str(lease['lease']))}")
    return lease
