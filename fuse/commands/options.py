"""Checks of options that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


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
