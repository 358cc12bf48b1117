"""Schedules on their way to ranks: a process packs one once, and unpacks it once, however often it comes.

An update after the other is trained by the same ones, of thousands of operations each.
"""

from __future__ import annotations

import pickle
from functools import lru_cache

from schedules import Schedule

_REMEMBERED = 64


@lru_cache(maxsize=_REMEMBERED)
def packed(schedule: Schedule) -> bytes:
    """What `unpacked` takes."""
    return pickle.dumps(schedule)


@lru_cache(maxsize=_REMEMBERED)
def unpacked(schedule: bytes) -> Schedule:
    """The schedule; of the same bytes the same object."""
    found: Schedule = pickle.loads(schedule)  # noqa: S301  (of this run)
    return found
