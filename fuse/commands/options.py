"""Options that are numbers, and checks of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

Number = tuple[int, str] | tuple[float, str] | tuple[list[int], str]


def add_numbers(parser: argparse.ArgumentParser, metavar: str | None = None, **options: Number) -> None:
    """By the name of an option, its default and what it is; options with a list for a default take several numbers.

    metavar: what help calls them; by default whole numbers are N, and fractions seconds, S.
    """
    for name, (default, text) in options.items():
        several = default if isinstance(default, list) else [default]
        parser.add_argument(
            option_name(name),
            type=type(several[0]),
            nargs="+" if isinstance(default, list) else None,
            default=default,
            metavar=metavar or ("S" if isinstance(default, float) else "N"),
            help=f"{text} (default: {' '.join(str(one).removesuffix('.0') for one in several)})",
        )


def check_counts(arguments: argparse.Namespace, *names: str, most: Mapping[str, int] | None = None) -> None:
    """Of options that were given, every value. most: the largest, of those that have one.

    Raises: ValueError when one is below 1 or too large.
    """
    for name in names:
        value, largest = getattr(arguments, name), (most or {}).get(name)
        for count in value if isinstance(value, list) else [] if value is None else [value]:
            if count < 1:
                raise ValueError(f"{option_name(name)} is {count}: it must be at least 1")
            if largest is not None and count > largest:
                raise ValueError(f"{option_name(name)} is {count}: the most is {largest}")


def option_name(name: str) -> str:
    """`num_samples` -> `--num-samples`."""
    return f"--{name.replace('_', '-')}"
