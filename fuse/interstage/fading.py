"""The latest measurements of a kind, of which those of earlier iterations count less.

A machine is now faster, now slower: it is shared, or warms up, or lets a model lie better in its caches. Kinds of which
there are few rows, as calls to score or steps of a few samples, would otherwise have those of many iterations ago next
to the steps of the last one, and a fit would take for a matter of size what is one of time. Where nothing newer is
known, old rows still say all there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")

_LEFT = 0.5
"""Part of its weight that a row keeps from one iteration to the next."""
_LEAST = 1e-6
"""Weight at least: of what nothing newer is known."""


class Fading(Generic[_T]):
    """Rows with the iteration that they are of; the oldest of more than `most` are dropped."""

    def __init__(self, most: int) -> None:
        self._rows: deque[tuple[int, _T]] = deque(maxlen=most)

    def add(self, iteration: int, rows: Iterable[_T]) -> None:
        """Of this iteration, counted from any."""
        self._rows.extend((iteration, row) for row in rows)

    def __iter__(self) -> Iterator[_T]:
        return (row for _, row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def weights(self, iteration: int) -> NDArray[np.float64]:
        """Of the rows in order, in this iteration, [rows]."""
        ages = np.array([iteration - one for one, _ in self._rows], dtype=np.float64)
        return np.maximum(_LEFT**ages, _LEAST)
