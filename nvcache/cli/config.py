"""`nvcache config`: checks the settings and shows where each comes from, as `nvcache serve` would have them here. It asks no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nvcache.cli import output
from nvcache.cli.exits import Exit
from nvcache.cli.serve import SettingsCommand, config_option, set_by

if TYPE_CHECKING:
    from nvcache.settings import Settings
    from nvcache.settings.check import Finding
    from nvcache.settings.gather import Gathered


@click.group()
def config() -> None:
    """Check the settings, or show them with where each comes from.

    They are those that `nvcache serve` would have here: from its flags, this shell's environment, the TOML file and the defaults, in that order. What
    a running daemon was started with may differ.
    """


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--json", "json_", is_flag=True, help="the findings as JSON")
def check(*, file: Path | None, json_: bool) -> int:
    """Say everything that is wrong with FILE (NVCACHE_CONFIG) and the environment's settings.

    A fault would end `nvcache serve`: exit 2, and stdout has a line for each. Warnings are about files that are named and cannot be read here, and
    variables that look misspelt; they change no exit code.
    """
    from nvcache.settings import Given
    from nvcache.settings.check import check as look

    given = Given.of(config=file)
    findings = look(given)
    faults = sum(finding.fatal for finding in findings)
    if json_:
        output.as_json({"ok": not faults, "file": str(given.config) if given.config else None, "findings": [_as_json(each) for each in findings]})
    elif findings:
        rows = [(output.state("FAIL" if each.fatal else "WARN"), each.message, each.hint) for each in findings]
        output.table(["", "FOUND", "WHAT TO DO"], rows)
    told = [output.count(number, noun) for number, noun in ((faults, "fault"), (len(findings) - faults, "warning")) if number]
    output.say(f"{given.config or 'the environment'}: {' and '.join(told) or 'nothing is wrong'}")
    return Exit.USAGE if faults else Exit.OK


@config.command(cls=SettingsCommand)
@config_option
@click.option("--origin", is_flag=True, help="say of each setting where it comes from: default, a variable, the file, or a flag")
@click.option("--json", "json_", is_flag=True, help="JSON; sizes in bytes, times in seconds, null for what is not set")
def show(*, config: Path | None, origin: bool, json_: bool, **flags: Any) -> int:
    """Print every setting and its value, in the form of the TOML file.

    It takes the flags of `nvcache serve`, to see what they would make of it. Secrets are no settings: files of them are named and not read, and what
    a URL might hold of one is left out.
    """
    from nvcache.settings import Given, take
    from nvcache.settings.write import lines, plain

    given = Given.of(config=config, flags=set_by(flags))
    chosen, found = take(given), given.gather()
    if json_:
        values = plain(chosen)
        output.as_json({name: _with_origin(value, found, name) for name, value in values.items()} if origin else values)
    else:
        for line in lines(chosen, _remarks(chosen, found) if origin else {}):
            click.echo(output.visible(line))
    return Exit.OK


def _as_json(finding: Finding) -> dict[str, Any]:
    origin = finding.origin
    where = {"origin": origin and str(origin.kind), "from": (origin and origin.name) or None, "line": finding.line}
    return {
        "verdict": "fail" if finding.fatal else "warn",
        "setting": finding.setting,
        **where,
        "message": finding.message,
        "hint": finding.hint,
    }


def _with_origin(value: object, found: Gathered, name: str) -> dict[str, Any]:
    origin = found.origin(name)
    return {"value": value, "origin": str(origin.kind), "from": origin.name or None, "line": found.line(name)}


def _remarks(chosen: Settings, found: Gathered) -> dict[str, str]:
    places = {name: (str(found.origin(name)), found.line(name)) for name in type(chosen).model_fields}
    return {name: f"{origin}:{line}" if line else origin for name, (origin, line) in places.items()}
