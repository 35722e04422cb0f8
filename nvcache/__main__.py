"""The command line: argv → command → exit code. The one place that turns errors into messages and exit codes; what is not expected keeps its trace.

Nothing heavy is imported here or by the commands' modules: `nvcache path` runs in every pod's start.
"""

from __future__ import annotations

import sys
import traceback

import click

from nvcache import __version__
from nvcache.cli import output
from nvcache.cli.affinity import affinity
from nvcache.cli.completion import completion
from nvcache.cli.config import config
from nvcache.cli.daemon import Connection, exit_for, problem_of
from nvcache.cli.disks import disks
from nvcache.cli.doctor import doctor
from nvcache.cli.evict import evict
from nvcache.cli.exits import Exit
from nvcache.cli.hold import hold
from nvcache.cli.leases import leases
from nvcache.cli.mirror import mirror
from nvcache.cli.models import df, jobs, ls, path, pin, rm, show, unpin
from nvcache.cli.serve import serve
from nvcache.cli.ui import ui
from nvcache.cli.verify import verify
from nvcache.cli.warm import warm
from nvcache.cli.why import why
from nvcache.client import Problem
from nvcache.errors import NvcacheError

PROGRAM = "nvcache"


NAMES = "REF: org/name[@revision], az://account/container/prefix, file:///dir, or a model as `nvcache ls` shows it."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}, epilog=NAMES)
@click.option("--url", metavar="URL", help="the daemon: unix:///path.sock or http://host:port (NVCACHE_URL)")
@click.option("--socket", metavar="PATH", help="the daemon's Unix socket (NVCACHE_SOCKET)")
@click.option("--debug", is_flag=True, help="show the trace of errors", expose_value=False)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, *, url: str | None, socket: str | None) -> None:
    """A node-local cache of model weights that proves every byte it serves."""
    context.obj = Connection(url, socket)


for command in (
    serve,
    warm,
    hold,
    ls,
    show,
    path,
    rm,
    evict,
    leases,
    pin,
    unpin,
    verify,
    why,
    mirror,
    df,
    ui,
    affinity,
    disks,
    doctor,
    jobs,
    config,
    completion,
):
    cli.add_command(command)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (docs/cli.md)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return int(cli.main(arguments, prog_name=PROGRAM, standalone_mode=False) or Exit.OK)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return Exit.USAGE
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else PROGRAM
        output.complain(f"cannot run {command}: {error.format_message()}", f"`{command} --help` shows how")
        return Exit.USAGE
    except click.Abort:
        return Exit.INTERRUPTED
    except (Problem, NvcacheError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        problem = problem_of(error)
        output.complain(problem["detail"], problem["hint"])
        return exit_for(problem)
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads on; the interpreter would complain about stdout otherwise
        return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
