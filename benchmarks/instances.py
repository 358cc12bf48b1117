"""JSON files that benchmarks read: results of earlier runs, and published scheduling problems."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import schedules.reading


def read_json(path: Path, fields: Collection[str], description: str) -> dict[str, Any]:
    """The object in a JSON file. description: what it holds. Raises: ValueError when it is none with these fields."""
    value = schedules.reading.read_json(path, description, any_number=True)
    if not isinstance(value, dict) or not value.keys() >= set(fields):
        raise ValueError(f"{path} holds no {description}: name a file that does")
    return value


def read_instances(path: Path, fields: Collection[str]) -> list[dict[str, Any]]:
    """Published scheduling problems. Raises: ValueError when one lacks some of these fields."""
    entries = read_json(path, ["instances"], "instances")["instances"]
    fields = ("name", *fields)
    if not isinstance(entries, list) or not all(isinstance(one, dict) and one.keys() >= {*fields} for one in entries):
        raise ValueError(f'{path} must hold {{"instances": [...]}}, each with {", ".join(fields)}')
    return entries
