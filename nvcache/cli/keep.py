"""Runs the keeper of the stripe in the foreground for `nvcache disks watch`: signals, and a line for each state. The keeper decides everything."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import asdict

import click

from nvcache.cli import output
from nvcache.cli.disks import word
from nvcache.cli.exits import Exit
from nvcache.engine.handover import StripeState
from nvcache.engine.keeper import Keeper
from nvcache.engine.stripefile import StripeFiles
from nvcache.settings import Settings

EXIT_SECONDS = 9.0


def keep(settings: Settings, *, json_: bool) -> Exit:
    """Keep the stripe until SIGTERM or SIGINT. Raises `DiskError` (disks-busy) when somebody else keeps it."""
    group = int(settings.store_owner.partition(":")[2]) if settings.store_owner else None
    files = StripeFiles(settings.run_directory, group)
    files.make_directory()
    shown = -1

    def publish(state: StripeState) -> None:
        nonlocal shown
        files.publish(state)
        if state.generation != shown:
            _show(state, json_=json_)
        shown = state.generation

    keeper = Keeper(settings, publish, files.wait_acknowledged, files.take_doubt, first_generation=files.next_generation())
    asyncio.run(_until_told(keeper))
    return Exit.OK


async def _until_told(keeper: Keeper) -> None:
    """Run the keeper on a thread, so that its locks are never taken by a signal handler. The process ends in time whatever a disk is stuck in."""

    def told() -> None:
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, EXIT_SECONDS)
        keeper.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    try:
        await asyncio.to_thread(keeper.run)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _give_up(_number: int, _frame: object) -> None:
    os.write(2, b"nvcache: a disk did not answer in time; exiting anyway, the next start looks at everything anew\n")
    os._exit(0)


def _show(state: StripeState, *, json_: bool) -> None:
    if json_:
        output.as_json(asdict(state), line=True)
    else:
        click.echo(output.visible(word(state)))
