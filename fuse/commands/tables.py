"""Tables of figures for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fuse.printable import printable


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
    """A column of names and, to the right, columns of figures."""
    table = Table(*titles, title=title, caption=caption, box=SIMPLE, padding=(0, 0, 0, 1))
    for index, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if index else "left", no_wrap
    for row in rows:
        table.add_row(*map(cell, row))
    return table
