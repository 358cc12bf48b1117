"""What the command lines of benchmarks share: options, checks of them, and results as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fuse.commands.output import output_file, write_json

Row = dict[str, Any]
"""A setting and its figures, by the names that JSON has."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """A causal language model: one at a path, or a random Llama."""
    parser.add_argument("--model", metavar="PATH", help="causal language model (default: a random Llama, 4 x 256)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the random Llama (default: 4096)")
    parser.add_argument("--kv-heads", type=int, default=4, help="of the random Llama's 4 heads (default: 4)")


def add_json_option(parser: argparse.ArgumentParser, contents: str = "machine and rows") -> None:
    """Where results go."""
    parser.add_argument("--json", type=output_file, metavar="FILE", help=f"write {contents} to FILE")


def check_counts(arguments: argparse.Namespace, *names: str, at_least: int = 1) -> None:
    """Raises: ValueError when one of these options, or one of its values, is smaller."""
    for name in names:
        value = getattr(arguments, name)
        for count in value if isinstance(value, list) else [value]:
            if count < at_least:
                raise ValueError(f"--{name.replace('_', '-')} is {count}: it must be at least {at_least}")


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
