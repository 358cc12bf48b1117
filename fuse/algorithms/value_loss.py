"""PPO's clipped value loss, as in TRL's PPOTrainer (trl 1.12): a mean over the values of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fuse.algorithms.batch import Positions
from fuse.algorithms.means import masked_mean
from fuse.micro_batch import Metric, Metrics, MicroBatch

VALUE_LOSS = Metric("loss/value_avg")
CLIP_FRACTION = Metric("val/clipfrac_avg")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """What the value loss compares with, all [positions]: mask bool, the others fp32."""

    positions: ClassVar[Positions] = "values"
    fill: ClassVar[Mapping[str, float]] = {}

    old_values: Tensor
    returns: Tensor
    mask: Tensor


def clipped_value_loss(
    hidden: Tensor, head: nn.Module, micro_batch: MicroBatch, *, vf_coef: float, cliprange: float | None
) -> tuple[Tensor, Metrics]:
    """`vf_coef` times the weighted loss of a micro-batch, and its metrics. hidden: [positions, hidden].

    cliprange: None for none.
    """
    targets = micro_batch.targets
    assert isinstance(targets, ValueTargets)
    values = head(hidden).float().squeeze(-1).masked_fill(~targets.mask, 0.0)
    weights = None if micro_batch.row_weights is None else micro_batch.row_weights.of_positions
    loss, clip_fraction = clipped_error(values, targets.old_values, targets.returns, targets.mask, cliprange, weights)
    return vf_coef * loss * micro_batch.weight, {VALUE_LOSS: loss.detach(), CLIP_FRACTION: clip_fraction}


def clipped_error(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float | None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped squared error and clip fraction, means over the positions where `mask` is true; arguments [positions].

    Without a `cliprange` values may change as they will. weights: see `masked_mean`; of the error alone.
    """
    if cliprange is None:
        return 0.5 * masked_mean((values - returns).square(), mask, weights), values.new_zeros(())
    clipped_values = values.clamp(old_values - cliprange, old_values + cliprange)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask, weights)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()
