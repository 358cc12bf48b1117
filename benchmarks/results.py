"""What benchmarks say and write: progress, a line and a table of rows, and JSON files, which may be read again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import schedules.reading
from fuse.commands.output import write_json
from fuse.commands.tables import figures_table

Row = dict[str, Any]
"""A setting and its figures, by the names that JSON has."""


def tell(progress: str) -> None:
    """Say what is being done, to whoever waits."""
    print(progress, file=sys.stderr, flush=True)


def rows_table(
    rows: Iterable[Row], columns: Mapping[str, str], *, title: str | None = None, caption: str | None = None
) -> Table:
    """A line per row. columns: by title, the format of a cell, with the row's names as fields."""
    cells = [[cell.format_map(row) for cell in columns.values()] for row in rows]
    return figures_table(list(columns), cells, title=title, caption=caption, no_wrap=True)


def plain_options(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    """Options as JSON has them."""
    options = {name: getattr(arguments, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def write_results(
    arguments: argparse.Namespace, machine: Mapping[str, object], names: Iterable[str], **results: object
) -> None:
    """Write machine, the options of these names and results to `arguments.json`, where it is given."""
    if arguments.json:
        write_json(arguments.json, {"machine": machine, "options": plain_options(arguments, names), **results})


def read_json(path: Path, fields: Collection[str], description: str) -> dict[str, Any]:
    """The object in a JSON file. description: what it holds. Raises: ValueError when it is none with these fields."""
    value = schedules.reading.read_json(path, description, any_number=True)
    if not isinstance(value, dict) or not value.keys() >= set(fields):
        raise ValueError(f"{path} holds no {description}: name a file that does")
    return value


def read_instances(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Published scheduling problems. Raises: ValueError when one lacks some of these fields."""
    entries = read_json(path, ["instances"], "instances")["instances"]
    fields = ("name", *fields)
    if not isinstance(entries, list) or not all(isinstance(one, dict) and one.keys() >= {*fields} for one in entries):
        raise ValueError(f'{path} must hold {{"instances": [...]}}, each with {", ".join(fields)}')
    return entries
