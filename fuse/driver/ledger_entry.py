"""A line of a device's memory ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What a device does at a time."""

    GENERATION = "generation"
    INFERENCE = "inference"
    TRAINING = "training"


@dataclass(frozen=True, slots=True)
class Entry:
    """Bytes of something of a role, by phase; a phase that is absent has none."""

    role: str
    what: str
    bytes: Mapping[Phase, int]


def always(role: str, what: str, num_bytes: int) -> Entry:
    """The same in all phases."""
    return Entry(role, what, dict.fromkeys(Phase, num_bytes))
