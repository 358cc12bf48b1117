"""Which samples make which micro-batch, and after which micro-batches a role's optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.micro_batch import Metric
from fuse.training.auxiliary import TextBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    """Micro-batches of one role whose gradients are summed before one step.

    micro_batches: sample indices of each. weight: of each one's loss. auxiliary: micro-batches of text, after them.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    weight: float
    auxiliary: tuple[TextBatch, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a role's step gave. metrics: [micro-batches]. gradient_norm: of the whole model, before clipping.

    auxiliary: metrics of the micro-batches of text.
    """

    metrics: Sequence[Mapping[Metric, float]]
    gradient_norm: float
    auxiliary: Sequence[Mapping[Metric, float]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How an update of a role is divided. accumulation: micro-batches between two of TRL's steps."""

    num_epochs: int
    num_mini_batches: int
    micro_batch_size: int
    accumulation: int


def optimizer_steps(
    permutations: Sequence[NDArray[np.int64]], *, num_mini_batches: int, micro_batch_size: int
) -> list[OptimizerStep]:
    """One step per mini-batch of every epoch; `permutations` orders the samples of each epoch, [epochs][batch]."""
    mini_batches = [samples for permutation in permutations for samples in np.split(permutation, num_mini_batches)]
    cuts = [_cut(samples, micro_batch_size) for samples in mini_batches]
    return [OptimizerStep(micro_batches=micro_batches, weight=1 / len(micro_batches)) for micro_batches in cuts]


def rollout_steps(
    permutations: Sequence[NDArray[np.int64]], *, micro_batch_size: int, num_iterations: int, accumulation: int
) -> list[OptimizerStep]:
    """One step per `accumulation` micro-batches of rollouts that are each used `num_iterations` times.

    permutations: by rollout, of the indices of its samples.
    """
    micro_batches = [
        micro_batch
        for permutation in permutations
        for _ in range(num_iterations)
        for micro_batch in _cut(permutation, micro_batch_size)
    ]
    assert len(micro_batches) % accumulation == 0
    return [
        OptimizerStep(micro_batches=tuple(micro_batches[start : start + accumulation]), weight=1 / accumulation)
        for start in range(0, len(micro_batches), accumulation)
    ]


def side_by_side(order: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The samples, in the order of units of `size` each that lie end to end: [units] -> [units * size]."""
    return (order[:, None] * size + np.arange(size)).reshape(-1)


def trl_optimizer_steps(
    permutations: Sequence[NDArray[np.int64]],
    *,
    num_mini_batches: int,
    micro_batch_size: int,
    accumulation: int,
    last_of_pass: bool,
) -> list[OptimizerStep]:
    """The steps TRL takes: one every `accumulation` micro-batches whatever the mini-batches are, and one after every
    micro-batch in the update that consumes the last batch of a pass over the dataset.

    Raises:
        ValueError: gradients would be left over at the end of the update, which TRL carries into the next.
    """
    steps = optimizer_steps(permutations, num_mini_batches=num_mini_batches, micro_batch_size=micro_batch_size)
    micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
    size = 1 if last_of_pass else accumulation
    if len(micro_batches) % size:
        raise ValueError(
            f"trl_quirks: {len(micro_batches)} micro-batches per update are no multiple of "
            f"gradient_accumulation_steps={accumulation}: choose a per_device_train_batch_size that "
            f"divides the mini-batch"
        )
    return [
        OptimizerStep(micro_batches=tuple(micro_batches[start : start + size]), weight=1 / accumulation)
        for start in range(0, len(micro_batches), size)
    ]


def _cut(samples: NDArray[np.int64], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(samples[start : start + size].tolist()) for start in range(0, len(samples), size))
