"""Which samples make which micro-batch, and after which micro-batches the optimizers step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLER_STATISTICS = ("sampler/sum", "sampler/max", "sampler/tokens")
"""Of a micro-batch: absolute differences between the sampler's log-probabilities and the trainer's, and how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    """Micro-batches whose gradients are summed before one step.

    micro_batches: sample indices of each. slots: its (epoch, mini-batch, micro-batch), where its statistics belong.
    accumulation: what each loss is divided by.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, int, int], ...]
    accumulation: int


def optimizer_steps(
    permutations: Sequence[NDArray[np.int64]], *, num_mini_batches: int, micro_batch_size: int
) -> list[OptimizerStep]:
    """One step per mini-batch of every epoch; `permutations` orders the samples of each epoch, [epochs][batch]."""
    steps = []
    for epoch, permutation in enumerate(permutations):
        for mini_batch, samples in enumerate(np.split(permutation, num_mini_batches)):
            micro_batches = _cut(samples, micro_batch_size)
            steps.append(
                OptimizerStep(
                    micro_batches=micro_batches,
                    slots=tuple((epoch, mini_batch, index) for index in range(len(micro_batches))),
                    accumulation=len(micro_batches),
                )
            )
    return steps


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
    slots = [slot for step in steps for slot in step.slots]
    size = 1 if last_of_pass else accumulation
    if len(micro_batches) % size:
        raise ValueError(
            f"trl_quirks: {len(micro_batches)} micro-batches per update are no multiple of "
            f"gradient_accumulation_steps={accumulation}: choose a per_device_train_batch_size that "
            f"divides the mini-batch"
        )
    return [
        OptimizerStep(
            micro_batches=tuple(micro_batches[start : start + size]),
            slots=tuple(slots[start : start + size]),
            accumulation=accumulation,
        )
        for start in range(0, len(micro_batches), size)
    ]


def average_statistics(
    steps: Sequence[OptimizerStep],
    statistics: Sequence[Sequence[Mapping[str, float]]],
    table_shape: tuple[int, int, int] | None = None,
) -> dict[str, float]:
    """Mean of each statistic over the micro-batches, [steps][micro-batches], and the variance of `val/ratio`.

    With `table_shape` the means are over a table [epoch, mini-batch, micro-batch] in which places that no micro-batch
    fills count as zero.
    """
    slots = [slot for step in steps for slot in step.slots]
    rows = [row for step in statistics for row in step]
    metrics = {}
    for name in (name for name in rows[0] if name not in SAMPLER_STATISTICS):
        values = np.array([row[name] for row in rows])
        if table_shape is not None:
            table = np.zeros(table_shape)
            table[tuple(np.array(slots).T)] = values
            values = table
        metrics[name] = float(values.mean())
        if name == "val/ratio":
            metrics["val/ratio_var"] = float(values.var(ddof=1)) if values.size > 1 else 0.0
    return metrics


def sampler_differences(first_step: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's before it steps: the mean and the largest.

    first_step: the statistics of the first step's micro-batches, so of its samples alone. In fp32 rounding alone makes
    a difference, about 1e-6: more means that engine and trainer hold other weights, or compute otherwise.
    """
    total, largest, tokens = ([row[name] for row in first_step] for name in SAMPLER_STATISTICS)
    return {
        "val/sampler_logprob_diff": sum(total) / max(1.0, sum(tokens)),
        "val/sampler_logprob_diff_max": max(largest),
    }


def _cut(samples: NDArray[np.int64], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(samples[start : start + size].tolist()) for start in range(0, len(samples), size))
