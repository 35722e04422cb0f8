"""`nvcache serve`: runs the daemon in the foreground with settings from flags, environment and file. It forks nothing and writes no pid file."""

from __future__ import annotations

import types
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from nvcache.cli.daemon import Connection

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

SIZES = ("max_bytes", "min_free")
DEFAULTS = {"store": "~/.cache/nvcache/store", "socket": "$XDG_RUNTIME_DIR/nvcache/nvcache.sock; as root /run/nvcache/nvcache.sock"}


class SettingsCommand(click.Command):
    """A command with a flag for every scalar setting, made from the settings when the command is used: other commands never import them."""

    @cached_property
    def setting_flags(self) -> list[click.Option]:
        """One option a setting; values stay text, `settings.load` judges them."""
        from nvcache.settings import Settings

        return [_flag(name, field) for name, field in Settings.model_fields.items() if name != "models"]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and the settings'."""
        *own, help_ = super().get_params(ctx)
        return [*own, *self.setting_flags, help_]


@click.command(cls=SettingsCommand)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with settings and [[models]] (NVCACHE_CONFIG)")
@click.pass_context
def serve(context: click.Context, /, *, config: Path | None, **flags: Any) -> int:
    """Run the daemon in the foreground.

    Prints one line when it is ready to answer; SIGTERM and SIGINT stop it within 10 seconds with exit code 0. Without options it keeps its store
    under the user's cache directory and needs no root. Every setting can be given here, as NVCACHE_<NAME> in the environment, or in the TOML file;
    that is also the order in which they count.
    """
    from nvcache import logs, settings

    before = context.ensure_object(Connection)
    if before.url:
        raise click.UsageError("--url is where other commands find the daemon; `serve` takes --socket and --listen")
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    chosen = settings.load(config=config, flags={"socket": before.socket, **given} if before.socket else given)
    logs.setup(chosen.log_level, chosen.log_format)
    from nvcache.api.serve import run

    return run(chosen)


def _flag(name: str, field: FieldInfo) -> click.Option:
    kind = next((part for part in _parts(field.annotation) if part is not type(None)), str)
    flag, text = f"--{name.replace('_', '-')}", field.description or name.replace("_", " ")
    text += "; may be repeated" if get_origin(kind) is tuple else ""
    text += _default(name, field)
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    if get_origin(kind) is Literal:
        return click.Option([flag, name], type=click.Choice(get_args(kind)), help=text)
    if get_origin(kind) is tuple:
        return click.Option([flag, name], multiple=True, metavar="PATTERN", help=text)
    names: dict[Any, str] = {Path: "PATH", int: "N", float: "SECONDS"}
    return click.Option([flag, name], metavar="SIZE" if name in SIZES else names.get(kind, "TEXT"), help=text)


def _default(name: str, field: FieldInfo) -> str:
    """How `--help` says what counts when nobody sets it."""
    if name in DEFAULTS:
        return f"  [default: {DEFAULTS[name]}]"
    if field.default is None:
        return ""
    shown = (
        ", ".join(field.default) if isinstance(field.default, tuple) else f"{field.default:g}" if isinstance(field.default, float) else field.default
    )
    return f"  [default: {str(shown).lower() if isinstance(field.default, bool) else shown}]"


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
