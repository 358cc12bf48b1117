"""How options are written: a default and its help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": text})


def either(names: Sequence[str]) -> str:
    """Names as a choice, in words."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last
