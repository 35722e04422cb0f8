"""The form of a table, on the terminal and in the README, and of the figures and verdicts in it. It knows no bench."""

from __future__ import annotations

from dataclasses import dataclass

MIN_WIDTH = 140  # of a table, also in a pipe


@dataclass(frozen=True)
class Table:
    """A table before it has a form: the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table for the README."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes)])

    def show(self) -> None:
        """The table on the terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i)
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        console.width = max(console.width, MIN_WIDTH)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)


def ranged(figure: dict[str, float], digits: int) -> str:
    """Median, and least to most."""
    return f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f}-{figure['max']:.{digits}f})"


def at_most(what: str, value: float, reach: float, form: str) -> str:
    """Whether `value` is at most `reach`, in a sentence."""
    return _verdict(value <= reach, what, value, f"at most {form.format(reach)}", form)


def at_least(what: str, value: float, reach: float, form: str) -> str:
    """Whether `value` is at least `reach`, in a sentence."""
    return _verdict(value >= reach, what, value, f"at least {form.format(reach)}", form)


def _verdict(reached: bool, what: str, value: float, wanted: str, form: str) -> str:
    shown = form.format(value)
    if not reached and wanted.endswith(f" {shown}"):  # missed by less than is shown
        shown = f"{value:.4g}"
    return f"{'Reached' if reached else 'NOT reached'}: {what} = {shown} ({wanted})."
