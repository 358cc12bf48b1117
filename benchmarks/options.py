"""What the command lines of benchmarks share: options, progress, tables of rows, and results as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from fuse.activity import SILENCE_S, repeated
from fuse.commands.options import add_numbers
from fuse.commands.output import output_file, write_json
from fuse.commands.tables import figures_table

Row = dict[str, Any]
"""A setting and its figures, by the names that JSON has."""


def add_choices(parser: argparse.ArgumentParser, option: str, choices: Sequence[str], text: str = "") -> None:
    """One of `choices`, by default the first."""
    default = choices[0]
    parser.add_argument(option, choices=choices, default=default, help=f"{text} (default: {default})".strip())


def add_selection(parser: argparse.ArgumentParser, option: str, choices: Sequence[str], text: str) -> None:
    """Some of `choices`, by default all of them."""
    parser.add_argument(
        option,
        nargs="+",
        choices=choices,
        default=list(choices),
        metavar=option.strip("-").removesuffix("s").upper(),
        help=text,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A causal language model: one at a path, or a random Llama."""
    parser.add_argument("--model", metavar="PATH", help="causal language model (default: a random Llama, 4 x 256)")
    add_numbers(parser, vocab_size=(4096, "of the random Llama"), kv_heads=(4, "of the random Llama's 4 heads"))


def add_engine_option(parser: argparse.ArgumentParser, text: str = "") -> None:
    """What generates."""
    add_choices(parser, "--engine", ("transformers", "vllm"), text)


def add_json_option(parser: argparse.ArgumentParser, contents: str = "machine, options and rows") -> None:
    """Where results go."""
    parser.add_argument("--json", type=output_file, metavar="FILE", help=f"write {contents} to FILE")


def tell(progress: str) -> None:
    """Say what is being done, to whoever waits."""
    print(progress, file=sys.stderr, flush=True)


@contextmanager
def telling(progress: Callable[[], str], every_s: float = SILENCE_S) -> Iterator[None]:
    """Say how far the body is, again and again until it ends."""
    with repeated(lambda: tell(progress()), every_s, name="progress"):
        yield


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


def write_rows(
    arguments: argparse.Namespace, machine: Mapping[str, object], names: Iterable[str], **results: object
) -> None:
    """Write machine, the options of these names and results to `arguments.json`, where it is given."""
    if arguments.json:
        write_json(arguments.json, {"machine": machine, "options": plain_options(arguments, names), **results})
