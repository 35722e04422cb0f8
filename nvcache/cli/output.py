"""How results look: sizes, times, tables, JSON, complaints. It asks the daemon nothing and exits nothing.

stdout carries what was asked for, stderr everything else. rich is imported when something is drawn, so that `nvcache path` starts at once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width

import click

from nvcache.core.names import UNPRINTABLE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPE_WIDTH = 4096  # columns when nobody looks: never cut what a script greps
STATE_STYLE = {
    "ready": "green",
    "done": "green",
    "ok": "green",
    "degraded": "bold red",
    "failed": "bold red",
    "fail": "bold red",
    "cancelled": "yellow",
    "warn": "yellow",
    "unknown": "yellow",
    "evicting": "yellow",
    "ours": "green",
    "blank": "green",
    "not used": "dim",
    "refused": "bold red",
    "unchanged": "green",
    "mounted": "green",
    "assembled": "green",
    "created": "green",
    "rebuilt": "yellow",
    "removed": "green",
    "wiped": "green",
}
BUSY_STYLE = "cyan"
_UNSAFE = re.compile(rf"[{UNPRINTABLE}\ud800-\udfff]")  # with half surrogates, which cannot be written


def visible(text: str) -> str:
    """The text with what would change how a terminal shows it escaped: names come from listings that anybody may have written."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def size(count: float) -> str:
    """Bytes in decimal units, as disks and the Hub count: `90.9 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def rate(per_second: float) -> str:
    """Bytes per second for people."""
    return f"{size(per_second)}/s"


def count(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05 min`, `2:03:05 h`."""
    return f"{seconds:.1f} s" if seconds < 9.95 else _whole(round(seconds))


def left(seconds: float) -> str:
    """An estimate of what remains, never finer than it can be: `9 s left`, `3:05 min left`."""
    return f"{_whole(max(1, round(seconds)))} left"


def _whole(whole: int) -> str:
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def ago(moment: str | None, now: datetime | None = None) -> str:
    """An RFC 3339 time as seen from now: `just now`, `5 min ago`, `in 9 min`; `-` for none."""
    if not moment:
        return "-"
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= length:
            whole = f"{int(abs(seconds) // length)} {unit}"
            return f"{whole} ago" if seconds > 0 else f"in {whole}"
    return "just now" if seconds > -10 else f"in {int(-seconds)} s"  # two clocks may differ a little


def moment(text: str | None) -> str:
    """An RFC 3339 time to the second in UTC, and how far it is from now; `-` for none."""
    if not text:
        return "-"
    return f"{datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec='seconds').replace('+00:00', 'Z')} ({ago(text)})"


def percent(progress: Mapping[str, Any]) -> int:
    """How far a progress object is, 0 to 100; 100 only when all is done."""
    total, done = progress["bytes_total"], progress["bytes_done"]
    return int(100 * done / total) if total else 0


def state(text: str, extra: str = "") -> str | Text:
    """A state, on a terminal in its colour, with the progress of a fill behind it."""
    words = f"{text} {extra}".strip()
    if not sys.stdout.isatty():
        return words
    from rich.text import Text

    return Text(words, style=STATE_STYLE.get(text.lower(), BUSY_STYLE))


def going(progress: Mapping[str, Any] | None) -> str:
    """A fill's progress in one phrase: `42% at 1.2 GB/s, 40 s left`."""
    if not progress or not progress["bytes_total"]:
        return ""
    speed = f" at {rate(progress['rate'])}" if progress["rate"] else ""
    rest = f", {left(progress['eta_s'])}" if progress["eta_s"] is not None else ""
    return f"{percent(progress)}%{speed}{rest}"


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """Bytes as people write them, more than 0."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes. Fails as click does, in words."""
        from nvcache.settings.sizes import parse_size

        try:
            size = value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size <= 0:
            self.fail(f"{value!r} is not more than 0", param, ctx)
        return size


class Seconds(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A time in seconds on the command line; `above`: more than 0; `between`: the least and the most."""

    name = "seconds"

    def __init__(self, *, above: bool = False, between: tuple[float, float] | None = None) -> None:
        self._above = above
        self._between = between

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Fails as click does, in words."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = float("nan")
        if self._between is not None and not self._between[0] <= seconds <= self._between[1]:
            self.fail(f"{value!r} is not a number of seconds from {self._between[0]:g} to {self._between[1]:g}", param, ctx)
        if not (seconds > 0 or (seconds == 0 and not self._above)):
            self.fail(f"{value!r} is not a number of seconds{' greater than 0' if self._above else ', 0 or more'}, such as 1.5 or 600", param, ctx)
        return seconds


def console(*, stderr: bool = False) -> Console:
    """A console that folds nothing when it writes into a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def width() -> int:
    """Columns of stdout; plenty when nobody looks."""
    return console().width if sys.stdout.isatty() else PIPE_WIDTH


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Iterable[str] = (), whole: Iterable[str] = ()) -> None:
    """A borderless table on stdout; columns named in `right` hold numbers, those in `whole` are never wrapped."""
    if not sys.stdout.isatty():
        _aligned([tuple(columns), *(tuple(visible(str(cell)) for cell in row) for row in rows)], [name in frozenset(right) for name in columns])
        return
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    flush, unwrapped = frozenset(right), frozenset(whole)
    for name in columns:
        drawn.add_column(name, justify="right" if name in flush else "left", overflow="fold", no_wrap=name in unwrapped)
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row))
    _print(drawn)


def _aligned(lines: Sequence[Sequence[str]], flush: Sequence[bool]) -> None:
    """Lines of cells in a pipe, columns two blanks apart, those of `flush` to the right: what rich would draw, of a thousand rows at once."""
    widths = [max(map(_columns, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        gaps = (" " * (width - _columns(cell)) for width, cell in zip(widths, line, strict=True))
        cells = (gap + cell if right else cell + gap for right, gap, cell in zip(flush, gaps, line, strict=True))
        sys.stdout.write(f"{'  '.join(cells).rstrip()}\n")


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes: letters of East Asia take two, what combines with the one before none (Unicode annex 11)."""
    return len(text) if text.isascii() else sum(0 if combining(each) else 2 if east_asian_width(each) in "WF" else 1 for each in text)


def fields(pairs: Iterable[tuple[str, str | Text]]) -> None:
    """Aligned `name  value` lines on stdout."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table.grid(padding=(0, 2, 0, 0))
    drawn.add_column(style="bold")
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        drawn.add_row(name, value if isinstance(value, Text) else Text(visible(value)))
    _print(drawn)


def _print(drawn: Table) -> None:
    """A table on stdout; in a pipe without the blanks that fill the last column."""
    out = console()
    if out.is_terminal:
        out.print(drawn)
        return
    with out.capture() as captured:
        out.print(drawn)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def as_json(value: object, *, line: bool = False) -> None:
    """JSON on stdout: indented, or one line for a stream of objects."""
    click.echo(_lines(json.dumps(value, indent=None if line else 2, ensure_ascii=False)))  # its escapes are those of JSON


def say(text: str) -> None:
    """One line to a person, on stderr."""
    click.echo(f"nvcache: {_lines(text)}", err=True)


def _lines(text: str) -> str:
    return "\n".join(visible(line) for line in text.split("\n"))


def complain(detail: str, hint: str | None) -> None:
    """An error as every command shows it: what could not be done and why, then what to do."""
    say(detail)
    advise(hint)


def advise(hint: str | None) -> None:
    """What to do about it, on stderr, if that is known."""
    if hint:
        click.echo(f"hint: {hint}", err=True)
