"""Advantages from the rewards of a prompt's responses, compared with one another.

Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1; without division: Dr. GRPO, Liu et al. 2025 (arXiv
2503.20783); rewards normalised one by one: GDPO, Liu et al. 2026 (arXiv 2601.05242). Deviations are sample deviations,
and 1e-4 is added to them, as in TRL's GRPOTrainer (trl 1.12).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fuse.algorithms.groups import by_group

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

_EPSILON = 1e-4


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """[samples, functions] -> [samples]: NaN is no reward and counts as none; all of them make the sum NaN."""
    total = (rewards * weights).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def group_advantages(
    rewards: Tensor, weights: Tensor, *, num_generations: int, scale: Scale, aggregation: Aggregation
) -> tuple[Tensor, Tensor]:
    """Advantages [samples], and the deviations [samples] that they were, or would be, divided by.

    rewards: [samples, functions], those of a prompt's `num_generations` responses side by side; NaN is no reward.
    weights: [functions]. A sample without any reward has advantage 0, and is not compared with.
    """
    if aggregation == "normalize_then_sum":
        grouped = rewards.view(-1, num_generations, rewards.shape[1])
        centred = grouped - grouped.nanmean(dim=1, keepdim=True)
        normalised = (centred / (deviation(grouped, dim=1) + _EPSILON)).view_as(rewards)
        total = weighted_sum(normalised, weights)
        deviations = deviation(total, dim=0).expand_as(total)
        return _finite((total - total.nanmean()) / (deviations + _EPSILON)), deviations
    total = weighted_sum(rewards, weights)
    grouped = by_group(total, num_generations)
    deviations = (deviation(total, dim=0) if scale == "batch" else deviation(grouped, dim=1)).expand_as(grouped)
    advantages = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale != "none":
        advantages = advantages / (deviations + _EPSILON)
    return _finite(advantages.reshape(-1)), deviations.reshape(-1)


def deviation(values: Tensor, dim: int) -> Tensor:
    """Sample deviation along a dimension, which stays, without what is NaN; NaN of fewer than two."""
    return variance(values, dim).sqrt()


def variance(values: Tensor, dim: int) -> Tensor:
    """Sample variance, likewise."""
    count = values.isfinite().sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return (squares / (count - 1)).masked_fill(count < 2, torch.nan)


def _finite(advantages: Tensor) -> Tensor:
    return advantages.nan_to_num(nan=0.0)
