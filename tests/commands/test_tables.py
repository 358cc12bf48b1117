from __future__ import annotations

import io

import pytest
from rich.console import Console

from fuse.commands.tables import figures_table, print_table

TITLES = ["setting", *(f"column {index}" for index in range(12))]
ROWS = [["mixed lengths", *(f"{1.0625 + index:.4f}" for index in range(12))]]


def printed(*, no_wrap: bool, width: int) -> str:
    file = io.StringIO()
    print_table(figures_table(TITLES, ROWS, no_wrap=no_wrap), Console(file=file, width=width))
    return file.getvalue()


def test_no_figure_is_cut_off_where_the_console_is_narrower() -> None:
    (line,) = (line for line in printed(no_wrap=True, width=80).splitlines() if "mixed" in line)
    assert line.split() == " ".join(ROWS[0]).split()
    folded = printed(no_wrap=False, width=80)
    assert max(map(len, folded.splitlines())) <= 80
    assert "…" not in folded


@pytest.mark.parametrize("no_wrap", [True, False])
def test_a_table_that_fits_is_as_wide_as_the_console(no_wrap: bool) -> None:
    table, file = figures_table(TITLES, ROWS, no_wrap=no_wrap), io.StringIO()
    Console(file=file, width=200).print(table)
    assert printed(no_wrap=no_wrap, width=200) == file.getvalue()
