"""`nvcache disks status`: what the disks process last said of the stripe, read from its stripe.json alone. It asks no daemon and looks at no disk."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from nvcache.cli import output
from nvcache.cli.daemon import exit_for, problem_of
from nvcache.cli.disks import remedy, word
from nvcache.cli.exits import Exit
from nvcache.engine.stripefile import last_word
from nvcache.errors import NvcacheError


def tell(run_directory: Path, *, json_: bool) -> Exit:
    """Print it in one line; OK only when it is "mounted". Raises `DiskError`: daemon-unreachable when nothing was ever said, disk-io."""
    try:
        state, written = last_word(run_directory)
    except NvcacheError as error:
        if not json_:
            raise
        problem = problem_of(error)
        output.as_json({"state": None, "reason": problem["detail"], "error": problem})
        output.complain(problem["detail"], problem["hint"])
        return exit_for(problem)
    # A time to come means that the clock was set back since; how old the word is cannot be known then.
    said = None if written > time.time() else datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")
    if json_:
        output.as_json({**asdict(state), "said": said})
    else:
        click.echo(output.visible(f"{word(state)} (said {output.ago(said)})" if said else word(state)))
    if state.mounted:
        return Exit.OK
    output.advise(remedy(state.code))
    return Exit.DISK
