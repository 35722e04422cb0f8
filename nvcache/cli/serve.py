"""`nvcache serve`: runs the daemon in the foreground with settings from flags, environment and file. It forks nothing and writes no pid file."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from nvcache.cli.daemon import Connection

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

DEFAULTS = {
    "store": "~/.cache/nvcache/store; with backend md or lvm MOUNT/store",
    "socket": "$XDG_RUNTIME_DIR/nvcache/nvcache.sock; as root /run/nvcache/nvcache.sock",
}
METAVARS = {"disk_models": "MODEL", "disk_exclude": "SERIAL", "store_owner": "UID:GID", "evict_high": "PART", "evict_low": "PART"}

config_option = click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with settings and [[models]] (NVCACHE_CONFIG)"
)


class SettingsCommand(click.Command):
    """A command with a flag for every scalar setting, made from the settings when the command is used: other commands never import them."""

    settings = "Settings"  # the class in nvcache.settings whose fields become flags

    @cached_property
    def setting_flags(self) -> list[click.Option]:
        """One option a setting, those of the disks last; values stay text, `settings.load` judges them."""
        from nvcache import settings

        fields = {name: field for name, field in getattr(settings, self.settings).model_fields.items() if name not in settings.TABLES}
        return [_flag(name, fields[name]) for name in sorted(fields, key=settings.DiskSettings.model_fields.__contains__)]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and the settings'."""
        *own, help_ = super().get_params(ctx)
        return [*own, *self.setting_flags, help_]


@click.command(cls=SettingsCommand)
@config_option
@click.pass_context
def serve(context: click.Context, /, *, config: Path | None, **flags: Any) -> int:
    """Run the daemon in the foreground.

    Prints one line when it is ready to answer; SIGTERM and SIGINT stop it within 10 seconds with exit code 0. Without options it keeps its store
    under the user's cache directory and needs no root. Every setting can be given here, as NVCACHE_<NAME> in the environment, or in the TOML file;
    that is also the order in which they count. The file's [[models]] and allow are read again when it changes, and on SIGHUP.
    """
    from nvcache import logs, settings

    before = context.ensure_object(Connection)
    if before.url:
        raise click.UsageError("--url is where other commands find the daemon; `serve` takes --socket and --listen")
    given = settings.Given.of(config=config, flags={"socket": before.socket, **set_by(flags)})
    chosen = settings.take(given)
    logs.setup(chosen.log_level, chosen.log_format)
    if chosen.kubernetes:
        from nvcache.kubernetes.serve import run
    else:
        from nvcache.api.serve import run
    return run(chosen, given)


def set_by(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that somebody gave."""
    return {name: value for name, value in flags.items() if value not in (None, ())}


def _flag(name: str, field: FieldInfo) -> click.Option:
    from nvcache.settings import SIZES

    kind = next((part for part in _parts(field.annotation) if part is not type(None)), str)
    flag, text = f"--{name.replace('_', '-')}", field.description or name.replace("_", " ")
    text += "; may be repeated" if get_origin(kind) is tuple else ""
    text += _default(name, field)
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    if get_origin(kind) is Literal:
        return click.Option([flag, name], type=click.Choice(get_args(kind)), help=text)
    if get_origin(kind) is tuple:
        return click.Option([flag, name], multiple=True, metavar=METAVARS.get(name, "PATTERN"), help=text)
    names: dict[Any, str] = {Path: "PATH", int: "N", float: "SECONDS"}
    return click.Option([flag, name], metavar="SIZE" if name in SIZES else METAVARS.get(name) or names.get(kind, "TEXT"), help=text)


def _default(name: str, field: FieldInfo) -> str:
    """How `--help` says what counts when nobody sets it."""
    from nvcache.settings import SIZES, format_size

    if name in DEFAULTS:
        return f"  [default: {DEFAULTS[name]}]"
    match field.default:
        case None | ():
            return ""
        case bool(value):
            shown = str(value).lower()
        case tuple(values):
            shown = ", ".join(values)
        case int(value) if name in SIZES:
            shown = format_size(value)
        case float(value):
            shown = f"{value:g}"
        case value:
            shown = str(value)
    return f"  [default: {shown}]"


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
