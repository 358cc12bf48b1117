"""The order of an update's samples: a function of the seed and the update's number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Permutation = Callable[[int, int], NDArray[np.int64]]
"""(update, epoch), counted from 1 and from 0 -> the order in which the epoch visits the batch."""


def seeded(seed: int, batch_size: int) -> Permutation:
    """Another order for every update and epoch, the same in every run with this seed."""
    return lambda update, epoch: np.random.default_rng([seed, update, epoch]).permutation(batch_size)
