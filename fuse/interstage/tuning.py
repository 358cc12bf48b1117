"""RLHFuse's two numbers, R_t and m, by simulation over the length distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel
from fuse.interstage.migration import EngineLimits, Threshold
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate

Ints = NDArray[np.int64]

_REMAINING = (0.05, 0.1, 0.2, 0.4, 1.0)
"""R_t as a part of the batch; the paper finds its best about 0.2."""
_KEPT = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""m as a part of the devices; 1 keeps each sample where it is."""
_NUM_DRAWS = 2
_MAX_SAMPLES = 128
"""Larger rollouts are tuned in miniature: fewer devices with as many samples each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthHistory:
    """Lengths of past iterations, [past] each: what rollouts to come are drawn from."""

    prompt_tokens: Ints
    response_tokens: Ints

    def draw(self, num_samples: int, seed: int) -> tuple[Ints, Ints]:
        """Prompts and responses of a batch, with replacement."""
        chosen = np.random.default_rng(seed).integers(len(self.response_tokens), size=num_samples)
        return self.prompt_tokens[chosen], self.response_tokens[chosen]


def tune_threshold(
    history: LengthHistory,
    *,
    num_samples: int,
    num_devices: int,
    costs: CostModel,
    limits: EngineLimits,
    can_transfer: bool = True,
    remaining_shares: Sequence[float] = _REMAINING,
    kept_shares: Sequence[float] = _KEPT,
) -> Threshold:
    """The threshold policy with the least mean makespan over batches drawn from the history; ties: fewest moves.

    Tune again when `lengths.drift` says that the distribution has moved. Source: RLHFuse (arXiv 2409.13221), section
    4, which finds R_t by simulation and takes for m the fewest engines that the limits allow; m is searched for here.
    """
    shrink = min(1.0, _MAX_SAMPLES / num_samples)
    few_samples, few_devices = max(1, round(num_samples * shrink)), max(1, round(num_devices * shrink))
    rollouts = []
    for seed in range(_NUM_DRAWS):
        prompt_tokens, response_tokens = history.draw(few_samples, seed)
        rollouts.append(
            Rollout(
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                num_devices=few_devices,
                costs=costs,
                limits=limits,
                can_transfer=can_transfer,
            )
        )

    def cost(choice: tuple[float, float]) -> tuple[float, int]:
        results = [simulate(rollout, _threshold(*choice, few_samples, few_devices)) for rollout in rollouts]
        return sum(result.makespan_s for result in results), sum(result.num_migrations for result in results)

    choices = [(remaining, kept) for remaining in remaining_shares for kept in kept_shares]
    return _threshold(*min(choices, key=cost), num_samples, num_devices)


def _threshold(remaining_share: float, kept_share: float, num_samples: int, num_devices: int) -> Threshold:
    return Threshold(max(1, round(remaining_share * num_samples)), max(1, round(kept_share * num_devices)))
