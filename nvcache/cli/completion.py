"""`nvcache completion`: prints click's own completion script for a shell. It changes no file."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Use it with `eval "$(nvcache completion bash)"` (or zsh) in the shell's start file, and for fish with `nvcache completion fish | source`.
    """
    root = context.find_root()
    name = root.info_name or "nvcache"
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(root.command, {}, name, f"_{name.upper()}_COMPLETE").source())
