"""Figures of several repeats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A figure's median and range, under the names that JSON has; None where there are no values."""
    if not values:
        return {name: None, f"{name}_range": None}
    return {name: statistics.median(values), f"{name}_range": (min(values), max(values))}


def medians(mappings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each name, over the mappings that have it."""
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    return {name: statistics.median(mapping[name] for mapping in mappings if name in mapping) for name in names}
