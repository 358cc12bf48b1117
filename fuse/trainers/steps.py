"""The optimizer steps of an update: a function of the seed and the update's number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.training.layout import Layout
from fuse.training.steps import OptimizerStep

Permutation = Callable[[int, int], NDArray[np.int64]]
"""(update, epoch), counted from 1 and from 0 -> the order in which the epoch visits the batch."""


def seeded(seed: int, batch_size: int) -> Permutation:
    """Another order for every update and epoch, the same in every run with this seed."""
    return lambda update, epoch: np.random.default_rng([seed, update, epoch]).permutation(batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How an update is divided. accumulation: micro-batches between two of TRL's steps."""

    layout: Layout
    num_epochs: int
    num_mini_batches: int
    micro_batch_size: int
    accumulation: int

    def of(self, update: int, permutation: Permutation, *, last_of_pass: bool) -> list[OptimizerStep]:
        """The steps of an update. last_of_pass: it ends a pass over the dataset."""
        return self.layout.steps(
            [permutation(update, epoch) for epoch in range(self.num_epochs)],
            num_mini_batches=self.num_mini_batches,
            micro_batch_size=self.micro_batch_size,
            accumulation=self.accumulation,
            last_of_pass=last_of_pass,
        )

    @property
    def num_places(self) -> int | None:
        """See `Layout`."""
        return self.layout.num_places(self.num_epochs, self.num_mini_batches, self.accumulation)
