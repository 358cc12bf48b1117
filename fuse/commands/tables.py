"""Tables of figures for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuse.printable import printable

_WIDEST = 10_000
"""Cells that no table needs."""


def cell(name: str) -> Text:
    """Lines with names from files as they stand there: no markup, nothing that a terminal obeys."""
    return Text("\n".join(map(printable, name.split("\n"))))


def figures_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    title: str | None = None,
    caption: str | None = None,
    no_wrap: bool = False,
) -> Table:
    """A column of names and, to the right, columns of figures. no_wrap: have each cell in one line."""
    table = Table(*titles, title=title, caption=caption, box=SIMPLE, padding=(0, 0, 0, 1))
    for index, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if index else "left", no_wrap
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def print_table(table: Table, console: Console | None = None) -> None:
    """Print it whole: cells that may not wrap are not cut where the console is narrower, as a file's is said to be."""
    console = console or Console()
    if all(column.no_wrap for column in table.columns):
        wanted = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
        console = Console(file=console.file, width=max(console.width, wanted))
    console.print(table)
