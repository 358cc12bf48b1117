"""By simulation over the length distribution: RLHFuse's two numbers, R_t and m, and whether fusion should pay."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel
from fuse.interstage.migration import EngineLimits, Policy, StageByStage, Threshold
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate

Ints = NDArray[np.int64]

_logger = logging.getLogger(__name__)

_REMAINING = (0.05, 0.1, 0.2, 0.4, 1.0)
"""R_t as a part of the batch; the paper finds its best about 0.2."""
_KEPT = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""m as a part of the devices; 1 keeps each sample where it is."""
_NUM_DRAWS = 2
_MAX_SAMPLES = 128
"""Larger rollouts are tuned in miniature: fewer devices with as many samples each."""
_LEAST_DEVICES = 4
"""In miniature one would leave nothing to gain."""
_LEAST_GAIN = 0.01
"""Part of a rollout that fusion must be expected to save: simulations know nothing of the controller's work."""


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
    rollouts = _drawn(history, num_samples, num_devices, costs, limits, can_transfer)
    few_samples, few_devices = rollouts[0].num_samples, rollouts[0].num_devices

    def cost(choice: tuple[float, float]) -> tuple[float, int]:
        results = [simulate(rollout, _threshold(*choice, few_samples, few_devices)) for rollout in rollouts]
        return sum(result.makespan_s for result in results), sum(result.num_migrations for result in results)

    choices = [(remaining, kept) for remaining in remaining_shares for kept in kept_shares]
    return _threshold(*min(choices, key=cost), num_samples, num_devices)


def pays(gain: float) -> bool:
    """Whether an `expected_gain` is enough for rollouts to be fused."""
    return gain >= 1 + _LEAST_GAIN


def expected_gain(
    policy: Policy,
    history: LengthHistory,
    *,
    num_samples: int,
    num_devices: int,
    costs: CostModel,
    limits: EngineLimits,
    can_transfer: bool = True,
) -> float:
    """How many times as fast as stage by stage batches drawn from the history are expected to be under the policy.

    Equal lengths, a single device or costly migrations leave nothing to gain; the log says so.
    """
    rollouts = _drawn(history, num_samples, num_devices, costs, limits, can_transfer, _LEAST_DEVICES)
    if isinstance(policy, Threshold):
        shares = policy.remaining / num_samples, policy.num_kept / num_devices
        policy = _threshold(*shares, rollouts[0].num_samples, rollouts[0].num_devices)
    seconds, serial_s = (
        sum(simulate(rollout, one).makespan_s for rollout in rollouts) for one in (policy, StageByStage())
    )
    gain = serial_s / seconds
    if not pays(gain):
        _logger.info("rollouts go stage by stage: fused ones are expected to be %.3f times as fast", gain)
    return gain


def _drawn(
    history: LengthHistory,
    num_samples: int,
    num_devices: int,
    costs: CostModel,
    limits: EngineLimits,
    can_transfer: bool,
    least_devices: int = 1,
) -> list[Rollout]:
    """Some batches that may come, in miniature, but for no fewer devices than `least_devices`, where there are more."""
    few_devices = max(1, min(num_devices, least_devices), round(num_devices * min(1.0, _MAX_SAMPLES / num_samples)))
    is_small = num_samples <= _MAX_SAMPLES
    few_samples = num_samples if is_small else max(_MAX_SAMPLES, round(num_samples * few_devices / num_devices))
    draws = [history.draw(few_samples, seed) for seed in range(_NUM_DRAWS)]
    return [
        Rollout(
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            num_devices=few_devices,
            costs=costs,
            limits=limits,
            can_transfer=can_transfer,
        )
        for prompt_tokens, response_tokens in draws
    ]


def _threshold(remaining_share: float, kept_share: float, num_samples: int, num_devices: int) -> Threshold:
    return Threshold(max(1, round(remaining_share * num_samples)), max(1, round(kept_share * num_devices)))
