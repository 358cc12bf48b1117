"""When Python looks for garbage: not while modules are imported, nor among what lives as long as a run.

To look through all the objects that modules, models and workers' handles are made of takes up to a second, and Python
does so when many new ones have been made: in the middle of an update, while devices wait for the driver.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_NUM_YOUNG = 100_000
"""New objects before those are looked through; Python's 700 to 2,000 take a fifth of the time of imports."""


def collect_rarely() -> None:
    """From now on. For processes that are ours."""
    gc.set_threshold(_NUM_YOUNG, *gc.get_threshold()[1:])


@contextmanager
def set_apart() -> Iterator[None]:
    """While the body runs, what there is now is not looked through, and the rest rarely.

    Nor is later what others have set apart before.
    """
    by_others, thresholds = _has_frozen_objects(), gc.get_threshold()
    collect_rarely()
    gc.freeze()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not by_others:
            gc.unfreeze()


@cache
def _has_frozen_objects() -> bool:
    """Before this process first sets anything apart. Python counts them one by one."""
    return gc.get_freeze_count() > 0
